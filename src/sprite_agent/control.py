"""The control engine: runs an intent at most once for its idempotency key, and looks for its effect.

The order is what makes it safe. The key's row is committed before the command is started;
whoever finds a row answers from it; a row whose process is gone is never run again, but
looked into and finished. One command runs at a time in a repo: whoever runs one holds the
lane, whichever process that is.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from typing import TYPE_CHECKING

from sprite_agent import preconditions
from sprite_agent.command import build_command, find_runtime, run_command
from sprite_agent.contract import clock
from sprite_agent.contract.confirmation import evidence_from, look_for_effect
from sprite_agent.contract.requests import DEFAULT_TIMEOUT, fingerprint
from sprite_agent.contract.validation import validate
from sprite_agent.control_results import executing_result, not_needed_result, replayed
from sprite_agent.errors import (
    ControlBusy,
    ControlNotFound,
    IdempotencyKeyReused,
    InternalError,
    JournalCorrupt,
    JournalUnavailable,
)
from sprite_agent.journal import Journal
from sprite_agent.processes import is_alive, this_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprite_agent.artifacts import ArtifactFiles
    from sprite_agent.contract.confirmation import Evidence
    from sprite_agent.contract.envelopes import ControlConfirmation, ControlRequest, ControlResult
    from sprite_agent.journal import Entry
    from sprite_agent.snapshot import LoopReading
    from sprite_agent.state_folder import StateFolder

LANE_WAIT = 5.0
"""Seconds to wait for another command to end."""
MAX_CONTROLS = 8
"""At once in this process, waiting ones included: fewer than the server's threads."""

_POLL = 0.25
"""Seconds between two looks at a row that another call works on."""


class ControlEngine:
    """Runs control for one repo. Lives as long as its process; any thread may call."""

    def __init__(
        self,
        *,
        files: ArtifactFiles,
        folder: StateFolder,
        runtime: str | None,
        read_loop: Callable[[str], LoopReading],
    ) -> None:
        """Makes an engine; opens nothing yet.

        Args:
            files: the repo's files.
            folder: where the journal and the locks are.
            runtime: path of the runtime's command, where one is configured.
            read_loop: reads a loop's artifacts afresh.
        """
        self._files = files
        self._folder = folder
        self._runtime = runtime
        self._read_loop = read_loop
        # Two engines in one process must not take each other's rows for their own.
        self._owner = f"{this_process()}/{uuid.uuid4().hex[:8]}"
        self._slots = threading.BoundedSemaphore(MAX_CONTROLS)
        # Guards the opening of the journal and the set of rows this process works on.
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._working: set[tuple[str, str]] = set()

    def close(self) -> None:
        """Closes the journal."""
        if self._journal is not None:
            self._journal.close()

    def recover(self) -> None:
        """Finishes the rows of processes that are gone; nothing is run again.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        for entry in self._opened().unfinished():
            if self._is_abandoned(entry):
                # A command still runs in the repo: whoever asks for the key next finishes its row.
                with contextlib.suppress(ControlBusy):
                    self._finish_abandoned(entry)

    def execute(self, request: ControlRequest, *, deadline: float) -> ControlResult:
        """Runs the intent, or answers from the journal what has become of its key.

        Args:
            request: a checked request.
            deadline: moment on the monotonic clock until which to wait for another call's
                work on the same key. A command once started is never cut short by it.

        Raises:
            Refused, NotNow: nothing was run, as the error says.
            InternalError: the command has run, or may have, and that could not be recorded.
        """
        if not self._slots.acquire(blocking=False):
            raise ControlBusy(f"{MAX_CONTROLS} controls are being worked on; try again in a second", retry_after=1.0)
        started: tuple[ControlResult, Evidence] | None = None
        is_ours = False
        try:
            journal = self._opened()
            entry = journal.find(request["loopId"], request["idempotencyKey"])
            if entry is None:
                with self._folder.lane(LANE_WAIT) as lane:
                    # Looked up again: the key may have been used while this call waited.
                    entry = journal.find(request["loopId"], request["idempotencyKey"])
                    if entry is None:
                        with self._lock:
                            self._working.add(_place(request))
                        is_ours = True
                        started = self._run(request, lane)
                if started is not None:
                    result, baseline = started
                    return result if result["state"] == "done" else self._conclude(request, result, baseline)
            assert entry is not None  # noqa: S101  # found at first, or under the lane
            return self._answer(request, entry, deadline)
        finally:
            self._slots.release()
            if is_ours:
                with self._lock:
                    self._working.discard(_place(request))

    def result(self, loop_id: str, key: str) -> ControlResult:
        """What has become of a key so far.

        Raises:
            ControlNotFound: the journal does not have it.
            JournalCorrupt, JournalUnavailable
        """
        entry = self._opened().find(loop_id, key)
        if entry is None:
            raise ControlNotFound(
                f"the journal does not have key {key!r} for loop {loop_id}: nothing was run for it",
                details={"loopId": loop_id, "idempotencyKey": key},
            )
        if self._is_abandoned(entry):
            entry = self._finish_abandoned(entry)
        return replayed(entry.result)

    def _run(self, request: ControlRequest, lane: int) -> tuple[ControlResult, Evidence]:
        """Commits the row and runs the command, under the lane. The result so far, and the baseline."""
        self._files.require_loop(request["loopId"])
        reading = self._read_loop(request["loopId"])
        baseline = evidence_from(reading.snapshot, reading.last_event)
        preconditions.check(request, reading.snapshot, reading.last_event)
        if preconditions.is_so_already(request, reading.snapshot):
            result = not_needed_result(request, baseline)
            return self._opened().begin(request, fingerprint(request), self._owner, result), baseline
        command = build_command(find_runtime(self._runtime), self._files.repo, request)
        result = self._opened().begin(request, fingerprint(request), self._owner, executing_result(request, command))
        # The command holds the lane too: if this process is killed, no other command starts before it has ended.
        outcome = run_command(command, keep_open=lane)
        result = {
            **result,
            "state": "executed",
            "executed": outcome.exit_code is not None,
            "exitCode": outcome.exit_code,
            "timedOut": outcome.timed_out,
            "output": outcome.output,
        }
        self._record(result)
        return result, baseline

    def _conclude(self, request: ControlRequest, result: ControlResult, baseline: Evidence) -> ControlResult:
        """Looks for the effect as asked, and commits the outcome."""
        wait: ControlConfirmation = {"mode": "wait"}
        asked = request.get("confirmation", wait)
        if result["exitCode"] != 0:
            return self._done(result, status="failed_command", reason="command_failed", detail=_failure(result))
        if asked["mode"] == "skip":
            return self._done(result, status="executed_unconfirmed", reason="confirmation_skipped")
        timeout = asked.get("timeoutSeconds", DEFAULT_TIMEOUT)
        look = look_for_effect(
            request["intent"],
            lambda: self._evidence(request["loopId"]),
            baseline=baseline,
            required=asked.get("requiredEffect", "completed"),
            timeout=timeout,
        )
        result = {**result, "effect": look.effect, "confirmation": look.record}
        if look.record["confirmed"]:
            return self._done(result, status="confirmed", reason=look.record["reason"])
        return self._done(result, status="ambiguous", reason="timeout", detail=look.detail)

    def _answer(self, request: ControlRequest, entry: Entry, deadline: float) -> ControlResult:
        """The recorded result of a key, waited for while another call makes it."""
        key = request["idempotencyKey"]
        if entry.fingerprint != fingerprint(request):
            raise IdempotencyKeyReused(
                f"key {key!r} belongs to another request ({entry.result['intent']} by"
                f" {entry.result['requestedBy']}); use a new key for a new request",
                details={"idempotencyKey": key, "loopId": request["loopId"]},
            )
        while entry.result["state"] != "done":
            if self._is_abandoned(entry):
                entry = self._finish_abandoned(entry)
            elif time.monotonic() >= deadline:
                raise ControlBusy(f"key {key!r} is still being worked on; ask again with the same key", retry_after=1.0)
            else:
                time.sleep(min(_POLL, max(0.0, deadline - time.monotonic())))
                entry = self._opened().find(request["loopId"], key) or entry
        return replayed(entry.result)

    def _finish_abandoned(self, entry: Entry) -> Entry:
        """Finishes a row whose process is gone, by what the row says; nothing is run again."""
        with self._folder.lane(LANE_WAIT):
            current = self._opened().find(entry.result["loopId"], entry.result["idempotencyKey"])
            if current is not None and self._is_abandoned(current):
                self._done_without_looking(current.result)
        return self._opened().find(entry.result["loopId"], entry.result["idempotencyKey"]) or entry

    def _done_without_looking(self, result: ControlResult) -> None:
        if result["state"] == "executing":
            result = {**result, "executed": True}  # it may have been
            detail = "the agent ended before the command's end was recorded: it may have run"
        elif result["exitCode"] != 0:
            self._done(result, status="failed_command", reason="command_failed", detail=_failure(result))
            return
        else:
            detail = "the command ran; the agent ended before its effect was seen"
        self._done(result, status="ambiguous", reason="interrupted", detail=detail)

    def _is_abandoned(self, entry: Entry) -> bool:
        if entry.result["state"] == "done":
            return False
        if entry.owner == self._owner:
            with self._lock:
                return _place(entry.result) not in self._working
        return not is_alive(entry.owner.partition("/")[0])

    def _evidence(self, loop_id: str) -> Evidence:
        reading = self._read_loop(loop_id)
        return evidence_from(reading.snapshot, reading.last_event)

    def _done(
        self, result: ControlResult, *, status: str, reason: str | None, detail: str | None = None
    ) -> ControlResult:
        done: ControlResult = {
            **result,
            "state": "done",
            "status": status,  # type: ignore[typeddict-item]  # one of the four, by the callers above
            "reason": reason,
            "detail": detail,
            "finishedAt": clock.now(),
        }
        self._record(done)
        return done

    def _record(self, result: ControlResult) -> None:
        validate("control_result", result)
        try:
            self._opened().record(result)
        except (JournalUnavailable, JournalCorrupt) as error:
            raise InternalError(
                f"key {result['idempotencyKey']!r} was executed, but that could not be recorded; ask with the same key"
            ) from error

    def _opened(self) -> Journal:
        with self._lock:
            if self._journal is None:
                self._folder.make()
                self._journal = Journal(self._folder.journal)
            return self._journal


def _failure(result: ControlResult) -> str:
    if result["exitCode"] is None:
        return "the command could not be started"
    if result["timedOut"]:
        return "the command ran over its time limit and was ended"
    return f"the command exited with {result['exitCode']}"


def _place(named: ControlRequest | ControlResult) -> tuple[str, str]:
    return named["loopId"], named["idempotencyKey"]
