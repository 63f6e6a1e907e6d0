"""T31: tokens and private keys are in their files, and nowhere that anybody else can look.

H2, H3.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.certificates import Authority, put
from support.figures import found
from support.repos import LOOP, event, line
from support.runtime import executions, turn
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import AgentProgram

    from support.repos import LoopFiles

OPSMGR = Path(sys.executable).with_name("opsmgr")
SPRITE_AGENT = Path(sys.executable).with_name("sprite-agent")
AGREED = "a-token-that-was-agreed-on-by-hand-0123456789"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An agent with every secret there is, and a manager of it."""

    program: AgentProgram
    place: Path
    secrets: dict[str, list[bytes]]
    """What must be found nowhere but in `files`: by name, in each form it has."""
    files: set[Path]
    """Where secrets are kept."""

    def opsmgr(self, *words: str, token: Path | None = None) -> subprocess.Popen[bytes]:
        """Starts the manager; `token`: another one than its own."""
        own = {
            "--service-target": self.program.address(),
            "--service-token-file": token or self.place / "token",
            "--signing-key": self.place / "signing.json",
            "--tls-ca": self.place / "ca.pem",
            "--tls-cert": self.place / "manager.pem",
            "--tls-key": self.place / "manager.key",
        }
        options = [str(word) for pair in own.items() for word in pair]
        return subprocess.Popen(
            [OPSMGR, *words, "--loop", LOOP, "--transport", "sprite_service", "--sprite-id", "sprite-1", *options],
            env={"PATH": os.environ["PATH"], "HOME": str(self.place)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def found_in(self, what: str, content: bytes) -> list[str]:
        """Which secrets there are in something that others can see."""
        return [f"{name} in {what}" for name, forms in self.secrets.items() if any(form in content for form in forms)]


def keys(*words: str | Path) -> bytes:
    """What `sprite-agent keys` prints."""
    return subprocess.run([SPRITE_AGENT, "keys", *words], check=True, capture_output=True, timeout=DEADLINE).stdout


def pem_body(path: Path) -> list[bytes]:
    """The lines of a PEM file that mean something, and the bytes they stand for."""
    lines = [text for text in path.read_bytes().splitlines() if text and not text.startswith(b"-----")]
    return [*[text for text in lines if len(text) > 16], base64.b64decode(b"".join(lines))]


def long_words(content: bytes) -> list[bytes]:
    """What is long enough to be a key."""
    return re.findall(rb"[A-Za-z0-9_+/=-]{40,}", content)


@pytest.fixture
def scene(start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path) -> Scene:
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    place = tmp_path / "manager"
    place.mkdir()
    authority = Authority()
    put(place / "ca.pem", authority.pem)
    cert, key = authority.issue("sprite-1.sprites.internal", "127.0.0.1").put(tmp_path, "agent")
    _, manager_key = authority.issue("opsmgr-1").put(place, "manager")
    made = json.loads(
        keys("token", "--id", "t1", "--scope", "read", "--scope", "control", "--file", tmp_path / "tokens", "--json")
    )
    put(place / "token", made["token"].encode(), mode=0o600)
    put(place / "wrong", AGREED.encode(), mode=0o600)
    pair = ("pair", "--kid", "m1", "--issuer", "opsmgr-1", "--out", place / "signing.json")
    keys(*pair, "--trusted-keys", tmp_path / "trusted")
    program = start_agent(
        *("--listen", "127.0.0.1:0", "--sprite-id", "sprite-1", "--log-level", "debug"),
        *("--token-file", str(tmp_path / "tokens"), "--trusted-keys", str(tmp_path / "trusted")),
        *("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(place / "ca.pem")),
        OPS_MANAGER_SERVICE_TOKEN="",
    )
    public = b"".join(long_words((tmp_path / "trusted").read_bytes()))
    return Scene(
        program=program,
        place=place,
        secrets={
            "the token": [made["token"].encode(), made["token"].rpartition(".")[2].encode()],
            "the token that was refused": [AGREED.encode()],
            "the agent's key": pem_body(key),
            "the manager's TLS key": pem_body(manager_key),
            "the signing key": [
                word for word in long_words((place / "signing.json").read_bytes()) if word not in public
            ],
        },
        files={key, manager_key, place / "token", place / "wrong", place / "signing.json"},
    )


def with_descendants(pid: int) -> Iterator[Path]:
    """A process and all that it has started, as folders of /proc."""
    process = Path(f"/proc/{pid}")
    yield process
    for task in process.glob("task/*/children"):
        for child in task.read_text().split():
            yield from with_descendants(int(child))


def seen_of(pid: int) -> dict[str, bytes]:
    """What others can see of a process and its descendants: by name, their arguments and environments."""
    seen: dict[str, bytes] = {}
    for process in with_descendants(pid):
        words = (process / "cmdline").read_bytes()
        seen[f"cmdline of {words[:80]!r}"] = words
        seen[f"environ of {words[:80]!r}"] = (process / "environ").read_bytes()
    return seen


def wait_for_command(repo: LoopFiles, asking: subprocess.Popen[bytes]) -> None:
    """Returns when the command runs that a manager has asked for; it takes a second."""
    until(lambda: executions(repo) or asking.poll() is not None, "the command runs, or the manager has ended")
    assert asking.poll() is None, asking.communicate()


def test_secrets_are_in_no_argument_environment_log_answer_or_file(
    scene: Scene, repo: LoopFiles, tmp_path: Path
) -> None:
    assert all(forms for forms in scene.secrets.values())
    turn(repo, sleep_before=1)
    seen: dict[str, bytes] = {}

    with scene.opsmgr("control", "--intent", "approve", "--no-confirm", "--json") as asking:
        wait_for_command(repo, asking)
        seen |= seen_of(asking.pid)
        seen |= seen_of(scene.program.process.pid)
        processes = len(seen) // 2
        stdout, stderr = asking.communicate(timeout=DEADLINE)
    assert json.loads(stdout)["exitCode"] == 0
    seen |= {"what the manager printed": stdout + stderr}
    for name, words, token, said in [
        ("a snapshot", ("snapshot",), None, b"loop_run_snapshot"),
        ("a refusal", ("control", "--intent", "reject", "--expected-run-id", "none", "--json"), None, b"RUN_MISMATCH"),
        ("a refused token", ("snapshot", "--json"), scene.place / "wrong", b"TOKEN_INVALID"),
        ("the same to people", ("control", "--intent", "cancel"), scene.place / "wrong", b"TOKEN_INVALID"),
    ]:
        with scene.opsmgr(*words, token=token) as asking:
            stdout, stderr = asking.communicate(timeout=DEADLINE)
        assert said in stdout + stderr, stdout + stderr
        seen |= {f"what the manager printed of {name}": stdout + stderr}
    scene.program.process.terminate()
    assert scene.program.exit_code() == 0
    seen |= {"the agent's log": scene.program.text.encode()}
    for path in tmp_path.rglob("*"):
        if path.is_file() and path not in scene.files:
            seen |= {str(path.relative_to(tmp_path)): path.read_bytes()}

    assert processes >= 4  # the manager, the agent, the executor, the command
    assert {"journal.sqlite3", "intents.jsonl", "approval.json"} <= {Path(name).name for name in seen}
    assert [hit for what, content in seen.items() for hit in scene.found_in(what, content)] == []
    found("T31", f"{len(scene.secrets)} secrets, {processes} processes, {len(seen)} places: 0 hits")


def test_a_search_for_secrets_finds_them_where_they_are(scene: Scene) -> None:
    hits = {hit.partition(" in ")[0] for file in scene.files for hit in scene.found_in("", file.read_bytes())}

    assert hits == scene.secrets.keys()


def test_a_token_of_the_environment_is_not_handed_on(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path
) -> None:
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    turn(repo, sleep_before=1)
    put(tmp_path / "agreed", AGREED.encode(), mode=0o600)
    program = start_agent("--listen", "127.0.0.1:0", "--log-level", "debug", OPS_MANAGER_SERVICE_TOKEN=AGREED)
    target = ("--transport", "sprite_service", "--service-target", program.address())
    words = ("control", "--intent", "approve", "--no-confirm", "--loop", LOOP, *target)
    with subprocess.Popen(
        [OPSMGR, *words, "--service-token-file", str(tmp_path / "agreed")],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as asking:
        wait_for_command(repo, asking)
        agent, *children = with_descendants(program.process.pid)
        seen = b"".join((child / name).read_bytes() for child in children for name in ("cmdline", "environ"))
        seen += (agent / "cmdline").read_bytes()
        printed, _ = asking.communicate(timeout=DEADLINE)

    assert asking.returncode == 0, printed
    assert len(children) >= 2  # the executor, the command
    assert AGREED.encode() not in seen + printed + program.text.encode()
