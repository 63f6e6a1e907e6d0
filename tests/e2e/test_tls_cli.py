"""Both programs with TLS: what an operator types, and the one line that is said when it does not do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.certificates import Authority, put
from support.repos import LOOP, event, line
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import AgentProgram

    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
OPSMGR = Path(sys.executable).with_name("opsmgr")
NO_ANSWER_WITHIN = 30.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An agent that asks for certificates, and what a manager has."""

    address: str
    ca: Path
    cert: Path
    key: Path
    strange_ca: Path

    def opsmgr(self, *words: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        """What becomes of `opsmgr snapshot` with these words."""
        target = ("--transport", "sprite_service", "--service-target", self.address)
        return subprocess.run(
            [OPSMGR, "snapshot", "--loop", LOOP, *target, *words],
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.ca.parent), "OPS_MANAGER_SERVICE_TOKEN": token},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=NO_ANSWER_WITHIN + DEADLINE,
        )


@pytest.fixture
def scene(start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path) -> Scene:
    return serving(start_agent, repo, tmp_path)


def serving(start_agent: Callable[..., AgentProgram], repo: LoopFiles, folder: Path, *words: str) -> Scene:
    """An agent with these options as well, and what a manager needs for it."""
    repo.append(line(event()))
    authority, stranger = Authority(), Authority("a stranger")
    ca = put(folder / "ca.pem", authority.pem)
    agent_cert, agent_key = authority.issue("sprite-1.sprites.internal", "127.0.0.1").put(folder, "agent")
    cert, key = authority.issue("manager-1").put(folder, "manager")
    program = start_agent(
        *("--listen", "127.0.0.1:0", "--tls-cert", str(agent_cert), "--tls-key", str(agent_key)),
        *("--tls-client-ca", str(ca), *words),
    )
    strange_ca = put(folder / "strange-ca.pem", stranger.pem)
    return Scene(address=program.address(), ca=ca, cert=cert, key=key, strange_ca=strange_ca)


def test_with_certificates_on_both_sides_the_answer_comes(scene: Scene) -> None:
    ended = scene.opsmgr("--tls-ca", scene.ca, "--tls-cert", scene.cert, "--tls-key", scene.key)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["envelopeType"] == "loop_run_snapshot"


def test_the_name_in_the_certificate_can_be_said(scene: Scene) -> None:
    words = ("--tls-ca", scene.ca, "--tls-cert", scene.cert, "--tls-key", scene.key, "--tls-server-name")

    assert scene.opsmgr(*words, "sprite-1.sprites.internal").returncode == 0

    ended = scene.opsmgr(*words, "sprite-2.sprites.internal")
    assert ended.returncode == 3
    assert "its certificate is for another name" in ended.stderr


@pytest.mark.parametrize("given", ["nothing", "no certificate", "a strange CA"])
def test_what_does_not_do_ends_in_time_with_one_line(scene: Scene, given: str) -> None:
    words: dict[str, tuple[str | Path, ...]] = {
        "nothing": (),
        "no certificate": ("--tls-ca", scene.ca),
        "a strange CA": ("--tls-ca", scene.strange_ca, "--tls-cert", scene.cert, "--tls-key", scene.key),
    }
    meanings = {
        "nothing": "it may want TLS",
        "no certificate": "it may want a certificate of this manager's",
        "a strange CA": "its certificate is not accepted",
    }
    began = time.monotonic()

    ended = scene.opsmgr(*words[given])

    assert time.monotonic() - began < NO_ANSWER_WITHIN
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (3, "", 1)
    assert ended.stderr.startswith(f"opsmgr: no answer from {scene.address}: ")
    assert meanings[given] in ended.stderr
    assert TOKEN not in ended.stderr


def test_a_key_that_others_can_read_is_refused_before_anything_is_sent(scene: Scene) -> None:
    scene.key.chmod(0o644)

    ended = scene.opsmgr("--tls-ca", scene.ca, "--tls-cert", scene.cert, "--tls-key", scene.key)

    assert ended.returncode == 64
    assert f"Error: key file {scene.key} can be read by others; chmod 600 it" in ended.stderr


def keys_pair(tmp_path: Path, *words: str) -> Path:
    """A manager's signing key, made as an operator would; the agent's file to trust it is beside it."""
    key = tmp_path / "manager.json"
    subprocess.run(
        [
            OPSMGR.with_name("sprite-agent"),
            "keys",
            "pair",
            "--kid",
            "k1",
            "--issuer",
            "manager-1",
            "--out",
            key,
            *words,
        ],
        check=True,
        capture_output=True,
        timeout=DEADLINE,
    )
    return key


def test_options_that_need_others_are_refused_alone(scene: Scene, tmp_path: Path) -> None:
    cases: dict[str, tuple[str | Path, ...]] = {
        "a TLS certificate needs the CA of the agent's": ("--tls-cert", scene.cert, "--tls-key", scene.key),
        "a TLS certificate and its key go together": ("--tls-ca", scene.ca, "--tls-cert", scene.cert),
        f"key file {tmp_path}/manager.json names no Sprite": ("--signing-key", keys_pair(tmp_path)),
        f"CA file {scene.key} holds no certificate in PEM": ("--tls-ca", scene.key),
    }
    for message, words in cases.items():
        ended = scene.opsmgr(*words)

        assert (ended.returncode, ended.stdout) == (64, "")
        assert f"Error: {message}" in ended.stderr


def test_signed_requests_are_answered_and_others_are_not(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted.json"
    key = keys_pair(tmp_path, "--trusted-keys", str(trusted))
    signed = ("--trusted-keys", str(trusted), "--require-signature", "all", "--sprite-id", "sprite-1")
    scene = serving(start_agent, repo, tmp_path, *signed)
    words = ("--tls-ca", scene.ca, "--tls-cert", scene.cert, "--tls-key", scene.key)

    assert scene.opsmgr(*words, "--signing-key", key, "--sprite-id", "sprite-1").returncode == 0

    for more, reason in (
        ((), "SIGNATURE_MISSING"),
        (("--signing-key", key, "--sprite-id", "sprite-2"), "SIGNATURE_WRONG_AUDIENCE"),
    ):
        ended = scene.opsmgr(*words, *more)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
        assert ended.stderr.endswith(f" [{reason}]\n")
