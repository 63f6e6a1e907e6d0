"""T30: a manager is killed around its send; whoever resumes uses the same key, and the command is run once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.intents.outbox import Outbox
from opsmgr.store import LoopStore, default_folder
from sprite_agent.face.config import TOKEN_VARIABLE
from support import killed_control
from support.figures import found, scaled
from support.repos import LOOP, event, line
from support.runtime import executions, turn
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import AgentProgram

    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
OPSMGR = Path(sys.executable).with_name("opsmgr")
TESTS = Path(killed_control.__file__).parents[1]
ROUNDS = scaled(2, 25)


class Manager:
    """The programs of one manager of the loop."""

    def __init__(self, address: str, loop: LoopFiles) -> None:
        self.store = LoopStore(default_folder(loop.repo, LOOP))
        self._words = ["--repo", str(loop.repo), "--loop", LOOP, "--transport", "sprite_service"]
        self._words += ["--service-target", address]

    def killed(self, place: str, key: str) -> int:
        """Rejects with a key, and is killed at `place`; how it ended."""
        words = ["reject", *self._words, "--by", "ada", "--idempotency-key", key, "--timeout-seconds", "5"]
        return self._run(sys.executable, "-m", "support.killed_control", place, *words).returncode

    def resume(self, key: str) -> subprocess.CompletedProcess[str]:
        """Resumes a key, to the end."""
        return self._run(OPSMGR, "control", *self._words, "--resume", key)

    def _run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": str(TESTS), TOKEN_VARIABLE: TOKEN},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=DEADLINE,
        )


@pytest.fixture
def manager(repo: LoopFiles, tmp_path: Path, start_agent: Callable[..., AgentProgram]) -> Manager:
    """A manager of a loop that an agent serves, with a runtime that takes its time."""
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    turn(repo, sleep_before=0.1)
    return Manager(start_agent("--listen", f"unix:{tmp_path}/agent.sock").address(), repo)


def keys_in(store: LoopStore) -> list[str]:
    """The keys of the intents that were recorded."""
    lines = store.intents.read_text().splitlines() if store.intents.exists() else []
    return [json.loads(text)["idempotencyKey"] for text in lines]


@pytest.mark.timeout(scaled(240, 600))
@pytest.mark.parametrize("place", killed_control.PLACES[1:])
def test_a_manager_that_was_killed_around_its_send_is_resumed_and_the_command_run_once(
    place: str, manager: Manager, repo: LoopFiles
) -> None:
    for number in range(ROUNDS):
        key = f"{place}-{number}"
        repo.ask_approval(run_id=key)
        assert manager.killed(place, key) == -signal.SIGKILL
        left = Outbox(manager.store).load(key)
        assert left is not None
        assert (left.state, left.attempts) == ("pending", 1)

        ended = manager.resume(key)
        again = manager.resume(key)

        result = json.loads(ended.stdout)
        assert (ended.returncode, result["status"], result["idempotencyKey"]) == (0, "confirmed", key), ended.stderr
        assert {**result, "replayed": True} == json.loads(again.stdout)
        assert len(executions(repo)) == number + 1
        row = Outbox(manager.store).load(key)
        assert row is not None
        assert (row.state, row.request) == ("done", left.request)
        assert keys_in(manager.store)[number:] == [key]
    found("T30", f"{place}: {ROUNDS} kills -9: 1 execution each, under the same key")


@pytest.mark.timeout(scaled(240, 600))
def test_a_manager_that_was_killed_before_its_row_has_sent_nothing_and_nothing_is_resumed(
    manager: Manager, repo: LoopFiles
) -> None:
    for number in range(ROUNDS):
        assert manager.killed("before_row", f"key-{number}") == -signal.SIGKILL

        ended = manager.resume(f"key-{number}")

        assert ended.returncode == 1
        assert "nothing to resume" in ended.stderr
        assert executions(repo) == []
        assert keys_in(manager.store) == []
    found("T30", f"before_row: {ROUNDS} kills -9: 0 executions")


def test_what_is_sent_by_a_resume_counts_as_another_attempt_at_the_same_request(
    manager: Manager, repo: LoopFiles
) -> None:
    manager.killed("after_row", "key-1")
    manager.resume("key-1")

    row = Outbox(manager.store).load("key-1")
    assert row is not None
    assert row.attempts == 2
    first: Any = row.request["provenance"]
    assert first["attempt"] == 1
    assert len(executions(repo)) == 1
