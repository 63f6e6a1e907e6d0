"""The control engine: runs an intent at most once for its idempotency key, and looks for its effect.

The order is what makes it safe. The key's row is committed before an executor is told of
the command, and the executor starts nothing before it has heard so; whoever finds a row
answers from it; a row whose process is gone is never run again, but looked into and
finished. One command runs at a time in a repo: whoever runs one holds the lane, whichever
process that is, and a killed agent's executor goes on holding it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sprite_agent.contract.requests import fingerprint
from sprite_agent.contract.validation import validate
from sprite_agent.control import failpoints, preconditions
from sprite_agent.control.command import build_command, find_runtime
from sprite_agent.control.conclusion import conclude, conclude_unlooked
from sprite_agent.control.evidence import take_baseline
from sprite_agent.control.flights import Flights
from sprite_agent.control.journal import Journal, NewRow
from sprite_agent.control.journal_rows import mark_of
from sprite_agent.control.processes import NOBODY, is_alive, this_boot, this_process
from sprite_agent.control.refusals import RefusalNotes
from sprite_agent.control.results import (
    executed_result,
    executing_result,
    interrupted_result,
    not_needed_result,
    replayed,
)
from sprite_agent.control.state_folder import free
from sprite_agent.errors import (
    ControlBusy,
    ControlNotFound,
    IdempotencyKeyReused,
    InternalError,
    JournalCorrupt,
    JournalUnavailable,
    NotExecuted,
    OpsError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.artifacts import ArtifactFiles
    from sprite_agent.callers import Caller, Proof
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from sprite_agent.control.command import Runtime
    from sprite_agent.control.executions import Execution, Executions
    from sprite_agent.control.journal_rows import Entry
    from sprite_agent.control.state_folder import StateFolder
    from sprite_agent.event_log.log import EventLog
    from sprite_agent.snapshot import LoopReading

LANE_WAIT = 5.0
"""Seconds to wait for another command to end."""
MAX_CONTROLS = 64
"""At once in this process, those that wait for another's included: each holds a thread of the server."""
ORPHAN_WAIT = 40.0
"""Seconds that recovery waits for the command of a killed agent: it has a time limit of its own."""

_POLL = 0.25
"""Seconds between two looks at a row that another process works on."""


class ControlEngine:
    """Runs control for one repo. Lives as long as its process; any thread may call."""

    def __init__(
        self,
        *,
        files: ArtifactFiles,
        folder: StateFolder,
        runtime: Runtime,
        executions: Executions,
        read_loop: Callable[[str], LoopReading],
        log_of: Callable[[str], EventLog],
    ) -> None:
        """Makes an engine; opens nothing yet.

        Args:
            files: the repo's files.
            folder: where the journal and the locks are.
            runtime: the runtime's command.
            executions: runs it.
            read_loop: reads a loop's artifacts afresh.
            log_of: the event log of a loop.
        """
        self._files = files
        self._folder = folder
        self._runtime = runtime
        self._executions = executions
        self._read_loop = read_loop
        self._log_of = log_of
        # Two engines in one process must not take each other's rows for their own.
        self._owner = f"{this_process()}/{uuid.uuid4().hex[:8]}"
        self._slots = threading.BoundedSemaphore(MAX_CONTROLS)
        self._flights = Flights()
        self._refusals = RefusalNotes()
        # One thread at a time asks for the lane that other processes may hold.
        self._turn = threading.Lock()
        # Guards the opening of the journal.
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._corrupt: tuple[str, object] | None = None
        """Why the journal was not taken, and what its files looked like: to look at all of it takes seconds."""

    def close(self) -> None:
        """Closes the journal, and ends the executor that waits.

        A key that is still worked on is left to whoever asks for it next: what its thread does
        from now on is not recorded.
        """
        self._executions.close()
        if self._journal is not None:
            self._journal.close(functools.partial(self._give_up, self._journal))

    @property
    def journal(self) -> Journal:
        """The journal, opened when it is first asked for.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        with self._lock:
            if self._journal is None:
                self._folder.make()
                looks = self._folder.journal_looks()
                if self._corrupt is not None and self._corrupt[1] == looks:
                    raise JournalCorrupt(self._corrupt[0])
                try:
                    self._journal = Journal(self._folder)
                except JournalCorrupt as error:
                    self._corrupt = error.message, looks
                    raise
            return self._journal

    def fault(self) -> OpsError | None:
        """Why control can't be served at the moment; None: it can. Makes good what a full disk has cost, if it can."""
        try:
            self.journal.check_place()
            find_runtime(self._runtime)
        except OpsError as error:
            return error
        return None

    def recover(self) -> None:
        """Finishes the rows of processes that are gone; nothing is run again.

        Returns when it has looked at each. Where a command still runs, or its effect is
        still to be waited for, that goes on in threads. From now on an executor may wait
        for the next command.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        unfinished = self.journal.unfinished()
        with contextlib.suppress(ControlBusy), self._lane(0):
            self._executions.forget_all_but(entry.execution_id for entry in self.journal.unfinished())
        for entry in unfinished:
            threading.Thread(target=self._recover_one, args=(entry,), name="recovery", daemon=True).start()
        if self._runtime.path:
            self._executions.prepare()

    def execute(self, request: ControlRequest, *, caller: Caller, deadline: float) -> ControlResult:
        """Runs the intent, or answers from the journal what has become of its key.

        Args:
            request: a checked request.
            caller: who asks; recorded.
            deadline: moment on the monotonic clock until which to wait for another call's
                work on the same key. A command once started is never cut short by it.

        Raises:
            Refused, NotNow: nothing was run, as the error says.
            InternalError: the command has run, or may have, and that could not be recorded.
        """
        place = request["loopId"], request["idempotencyKey"]
        with self._slot(), self._refusals.noted(request, caller, lambda: self.journal):
            while True:
                entry = self.journal.find(*place)
                if entry is not None:
                    _refuse_another_request(entry, request)
                    if entry.state == "done":
                        return replayed(entry.result)
                with self._flights.join(place, deadline) as leads:
                    if leads:
                        return self._lead(request, caller, deadline)
                # It has landed: look what came of it.

    def result(self, loop_id: str, key: str) -> ControlResult:
        """What has become of a key so far.

        Raises:
            ControlNotFound: the journal does not have it.
            JournalCorrupt, JournalUnavailable
        """
        entry = self.journal.find(loop_id, key)
        if entry is None:
            raise ControlNotFound(
                f"the journal does not have key {key!r} for loop {loop_id}: nothing was run for it",
                details={"loopId": loop_id, "idempotencyKey": key},
            )
        return replayed(entry.result)

    def use_up(self, proof: Proof) -> None:
        """Remembers the signature of a control that was refused; a journal that can't be written changes no answer."""
        with contextlib.suppress(JournalCorrupt, JournalUnavailable):
            self.journal.use_up(proof)

    def note_refusal(self, facts: dict[str, Any]) -> None:
        """Notes in the audit that a call was refused before it came here."""
        self._refusals.note(lambda: self.journal, facts)

    def _lead(self, request: ControlRequest, caller: Caller, deadline: float) -> ControlResult:
        """Answers for the key of a flight that this call leads: nobody else in this process works on it."""
        place = request["loopId"], request["idempotencyKey"]
        while True:
            if (entry := self.journal.find(*place)) is None:
                with self._lane(LANE_WAIT) as lane:
                    # Looked up again: another process may have used the key while this call waited.
                    if self.journal.find(*place) is None:
                        entry = self._carry_out(self._new_row(request, caller), lane)
                        break
                continue
            _refuse_another_request(entry, request)
            if entry.state == "done":
                return replayed(entry.result)
            if self._is_abandoned(entry):
                self._finish(entry, LANE_WAIT)
            elif time.monotonic() >= deadline:
                raise ControlBusy(
                    f"key {place[1]!r} is still being worked on; ask again with the same key", retry_after=1.0
                )
            else:
                time.sleep(min(_POLL, max(0.0, deadline - time.monotonic())))
        return entry.result if entry.state == "done" else self._conclude(entry).result

    def _new_row(self, request: ControlRequest, caller: Caller) -> NewRow:
        """The row for a new key; a final one where nothing needs to be run."""
        preconditions.check_age(request, datetime.now(UTC))
        self._files.require_loop(request["loopId"])
        reading = self._read_loop(request["loopId"])
        baseline = take_baseline(reading)
        preconditions.check(request, reading.snapshot, reading.last_event)
        execution_id = uuid.uuid4().hex[:16]
        if preconditions.is_so_already(request, reading.snapshot):
            result = not_needed_result(request, baseline.evidence)
        else:
            by = mark_of(request, caller.proof.issuer if caller.proof else None, execution_id)
            result = executing_result(
                request, build_command(find_runtime(self._runtime), self._files.repo, request, by)
            )
        return NewRow(
            request=request,
            fingerprint=fingerprint(request),
            caller=caller,
            baseline=baseline.document(),
            boot_id=this_boot(),
            execution_id=execution_id,
            owner=self._owner,
            result=result,
        )

    def _carry_out(self, row: NewRow, lane: int) -> Entry:
        """Commits a row and runs its command, under the lane.

        The executor gets the command first, and makes ready while the row is committed; it runs nothing before.
        """
        if row.result["state"] == "done":
            return self._begin(row)
        with self._executions.ready(row.execution_id, row.result["command"], lane) as execution:
            return self._run(self._begin(row), execution, lane)

    def _begin(self, row: NewRow) -> Entry:
        failpoints.hit("before_insert")
        entry = self.journal.begin(row)
        failpoints.hit("recorded")
        return entry

    def _run(self, entry: Entry, execution: Execution, lane: int) -> Entry:
        """Runs the command of a row just begun, under the lane."""
        try:
            outcome = self._executions.run(execution)
        except NotExecuted as error:
            with contextlib.suppress(JournalCorrupt, JournalUnavailable):  # recovery finds it out again
                self.journal.release(entry, error.message)
                self._executions.forget(entry.execution_id)
            raise
        if outcome is None:
            # The lane is left to the command, if that still runs without its executor.
            return self._record(entry, interrupted_result(entry.result))
        try:
            steps = [executed_result(entry.result, outcome)]
            if (final := conclude_unlooked(entry.origin.request, steps[0])) is not None:
                steps.append(final)
            entry = self._record(entry, *steps)
        finally:
            free(lane)  # a child of the command may have it, and the executor for a moment more
        failpoints.hit("finished")
        self._executions.forget(entry.execution_id)
        return entry

    def _conclude(self, entry: Entry, *, waited: float = 0.0) -> Entry:
        """Looks for the effect as asked, and commits the outcome; `waited` seconds of the time are over."""
        final = conclude(entry, read_loop=self._read_loop, log_of=self._log_of, waited=waited)
        entry = self._record(entry, final)
        failpoints.hit("done")
        return entry

    def _recover_one(self, entry: Entry) -> None:
        """Finishes a row in a thread of its own, however long its orphan takes; errors are met again by who asks."""
        place = entry.origin.request["loopId"], entry.origin.request["idempotencyKey"]
        with (
            contextlib.suppress(ControlBusy, JournalCorrupt, JournalUnavailable, InternalError),
            self._flights.join(place, time.monotonic()) as leads,
        ):
            if leads and self._is_abandoned(entry):
                self._finish(entry, ORPHAN_WAIT)

    def _finish(self, entry: Entry, lane_wait: float) -> None:
        """Finishes a row whose process is gone, or frees its key if its command was provably never run."""
        found: Entry | None = entry
        if entry.state == "executing":
            with self._lane(lane_wait):
                found = self.journal.find(entry.origin.request["loopId"], entry.origin.request["idempotencyKey"])
                if found is not None and found.state == "executing":
                    found = self._settle(found)
        if found is not None and found.state == "executed":
            claimed = self.journal.claim(found, self._owner)
            if claimed is not None:
                self._conclude(claimed, waited=max(0.0, time.time() - claimed.updated))

    def _settle(self, entry: Entry) -> Entry | None:
        """Finds out how far a command got, under the lane: so neither it nor its executor runs any more."""
        outcome = self._executions.outcome(entry.execution_id)
        if outcome is not None:
            entry = self._record(entry, executed_result(entry.result, outcome))
        elif not self._executions.was_started(entry.execution_id) and entry.origin.boot_id == this_boot():
            self.journal.release(entry, "the agent ended before the command was started")
            self._executions.forget(entry.execution_id)
            return None
        else:
            if entry.origin.boot_id == this_boot():  # else its pid and start time are another process's, if any's
                self._executions.end_orphan(entry.execution_id, within=0)
            entry = self._record(entry, interrupted_result(entry.result))
        self._executions.forget(entry.execution_id)
        return entry

    def _is_abandoned(self, entry: Entry) -> bool:
        """Whether nobody works on a row any more; asked by who leads its flight."""
        return entry.owner == self._owner or not is_alive(entry.owner.partition("/")[0])

    def _give_up(self, journal: Journal) -> None:
        """Leaves its unfinished rows to nobody: this process may live on, and would be taken to work on them."""
        with contextlib.suppress(JournalCorrupt, JournalUnavailable):
            for entry in journal.unfinished():
                if entry.owner == self._owner:
                    journal.claim(entry, NOBODY)

    def _record(self, entry: Entry, *results: ControlResult) -> Entry:
        for result in results:
            validate("control_result", result)
        try:
            return self.journal.record(entry, *results)
        except (JournalUnavailable, JournalCorrupt) as error:
            key = entry.origin.request["idempotencyKey"]
            raise InternalError(
                f"key {key!r} was executed, but that could not be recorded; ask with the same key"
            ) from error

    @contextlib.contextmanager
    def _lane(self, timeout: float) -> Iterator[int]:
        until = time.monotonic() + timeout
        if not self._turn.acquire(timeout=timeout) if timeout else not self._turn.acquire(blocking=False):
            raise ControlBusy("another command runs in this repo; try again in a second", retry_after=1.0)
        try:
            with self._folder.lane(max(0.0, until - time.monotonic())) as lane:
                yield lane
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._slots.acquire(blocking=False):
            raise ControlBusy(f"{MAX_CONTROLS} controls are being worked on; try again in a second", retry_after=1.0)
        try:
            yield
        finally:
            self._slots.release()


def _refuse_another_request(entry: Entry, request: ControlRequest) -> None:
    """Raises IdempotencyKeyReused unless the row is of the same request."""
    key = request["idempotencyKey"]
    if entry.origin.fingerprint != fingerprint(request):
        raise IdempotencyKeyReused(
            f"key {key!r} belongs to another request ({entry.result['intent']} by"
            f" {entry.result['requestedBy']}); use a new key for a new request",
            details={"idempotencyKey": key, "loopId": request["loopId"]},
        )
