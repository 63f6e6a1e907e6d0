"""What `serve` is told: options win over the environment, and what can't be is refused before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.config import RUNTIME_VARIABLE, TOKEN_VARIABLE, ServeConfig, check_listen, load_serve_config
from sprite_agent.state_folder import default_path

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
    path = tmp_path / "token"
    path.write_text("from-the-file\n")
    path.chmod(0o600)
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
        token="from-the-file",  # noqa: S106  # not one
        sprite_id="sprite-1",
    )


def test_what_is_not_given_is_not_there_and_the_state_folder_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))

    config = load(tmp_path)

    assert (config.runtime, config.token, config.sprite_id) == (None, None, None)
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

    assert (config.token, config.runtime) == ("from-the-file", "/opt/superloop")


def test_empty_variables_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    monkeypatch.setenv(RUNTIME_VARIABLE, "")

    config = load(tmp_path)

    assert (config.token, config.runtime) == (None, None)


def test_a_token_file_that_cannot_be_is_refused_though_the_environment_has_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")

    with pytest.raises(ValueError, match="can't be read"):
        load(tmp_path, token_file=tmp_path / "none")


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix:/run/agent.sock"])
def test_what_only_this_machine_reaches_may_be_listened_on(listen: str) -> None:
    check_listen(listen)


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:50051", "[::]:50051", "8.8.8.8:50051", "10.0.0.1:50051", "example.com:50051", "*:50051"]
)
def test_what_others_can_reach_is_refused_and_says_what_to_do(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ValueError, match=r"is not loopback.*listen on 127\.0\.0\.1:PORT or unix:PATH"):
        load(tmp_path, listen=listen)


@pytest.mark.parametrize("listen", ["", "50051", "127.0.0.1", "127.0.0.1:99999", "unix:"])
def test_what_is_no_address_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT or unix:PATH|needs a path"):
        load(tmp_path, listen=listen)
