"""A model of the journal, and of an engine that uses it as the real one does and is killed at any moment."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sprite_agent.callers import THIS_USER
from sprite_agent.contract.requests import fingerprint
from sprite_agent.control import audit
from sprite_agent.control.executions import CommandOutcome
from sprite_agent.control.journal import Journal, NewRow
from sprite_agent.control.results import executed_result, executing_result, interrupted_result, skipped_result
from sprite_agent.control.state_folder import StateFolder
from support.repos import LOOP
from support.runtime import SKIPS, request

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from sprite_agent.control.journal_rows import Entry

MEMORY = Path("/dev/shm")  # noqa: S108  # syncing costs nothing there; what a crash of the machine leaves is not asked here
KEYS = st.sampled_from(["key-1", "key-2", "key-3"])
KILLED = st.sampled_from([None, "begun", "started", "ran", "executed"])
"""After which step the engine is killed; None: not at all."""
END = CommandOutcome(exit_code=7, timed_out=False, output="")


class JournalMachine(RuleBasedStateMachine):
    """Uses one journal for three keys; what it must hold is known from what was done."""

    def __init__(self) -> None:
        super().__init__()
        self._place = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        (self._place / "repo").mkdir()
        self._folder = StateFolder(self._place / "state", self._place / "repo")
        self._folder.make()
        self._journal = Journal(self._folder)
        self._started: set[str] = set()
        """Executions that have left their mark: those that have, or may have, run."""
        self._ended: dict[str, CommandOutcome] = {}
        """What executors have recorded."""
        self._runs: dict[str, int] = {}
        """How often a key's command was run, or may have been."""
        self._answers: dict[str, ControlResult] = {}
        """What was answered for a key, which must stay so."""
        self._begun: dict[str, Entry] = {}
        """The rows as they were when their commands were started."""
        self._head = self._journal.head()

    def teardown(self) -> None:
        """Removes everything."""
        self._journal.close()
        shutil.rmtree(self._place)

    # What the engine does.

    @rule(key=KEYS, killed=KILLED)
    def ask(self, key: str, killed: str | None) -> None:
        """Asks for a key, as a caller does; the engine may be killed on the way."""
        entry = self._journal.find(LOOP, key)
        if entry is not None and entry.state == "done":
            self._answer(key, entry.result)
            return
        if entry is not None:
            return  # recovery comes first
        with contextlib.suppress(_Killed):
            self._answer(key, self._run(key, killed))
            return
        self._reopen()

    def _run(self, key: str, killed: str | None) -> ControlResult:
        entry = self._begin(key)
        _end_if(killed == "begun")
        self._begun[key] = entry
        self._started.add(entry.execution_id)
        self._runs[key] = self._runs.get(key, 0) + 1
        _end_if(killed == "started")
        self._ended[entry.execution_id] = END
        _end_if(killed == "ran")
        entry = self._journal.record(entry, executed_result(entry.result, END))
        _end_if(killed == "executed")
        return self._journal.record(entry, skipped_result(entry.result)).result

    @rule(killed=st.booleans())
    def recover(self, *, killed: bool) -> None:
        """Finishes what is unfinished, by the rules of recovery, unless it is killed over the first row."""
        for entry in self._journal.unfinished():
            settled = self._settle(entry) if entry.state == "executing" else entry
            if settled is not None:
                claimed = self._journal.claim(settled, uuid.uuid4().hex)
                assert claimed is not None
                if killed:
                    self._reopen()
                    return
                self._journal.record(claimed, skipped_result(claimed.result))
        assert self._journal.unfinished() == []

    def _settle(self, entry: Entry) -> Entry | None:
        outcome = self._ended.get(entry.execution_id)
        if outcome is not None:
            return self._journal.record(entry, executed_result(entry.result, outcome))
        if entry.execution_id in self._started:
            return self._journal.record(entry, interrupted_result(entry.result))
        self._journal.release(entry, "it was never started")
        return None

    @rule(key=KEYS)
    def record_late(self, key: str) -> None:
        """One that was thought to be dead records what it knows of a key that was answered meanwhile."""
        if key in self._answers:
            stale = self._begun[key]
            recorded = self._journal.record(stale, interrupted_result(stale.result))
            assert recorded.result == self._answers[key]

    # What happens to it.

    @rule(key=KEYS)
    def crash_in_a_commit(self, key: str) -> None:
        """The process ends while a transaction is open: another one finds the files as they are then."""
        if self._journal.find(LOOP, key) is None:
            copy = self._place / uuid.uuid4().hex
            with contextlib.suppress(_Killed), self._journal._transaction() as tables:  # noqa: SLF001  # a crash knows no privacy
                tables.execute("PRAGMA cache_size = 1")  # so that some of it is in the file already
                before = self._folder.journal.read_bytes()
                for number in range(10):
                    audit.append(tables, "lost", {"number": number, "text": "x" * 4_000})
                shutil.copytree(self._folder.path, copy)
                assert self._folder.journal.read_bytes() != before
                raise _Killed
            self._journal.close()
            shutil.rmtree(self._folder.path)
            copy.rename(self._folder.path)
            self._journal = Journal(self._folder)

    @rule()
    def crash(self) -> None:
        """The process ends and another one opens the journal."""
        self._reopen()

    @rule()
    def note(self) -> None:
        """Something that changes no row is added to the audit."""
        self._journal.note("refused", {"reason": "TEST"})

    # What must hold.

    @invariant()
    def runs_nothing_twice(self) -> None:
        """At most once, and what was answered stays so."""
        assert all(count <= 1 for count in self._runs.values()), self._runs
        for key, answer in self._answers.items():
            entry = self._journal.find(LOOP, key)
            assert entry is not None, f"the answer of {key} was forgotten"
            assert entry.result == answer

    @invariant()
    def goes_forward(self) -> None:
        """The audit only grows, its chain is whole, and no number of a row is missing."""
        head = self._journal.head()
        assert head.id == self._head.id
        assert head.sequence >= self._head.sequence
        entries = self._journal.audit_entries(after=max(0, self._head.sequence - 1))
        assert audit.find_break(entries) is None
        assert self._head.sequence == 0 or entries[0].hash == self._head.head
        assert not any(entry.kind == "lost" for entry in entries)
        self._head = head

    def _begin(self, key: str) -> Entry:
        document = cast("ControlRequest", request(idempotencyKey=key, confirmation=SKIPS))
        return self._journal.begin(
            NewRow(
                request=document,
                fingerprint=fingerprint(document),
                caller=THIS_USER,
                baseline={},
                boot_id="boot",
                execution_id=uuid.uuid4().hex,
                owner="engine",
                result=executing_result(document, ["superloop"]),
            )
        )

    def _answer(self, key: str, result: Any) -> None:
        assert self._answers.setdefault(key, result) == result, f"two answers for {key}"

    def _reopen(self) -> None:
        self._journal.close()
        self._journal = Journal(self._folder)


class _Killed(Exception):
    """The engine ends here."""


def _end_if(killed: bool) -> None:  # noqa: FBT001  # a condition
    if killed:
        raise _Killed
