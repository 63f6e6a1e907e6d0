"""The real program: what a control shows before it acts, what it asks, and how what was begun is resumed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.intents.outbox import Outbox
from opsmgr.store import LoopStore, default_folder
from sprite_agent.contract.envelopes import GATES
from support.repos import LOOP, STANDIN, LoopFiles, event, line
from support.runtime import asking_loop, executions, turn
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Iterator

OPSMGR = Path(sys.executable).with_name("opsmgr")
REJECT = ("reject", "--by", "ada")

Ended = subprocess.CompletedProcess[str]


class Operator:
    """Someone who controls one loop, over the local transport."""

    def __init__(self, loop: LoopFiles, place: Path) -> None:
        self.loop = loop
        self.store = LoopStore(default_folder(loop.repo, LOOP))
        self._words = ["--repo", str(loop.repo), "--loop", LOOP, "--state-dir", str(place / "state")]
        self._words += ["--superloop-bin", str(STANDIN)]
        self._env = {**os.environ, "HOME": str(place), "XDG_STATE_HOME": str(place / "states")}

    def opsmgr(self, command: str, *words: str) -> Ended:
        """Runs a command to its end, without a terminal."""
        with self.started(command, *words) as process:
            out, said = process.communicate(timeout=DEADLINE)
        return Ended([], process.returncode, out, said)

    def started(self, command: str, *words: str, terminal: int | None = None) -> subprocess.Popen[str]:
        """Starts one; with a terminal for what it says and is told."""
        return subprocess.Popen(
            [OPSMGR, command, *self._words, *words],
            env=self._env,
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
        )

    @property
    def intents(self) -> list[dict[str, Any]]:
        """What was recorded."""
        return [json.loads(text) for text in self.store.intents.read_text().splitlines()]


class Terminal:
    """A command on a terminal, and what it has said there. Lives as long as its `with`."""

    def __init__(self, operator: Operator, *words: str) -> None:
        self._master, slave = pty.openpty()
        self._seen = bytearray()
        self.process = operator.started(*words, terminal=slave)
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the program has ended
            while True:
                self._seen.extend(os.read(self._master, 65536))

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self._seen.decode(errors="replace").replace("\r\n", "\n")

    def asked(self) -> str:
        """What it has said once it asks."""
        until(lambda: "[y/N]" in self.text, f"it asks; it said {self.text}")
        return self.text

    def answer(self, text: str) -> int:
        """Answers, and waits for the end; the exit code."""
        os.write(self._master, text.encode())
        return self.end()

    def end(self) -> int:
        """Waits for the end; the exit code."""
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code

    def close(self) -> None:
        """Ends it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._reader.join(DEADLINE)
        os.close(self._master)


@contextlib.contextmanager
def on_a_terminal(operator: Operator, *words: str) -> Iterator[Terminal]:
    terminal = Terminal(operator, *words)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    """An operator of a loop that waits for approval."""
    loop = asking_loop(tmp_path / "repo")
    candidate = {"promise": {"expected": "DONE", "text": "DONE\x1b[2J", "matched": True}}
    loop.ask_approval(requested_at="2026-01-02T03:04:05Z", candidate=candidate)
    gates = {**dict.fromkeys(GATES, "skipped"), "tests": "ok", "approval": "pending"}
    loop.summarize({"run_id": "run-1", "iteration": 1, "gates": gates})
    return Operator(loop, tmp_path)


def result_of(ended: Ended) -> dict[str, Any]:
    """What was printed by a command that ended well and said nothing besides."""
    assert (ended.returncode, ended.stderr) == (0, "")
    return dict(json.loads(ended.stdout))


def begun(operator: Operator, key: str) -> None:
    """Has a reject begun, whose manager is killed before it hears what came of it."""
    turn(operator.loop, sleep_before=0.5)
    with operator.started(*REJECT, "--idempotency-key", key) as process:
        until(lambda: Outbox(operator.store).load(key) is not None, "the row is there")
        process.kill()


# Showing and asking.


def test_on_a_terminal_it_shows_what_it_acts_on_and_asks(operator: Operator) -> None:
    with on_a_terminal(operator, *REJECT) as terminal:
        shown = terminal.asked()
        before = len(executions(operator.loop))

        code = terminal.answer("y\n")

    assert before == 0
    assert code == 0
    for fact in ("loop demo", "awaiting_approval", "run-1, iteration 1", "tests ok", "kept: DONE", "days ago"):
        assert fact in shown, shown
    assert "\x1b[2J" not in shown
    assert shown.endswith("Reject? [y/N]: ")
    assert len(executions(operator.loop)) == 1


@pytest.mark.parametrize("answer", ["n\n", "\n", None], ids=["no", "nothing", "interrupted"])
def test_without_a_yes_nothing_is_sent(operator: Operator, answer: str | None) -> None:
    with on_a_terminal(operator, *REJECT) as terminal:
        terminal.asked()

        if answer is None:
            terminal.process.send_signal(signal.SIGINT)
        code = terminal.end() if answer is None else terminal.answer(answer)

    assert code == 1
    assert executions(operator.loop) == []
    assert Outbox(operator.store).unsettled() == []
    assert not operator.store.intents.exists()


def test_with_yes_it_shows_and_does_not_ask(operator: Operator) -> None:
    with on_a_terminal(operator, *REJECT, "--yes") as terminal:
        code = terminal.end()

        assert "run-1, iteration 1" in terminal.text
        assert "[y/N]" not in terminal.text
    assert code == 0


def test_without_a_terminal_it_neither_shows_nor_asks(operator: Operator) -> None:
    assert result_of(operator.opsmgr(*REJECT))["status"] == "confirmed"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"run_id": "run-2"}, "RUN_MISMATCH"),
        ({"iteration": 2}, "ITERATION_MISMATCH"),
        ({"candidate": {}}, "APPROVAL_CHANGED"),
    ],
)
def test_what_has_changed_since_it_was_shown_is_not_decided(
    operator: Operator, members: dict[str, Any], reason: str
) -> None:
    with on_a_terminal(operator, *REJECT) as terminal:
        terminal.asked()
        operator.loop.ask_approval(**members)

        code = terminal.answer("y\n")

        assert f"[{reason}]" in terminal.text
    assert code == 1
    assert executions(operator.loop) == []


def test_what_was_seen_is_sent_along_and_what_is_given_beats_it(operator: Operator) -> None:
    ended = operator.opsmgr(*REJECT, "--expected-iteration", "7", "--idempotency-key", "key-1")

    assert (ended.returncode, "[ITERATION_MISMATCH]" in ended.stderr) == (1, True)
    row = Outbox(operator.store).load("key-1")
    assert row is not None
    assert (row.request["expectedRunId"], row.request["expectedIteration"]) == ("run-1", 7)
    assert len(row.request["expectedApprovalDigest"]) == 64


def test_a_cancel_expects_the_run_of_the_last_event_and_not_that_of_the_last_summary(operator: Operator) -> None:
    operator.loop.append(line(event("iteration_start", run_id="run-2", iteration=1)))

    result_of(operator.opsmgr("cancel", "--by", "ada", "--idempotency-key", "key-1"))

    row = Outbox(operator.store).load("key-1")
    assert row is not None
    assert row.request["expectedRunId"] == "run-2"
    assert "expectedIteration" not in row.request


def test_a_run_that_is_not_known_is_not_expected(tmp_path: Path) -> None:
    operator = Operator(LoopFiles(tmp_path / "repo"), tmp_path)

    result_of(operator.opsmgr("cancel", "--by", "ada", "--idempotency-key", "key-1"))

    row = Outbox(operator.store).load("key-1")
    assert row is not None
    assert "expectedRunId" not in row.request


# Short forms.


@pytest.mark.parametrize("intent", ["approve", "reject", "cancel"])
def test_a_short_form_is_the_control_of_its_intent(operator: Operator, intent: str) -> None:
    ended = operator.opsmgr(intent, "--by", "ada", "--timeout-seconds", "0")

    assert json.loads(ended.stdout)["intent"] == intent


# Resuming.


def test_what_was_begun_is_resumed_under_its_key(operator: Operator) -> None:
    begun(operator, "key-1")

    result = result_of(operator.opsmgr("control", "--resume", "key-1"))

    assert (result["intent"], result["idempotencyKey"]) == ("reject", "key-1")
    assert len(executions(operator.loop)) == 1
    assert [entry["idempotencyKey"] for entry in operator.intents] == ["key-1"]


def test_what_is_done_is_printed_as_recorded_without_asking_anybody(operator: Operator) -> None:
    done = result_of(operator.opsmgr(*REJECT, "--idempotency-key", "key-1"))
    operator.loop.runtime.rename(operator.loop.repo / "moved")
    operator.loop.runtime.mkdir()
    (operator.loop.repo / "moved" / "ops-manager").rename(operator.loop.runtime / "ops-manager")

    assert result_of(operator.opsmgr("control", "--resume", "key-1")) == {**done, "replayed": True}


def test_the_same_words_with_the_same_key_run_nothing_twice_though_the_loop_has_changed(operator: Operator) -> None:
    first = result_of(operator.opsmgr(*REJECT, "--idempotency-key", "key-1"))
    operator.loop.ask_approval(run_id="run-2")

    again = result_of(operator.opsmgr(*REJECT, "--idempotency-key", "key-1"))

    assert again == {**first, "replayed": True}
    assert len(executions(operator.loop)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["control", "--resume", "key-2"], "nothing to resume"),
        (["approve", "--resume", "key-1"], "key key-1 belongs to reject, not to approve"),
    ],
)
def test_what_cant_be_resumed_is_refused(operator: Operator, words: list[str], message: str) -> None:
    result_of(operator.opsmgr(*REJECT, "--idempotency-key", "key-1"))

    ended = operator.opsmgr(*words)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert message in ended.stderr
    assert len(executions(operator.loop)) == 1


def test_a_key_that_only_the_agent_knows_is_resumed_by_its_intent(operator: Operator) -> None:
    done = result_of(operator.opsmgr(*REJECT, "--idempotency-key", "key-1"))
    operator.store.folder.rename(operator.loop.repo / "lost")

    assert result_of(operator.opsmgr("reject", "--resume", "key-1")) == {**done, "replayed": True}


def test_another_key_beside_the_one_to_resume_is_called_wrongly(operator: Operator) -> None:
    ended = operator.opsmgr("control", "--resume", "key-1", "--idempotency-key", "key-2")

    assert ended.returncode == 64


def test_what_has_no_outcome_is_named_by_the_next_control(operator: Operator) -> None:
    begun(operator, "key-1")

    ended = operator.opsmgr("cancel", "--by", "ada")

    assert "opsmgr control --resume key-1" in ended.stderr


def test_who_interrupts_it_once_it_was_sent_is_told_the_key(operator: Operator) -> None:
    turn(operator.loop, sleep_before=0.5)
    with operator.started(*REJECT, "--idempotency-key", "key-1") as process:
        until(lambda: Outbox(operator.store).load("key-1") is not None, "the row is there")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE)

    assert process.returncode == 130
    assert "opsmgr control --resume key-1" in said
