"""`sprite-agent keys`: what it makes is what the agent takes, secrets are told once, and asking twice does no harm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.transport.credentials import Credentials
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.signatures import load_signer
from sprite_agent.errors import SignatureKeyUnknown, SignatureMissing, TokenInvalid
from support.runtime import SKIPS, executions, request
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import AgentProgram

    from support.repos import LoopFiles

    Start = Callable[..., AgentProgram]

PROGRAM = Path(sys.executable).with_name("sprite-agent")
ONE_TRY = RetryPolicy(attempts=1)


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `sprite-agent keys`, in a folder of its own."""

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [PROGRAM, "keys", *words],
            check=False,
            cwd=tmp_path,
            timeout=DEADLINE,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code, ended.stderr
        return ended

    return run


TOKEN = ("token", "--id", "t1", "--scope", "read", "--scope", "control", "--file", "tokens")
PAIR = ("pair", "--kid", "m1", "--issuer", "opsmgr-1", "--out", "key.json", "--trusted-keys", "trusted.json")


async def test_what_it_makes_is_what_the_agent_takes_and_what_is_revoked_is_refused_after_a_hangup(
    keys: Any, start_agent: Start, repo: LoopFiles, tmp_path: Path
) -> None:
    repo.ask_approval()
    token = keys(*TOKEN).stdout.strip()
    keys(*PAIR)
    program = start_agent(
        "--listen", "127.0.0.1:0", "--token-file", str(tmp_path / "tokens"),
        "--trusted-keys", str(tmp_path / "trusted.json"), "--sprite-id", "sprite-9",
    )  # fmt: skip
    signer = load_signer(tmp_path / "key.json", audience="sprite-9")
    signing = SpriteServiceTransport(
        program.address(), credentials=Credentials(token=token, signer=signer), policy=ONE_TRY
    )
    plain = SpriteServiceTransport(program.address(), token=token, policy=ONE_TRY)
    asked: Any = request(confirmation=SKIPS)

    with pytest.raises(SignatureMissing):
        await plain.execute(asked)
    assert (await signing.execute(asked))["executed"]
    assert (await plain.info()).sprite_id == "sprite-9"
    keys("revoke", "m1", "--trusted-keys", "trusted.json")
    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.said("credentials: took the new ones"), "it has read them anew")
    with pytest.raises(SignatureKeyUnknown):
        await signing.info()
    keys("revoke", "t1", "--token-file", "tokens")
    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.said("credentials: took the new ones")[1:], "it has read them anew again")
    with pytest.raises(TokenInvalid):
        await plain.info()

    for transport in (signing, plain):
        await transport.close()
    assert len(executions(repo)) == 1
    private = json.loads((tmp_path / "key.json").read_text())["d"]
    assert token not in program.text
    assert private not in program.text


def test_a_token_is_printed_once_and_only_its_digest_kept(keys: Any, tmp_path: Path) -> None:
    text, line = keys("token", "--id", "a", "--scope", "read", "--days", "1").stdout.splitlines()
    filed = keys(*TOKEN).stdout

    assert text.startswith("spr1.a.")
    assert line.startswith("a sha256:")
    assert " read until=" in line
    assert filed.startswith("spr1.t1.")
    assert len(filed.splitlines()) == 1
    assert filed.strip() not in (tmp_path / "tokens").read_text()
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o600


def test_an_id_that_is_there_is_not_given_again(keys: Any, tmp_path: Path) -> None:
    keys(*TOKEN)
    before = (tmp_path / "tokens").read_bytes()

    again = keys(*TOKEN, code=1)

    assert again.stdout == ""
    assert again.stderr == "Error: token file tokens has a token t1 already: revoke it first, or take another id\n"
    assert (tmp_path / "tokens").read_bytes() == before


def test_a_line_is_added_to_what_is_there(keys: Any, tmp_path: Path) -> None:
    keys(*TOKEN)
    (tmp_path / "tokens").write_text("# ours\n" + (tmp_path / "tokens").read_text().rstrip("\n"))
    keys("token", "--id", "t2", "--scope", "read", "--file", "tokens")
    keys("revoke", "t1", "--token-file", "tokens")

    first, second = (tmp_path / "tokens").read_text().splitlines()
    assert first == "# ours"
    assert second.startswith("t2 sha256:")


def test_a_pair_is_made_once_and_its_private_half_never_printed(keys: Any, tmp_path: Path) -> None:
    first = keys(*PAIR)
    content = {name: (tmp_path / name).read_bytes() for name in ("key.json", "trusted.json")}
    second = keys(*PAIR)
    printed = json.loads(keys("pair", "--kid", "m1", "--issuer", "opsmgr-1", "--out", "key.json").stdout)

    assert (
        first.stdout == second.stdout == "key m1 of opsmgr-1: private half in key.json, public half in trusted.json\n"
    )
    assert {name: (tmp_path / name).read_bytes() for name in content} == content
    assert (tmp_path / "key.json").stat().st_mode & 0o777 == 0o600
    assert json.loads(content["trusted.json"]) == {"keys": [printed]}
    private = json.loads(content["key.json"])["d"]
    assert private not in f"{first} {printed}"
    assert private.encode() not in content["trusted.json"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--issuer", "other"), "trusted.json has another key m1 already"),
        (("--scope", "read"), "trusted.json has another key m1 already"),
        (("--days", "1"), "trusted.json has another key m1 already"),
        (("--out", "other.json"), "trusted.json has key m1 already, and other.json is not there"),
        (("--kid", "m2"), "key.json holds key m1 of opsmgr-1, and is not overwritten"),
        (("--sprite-id", "s"), "key.json holds key m1 of opsmgr-1, and is not overwritten"),
    ],
    ids=str,
)
def test_a_pair_that_would_take_the_place_of_another_is_refused(
    keys: Any, tmp_path: Path, changed: tuple[str, str], message: str
) -> None:
    keys(*PAIR)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    assert message in keys(*PAIR, *changed, code=1).stderr

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_list_says_what_everything_is_good_for_and_has_no_secrets(keys: Any, tmp_path: Path) -> None:
    token = keys(*TOKEN).stdout.strip()
    keys(*PAIR, "--days", "1")
    with (tmp_path / "tokens").open("a") as file:
        file.write(f"old sha256:{'0' * 64} read until=2020-01-01T00:00:00Z\n")
    files = ("--token-file", "tokens", "--trusted-keys", "trusted.json")

    text = keys("list", *files).stdout
    rows = json.loads(keys("list", *files, "--json").stdout)["credentials"]

    first, second, third = text.splitlines()
    assert first == "token t1  read,control"
    assert second == "token old  read  until 2020-01-01T00:00:00Z  not valid now"
    assert third.startswith("key m1 of opsmgr-1  read,control  until 20")
    assert [(row["kind"], row["id"], row["valid"]) for row in rows] == [
        ("token", "t1", True),
        ("token", "old", False),
        ("key", "m1", True),
    ]
    private = json.loads((tmp_path / "key.json").read_text())["d"]
    for secret in (token, private, "sha256", "0" * 64):
        assert secret not in f"{text}{rows}"


def test_what_is_revoked_twice_is_not_there_the_second_time(keys: Any, tmp_path: Path) -> None:
    keys(*TOKEN)
    keys(*PAIR)
    files = ("--token-file", "tokens", "--trusted-keys", "trusted.json")

    assert keys("revoke", "t1", *files).stdout == "token t1 is no longer in tokens\n"
    assert json.loads(keys("revoke", "m1", *files, "--json").stdout) == {"revoked": "m1"}
    assert keys("revoke", "m1", *files, code=1).stderr == "Error: nothing has the id 'm1'; nothing was changed\n"
    assert keys("list", *files).stdout == "none\n"


def test_nothing_is_revoked_where_one_of_the_files_can_not_be_read(keys: Any, tmp_path: Path) -> None:
    keys(*TOKEN)
    before = (tmp_path / "tokens").read_bytes()

    keys("revoke", "t1", "--token-file", "tokens", "--trusted-keys", "none.json", code=1)

    assert (tmp_path / "tokens").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("token", "--scope", "read"), "Missing option '--id'"),
        (("token", "--id", "a"), "Missing option '--scope'"),
        (("token", "--id", "a.b", "--scope", "read"), "--id 'a.b' is not 1 to 64 of"),
        (("token", "--id", "a", "--scope", "write"), "'write' is not one of 'read', 'control'"),
        (("token", "--id", "a", "--scope", "read", "--days", "0"), "0 is not in the range"),
        (("pair", "--kid", "a b", "--issuer", "o", "--out", "k"), "--kid 'a b' is not 1 to 64 of"),
        (("pair", "--kid", "a", "--issuer", "", "--out", "k"), "--issuer '' is not 1 to 64 of"),
        (("pair", "--kid", "a", "--issuer", "o", "--out", "k", "--sprite-id", ""), "--sprite-id is empty"),
        (("list",), "give --token-file, --trusted-keys, or both"),
        (("revoke", "a"), "give --token-file, --trusted-keys, or both"),
    ],
    ids=str,
)
def test_what_was_called_wrongly_says_so(keys: Any, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    assert message in keys(*words, code=64).stderr
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("words", [("list",), ("revoke", "a"), ("token", "--id", "a", "--scope", "read")], ids=str)
def test_a_file_that_makes_no_sense_is_left_alone(keys: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "tokens").write_text("s3cret\n")
    option = "--file" if words[0] == "token" else "--token-file"

    ended = keys(*words, option, "tokens", code=1)

    assert "token file tokens: line 1 is not ID sha256:HEX SCOPES" in ended.stderr
    assert "s3cret" not in ended.stderr
    assert (tmp_path / "tokens").read_text() == "s3cret\n"
