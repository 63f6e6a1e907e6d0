"""Asks for controls in processes that start in milliseconds and may be killed, and notes what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sprite_agent.control.journal_file import read_audit
from support.control_history import ControlHistory
from support.failing_executor import KILL
from support.repos import STANDIN, LoopFiles, event, line, put
from support.runtime import LOOKS_ONCE, commands, executions, request, turn
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from support.repos import Json

TESTS = Path(__file__).parents[1]
RUNTIME = os.environ.get("SUPERLOOP_BIN") or str(STANDIN)
"""The real runtime's command where there is one."""
EXIT_CODE = 7
"""Of the commands of a `Controlled`: none that is got by chance."""
DECIDES = {**LOOKS_ONCE, "requiredEffect": "decision_recorded"}


class Driver:
    """A process that has each job done by a child of its own. Lives as long as its `with`; one thread may use it."""

    def __enter__(self) -> Self:
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(TESTS)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.failing_agent", "answer"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def do(self, job: Json, watch: Callable[[int], object] | None = None) -> list[Json]:
        """What the child has printed, and at last how it ended; see `failing_agent.py`.

        `watch` is given the child's pid before it does anything.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "held": watch is not None}).encode() + b"\n")
        self._process.stdin.flush()
        if watch is not None:
            watch(json.loads(self._process.stdout.readline())["pid"])
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        said: list[Json] = []
        for text in self._process.stdout:
            if text.endswith(b"}\n"):  # else it was killed in the middle of it
                said.append(json.loads(text))
                if "ended" in said[-1]:
                    return said
        raise AssertionError("the driver has ended; see what it printed")


class Controlled:
    """One loop that waits for approval, and everything that was asked of it."""

    def __init__(self, place: Path, driver: Driver, *, mutant: str | None = None) -> None:
        self.loop = LoopFiles(place / "repo")
        self.loop.append(line(event("approval_requested")))
        self.loop.ask_approval()
        turn(self.loop, exit_code=EXIT_CODE)
        self.state = place / "state"
        self.fired = place / "fired"
        """Has a file for each failpoint that was passed."""
        self.fired.mkdir()
        self.history = ControlHistory()
        self.runtime = str(STANDIN)
        self._driver = driver
        self._mutant = mutant

    def ask(
        self,
        *requests: Json,
        failpoints: str = "",
        recover: bool = False,
        ahead: bool = False,
        driver: Driver | None = None,
        watch: Callable[[int], object] | None = None,
    ) -> list[Json]:
        """Asks all of these at once, in a new process; what was said, for each that got an answer.

        Args:
            requests: what to ask.
            failpoints: places, as in "agent.recorded,executor.gated=ENOSPC"; at the first it is killed.
            recover: do first what an agent does at its start.
            ahead: likewise, and ask when an executor waits, as it does in an agent that serves.
            driver: has it done, where that is to be another one than usual.
            watch: is given the process's pid before it does anything.
        """
        attempts = [self.history.attempt(each) for each in requests]
        places = [place if "=" in place else f"{place}={KILL}" for place in failpoints.split(",") if place]
        job = {
            "repo": str(self.loop.repo),
            "state": str(self.state),
            "runtime": self.runtime,
            "requests": attempts,
            "failpoints": f"{self.fired}|{','.join(places)}" if places else "",
            "mutant": self._mutant,
            "recover": recover,
            "ahead": ahead,
        }
        *said, ended = (driver or self._driver).do(job, watch)
        assert ended["ended"] in {0, -signal.SIGKILL}, f"the agent ended with {ended['ended']}; see what it printed"
        by_attempt = {each["attempt"]: each for each in said}
        for attempt in attempts:
            self._note(attempt, by_attempt.get(attempt["traceId"], {}))
        return said

    def _note(self, attempt: Json, said: Json) -> None:
        if "answer" in said:
            self.history.answered(attempt, said["answer"])
        elif "error" in said:
            self.history.refused(attempt, said["error"]["reason"], executed=said["error"]["executed"])
        else:
            self.history.unanswered(attempt)

    def settle(
        self, document: Json, *, failpoints: str = "", recover: bool = False, ahead: bool = False, tries: int = 6
    ) -> Json:
        """Asks again, as a client has to, until there is an answer."""
        for _ in range(tries):
            for said in self.ask(document, failpoints=failpoints, recover=recover, ahead=ahead):
                if "answer" in said:
                    return dict(said["answer"])
                assert said["error"]["retryable"], f"it was refused: {said['error']}"
        raise AssertionError(f"no answer in {tries} tries: {self.history.calls}")

    def ran(self) -> list[Json]:
        """What was run, once none of it runs any more."""
        until(lambda: not _processes_of(self.loop.repo.parent), "every command has ended")
        return executions(self.loop)

    def check(self, *, lost: bool = False) -> None:
        """Has the history checked."""
        ran = self.ran()
        self.history.check(ran, read_audit(self.state / "journal.sqlite3"), exit_code=EXIT_CODE, lost=lost)


def decision(intent: str = "approve", **members: Any) -> Json:
    """A decision with a key of its own, whose being recorded is enough."""
    return request(intent, **{"idempotencyKey": uuid.uuid4().hex, "confirmation": DECIDES, **members})


def add_waiting_loop(repo: LoopFiles, loop_id: str) -> None:
    """Adds a loop that waits for approval: as many decisions can be made as there are loops."""
    folder = repo.folder.with_name(loop_id)
    folder.mkdir()
    (folder / "events.jsonl").write_bytes(line(event("approval_requested", loop_id=loop_id)))
    put(folder / "approval.json", {"status": "pending", "loop_id": loop_id, "run_id": "run-1", "iteration": 1})


def _processes_of(place: Path) -> list[int]:
    """Executors and commands that work on something below `place`."""
    return [pid for pid, words in commands() if any(os.fsencode(place) in word for word in words)]
