"""What `serve` is told: options win over the environment, and what can't be is refused before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.control.state_folder import default_path
from sprite_agent.face.config import RUNTIME_VARIABLE, TOKEN_VARIABLE, ServeConfig, check_listen, load_serve_config
from sprite_agent.face.credential_files import CredentialSources
from sprite_agent.face.tls import TlsFiles
from support.signing import Manager, put_keys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(RUNTIME_VARIABLE, raising=False)


def load(repo: Path, **options: Any) -> ServeConfig:
    """The configuration for options, of which only what a test is about is given."""
    given = {"listen": "127.0.0.1:0", "state_folder": None, "runtime": None, "token_file": None, "sprite_id": None}
    return load_serve_config(repo=repo, **{**given, **options})


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"t1 sha256:{'0' * 64} read,control\n")
    return path


def test_what_is_given_is_what_counts(tmp_path: Path, token_file: Path) -> None:
    config = load(
        tmp_path,
        listen="unix:/run/agent.sock",
        state_folder=tmp_path / "state",
        runtime="/opt/superloop",
        token_file=token_file,
        sprite_id="sprite-1",
    )

    assert config == ServeConfig(
        repo=tmp_path,
        listen="unix:/run/agent.sock",
        state_folder=tmp_path / "state",
        runtime="/opt/superloop",
        token=None,
        token_file=token_file,
        sprite_id="sprite-1",
    )


def test_what_is_not_given_is_not_there_and_the_state_folder_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))

    config = load(tmp_path, insecure=True)

    assert (config.runtime, config.token, config.sprite_id, config.tls) == (None, None, None, None)
    assert config.state_folder == default_path(tmp_path)
    assert config.state_folder.is_relative_to(tmp_path / "states")


def test_the_environment_fills_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    monkeypatch.setenv(RUNTIME_VARIABLE, "/env/superloop")

    config = load(tmp_path)

    assert (config.token, config.runtime) == ("from-the-environment", "/env/superloop")


def test_options_win_over_the_environment(tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    monkeypatch.setenv(RUNTIME_VARIABLE, "/env/superloop")

    config = load(tmp_path, token_file=token_file, runtime="/opt/superloop")

    assert (config.token, config.token_file, config.runtime) == (None, token_file, "/opt/superloop")


def test_empty_variables_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    monkeypatch.setenv(RUNTIME_VARIABLE, "")

    config = load(tmp_path, insecure=True)

    assert (config.token, config.runtime) == (None, None)


def test_a_token_file_that_cannot_be_is_refused_though_the_environment_has_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")

    with pytest.raises(ValueError, match="can't be read"):
        load(tmp_path, token_file=tmp_path / "none")


LOCAL = ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix:/run/agent.sock"]
ELSEWHERE = ["0.0.0.0:50051", "[::]:50051", "8.8.8.8:50051", "10.0.0.1:50051", "example.com:50051", "*:50051"]


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("listen", LOCAL + ELSEWHERE)
def test_callers_prove_who_they_are_or_it_was_said_that_they_need_not_and_others_need_tls_as_well(
    *, listen: str, tls: bool, proved: bool, insecure: bool
) -> None:
    may = proved != insecure if listen in LOCAL else tls and proved and not insecure

    if may:
        check_listen(listen, tls=tls, proved=proved, insecure=insecure)
    else:
        with pytest.raises(ValueError, match="--"):
            check_listen(listen, tls=tls, proved=proved, insecure=insecure)


@pytest.mark.parametrize("listen", ELSEWHERE)
def test_what_others_can_reach_is_refused_and_says_what_to_do(tmp_path: Path, token_file: Path, listen: str) -> None:
    """H1."""
    with pytest.raises(ValueError, match=r"is not loopback: it needs --tls-cert.*127\.0\.0\.1:PORT or unix:PATH"):
        load(tmp_path, listen=listen, token_file=token_file)


def test_certificates_of_callers_are_credentials_enough(tmp_path: Path) -> None:
    files = TlsFiles(cert=tmp_path / "cert", key=tmp_path / "key", client_ca=tmp_path / "ca")

    config = load(tmp_path, listen="0.0.0.0:1", tls_cert=files.cert, tls_key=files.key, tls_client_ca=files.client_ca)

    assert config.tls == files


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert"}, "go together"),
        ({"tls_key"}, "go together"),
        ({"tls_cert", "tls_client_ca"}, "go together"),
        ({"tls_client_ca"}, "--tls-client-ca needs --tls-cert and --tls-key"),
    ],
)
def test_tls_files_that_need_others_are_refused_alone(
    tmp_path: Path, token_file: Path, given: set[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, token_file=token_file, **{name: tmp_path / name for name in given})


@pytest.mark.parametrize("listen", ["", "50051", "127.0.0.1", "127.0.0.1:99999", "unix:"])
def test_what_is_no_address_is_refused(tmp_path: Path, token_file: Path, listen: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT or unix:PATH|needs a path"):
        load(tmp_path, listen=listen, token_file=token_file)


@pytest.fixture
def trusted_keys(tmp_path: Path) -> Path:
    return put_keys(tmp_path / "keys.json", Manager().trusted())


@pytest.mark.parametrize(("asked", "required"), [(None, "control"), ("none", "none"), ("all", "all")])
def test_control_has_to_be_signed_where_keys_are_trusted_unless_it_was_said_otherwise(
    tmp_path: Path, token_file: Path, trusted_keys: Path, asked: str | None, required: str
) -> None:
    config = load(
        tmp_path, token_file=token_file, trusted_keys=trusted_keys, require_signature=asked, sprite_id="sprite-1"
    )

    assert config.require_signature == required
    assert config.credential_sources == CredentialSources(token_file=token_file, trusted_keys=trusted_keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"require_signature": "all"}, "--require-signature all needs --trusted-keys"),
        ({"require_signature": "control"}, "--require-signature control needs --trusted-keys"),
        ({"trusted_keys": "keys"}, "--trusted-keys needs --sprite-id"),
        ({"trusted_keys": "keys", "sprite_id": "s", "insecure": True}, "leave out one of the two"),
        ({"trusted_keys": "keys", "sprite_id": "s"}, "everyone who reaches '127.0.0.1:0' could read and control"),
    ],
    ids=str,
)
def test_signatures_that_cannot_be_checked_or_are_not_enough_are_refused(
    tmp_path: Path, trusted_keys: Path, options: dict[str, Any], message: str
) -> None:
    given = {name: trusted_keys if value == "keys" else value for name, value in options.items()}

    with pytest.raises(ValueError, match=message):
        load(tmp_path, **given)


def test_signatures_on_everything_are_credentials_enough(tmp_path: Path, trusted_keys: Path) -> None:
    config = load(tmp_path, trusted_keys=trusted_keys, require_signature="all", sprite_id="s")

    assert (config.require_signature, config.credential_sources.need_token) == ("all", False)


@pytest.mark.parametrize("option", ["token_file", "trusted_keys"])
def test_files_that_make_no_sense_are_refused_before_anything_starts(tmp_path: Path, option: str) -> None:
    file = tmp_path / "file"
    file.write_text("s3cret\n")

    with pytest.raises(ValueError, match=str(file)) as caught:
        load(tmp_path, **{option: file}, sprite_id="s")
    assert "s3cret" not in str(caught.value)
