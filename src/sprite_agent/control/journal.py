"""The journal: a durable row for each idempotency key, committed before anything is run for it.

SQLite with a rollback journal and EXTRA synchronization: a commit is on the disk when it
returns. Every process that runs control for a repo, the agent or a local manager, uses
the same file. Each change of a row adds an entry to the audit, in the same transaction.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sprite_agent.contract.agent_state import JournalHead
from sprite_agent.control import audit, journal_rows
from sprite_agent.control.journal_file import open_journal, translated
from sprite_agent.control.journal_rows import Entry, Origin
from sprite_agent.errors import IdempotencyKeyReused, JournalCorrupt, JournalUnavailable, SignatureReplayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.callers import Caller, Proof
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from sprite_agent.control.audit import AuditEntry
    from sprite_agent.control.state_folder import StateFolder

RETENTION_SECONDS = 7 * 24 * 3600
"""How long a finished key is kept at least."""
KEPT_ROWS = 10_000
"""So many of the newest keys are kept, however old."""
MOST_PATIENCE = 60.0
"""Seconds to go on trying to record how a command ended: to check a large journal keeps every commit waiting."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRow:
    """What is known of a key before anything is run for it."""

    request: ControlRequest
    fingerprint: str
    caller: Caller
    baseline: dict[str, Any]
    boot_id: str
    execution_id: str
    owner: str
    result: ControlResult


class Journal:
    """An open journal. Lives as long as its process; any thread may call."""

    def __init__(self, folder: StateFolder) -> None:
        """Opens the journal, and makes it where there never was one.

        Raises:
            JournalCorrupt: it is lost, damaged, or not of this version.
            JournalUnavailable: it can't be opened or written.
        """
        # Guards the one connection; never held while a command runs.
        self._lock = threading.RLock()
        self._folder = folder
        self._path = folder.journal
        self._tables, self.id = open_journal(self._path)
        try:
            self._inode = self._path.stat().st_ino
            self._prune()
        except BaseException:
            self._tables.close()
            raise

    def close(self, last: Callable[[], None] = _nothing) -> None:
        """Does what is last to be done, and closes the file; nobody else comes between."""
        with self._lock:
            last()
            self._tables.close()

    def check_place(self) -> None:
        """Returns if rows can be begun.

        Raises:
            JournalCorrupt: the file was exchanged.
            JournalUnavailable: there is no room.
        """
        with translated(self._path):
            self._refuse_another_file()
        self._refuse_without_room()

    def find(self, loop_id: str, key: str) -> Entry | None:
        """The row of a key; None: nothing was run for it, as far as the journal goes back."""
        found = self._read("loop_id = ? AND idempotency_key = ? AND state <> 'released'", loop_id, key)
        return found[0] if found else None

    def find_execution(self, execution_id: str) -> Entry | None:
        """The row whose command bears a mark."""
        found = self._read("execution_id = ? AND state <> 'released'", execution_id)
        return found[0] if found else None

    def unfinished(self) -> list[Entry]:
        """Rows that are not done, oldest first."""
        return self._read("state IN ('executing', 'executed')")

    def head(self) -> JournalHead:
        """How far the journal has got."""
        with self._transaction(write=False) as tables:
            last = audit.head(tables)
        return JournalHead(self.id, last.sequence, last.hash)

    def nonces(self) -> list[tuple[str, str, float]]:
        """(key id, nonce, Unix time until which it counts) of the signatures that controls came with."""
        with self._transaction(write=False) as tables:
            return tables.execute("SELECT key_id, nonce, expires FROM nonce").fetchall()

    def audit_entries(self, *, after: int = 0) -> list[AuditEntry]:
        """The audit entries after number `after`, oldest first."""
        with self._transaction(write=False) as tables:
            return list(audit.entries(tables, after=after))

    def begin(self, new: NewRow) -> Entry:
        """Commits the row of a new key, with its place in the journal in the result.

        Raises:
            IdempotencyKeyReused: the key has a row already.
            SignatureReplayed: the signature it came with was used before.
            JournalCorrupt, JournalUnavailable: it could not be committed, so nothing may be run.
        """
        self._refuse_without_room()
        with self._transaction() as tables:
            place = self._place_of(tables, new.request)
            self._remember(tables, new.caller)
            entry = Entry(
                sequence=place,
                state=new.result["state"],
                execution_id=new.execution_id,
                origin=Origin(
                    fingerprint=new.fingerprint,
                    request=new.request,
                    caller=asdict(new.caller),
                    boot_id=new.boot_id,
                    baseline=new.baseline,
                ),
                owner=new.owner,
                result={**new.result, "journal": {"id": self.id, "sequence": place}},
                updated=time.time(),
            )
            kind = "begun" if entry.state == "executing" else "not_needed"
            self._write(tables, entry, kind, caller=asdict(new.caller), command=new.result["command"])
        return entry

    def record(self, entry: Entry, *results: ControlResult) -> Entry:
        """Commits a row's new results, each the next step: by them it is executed or done.

        All of them or none; each is in the audit. A row that is done is never changed.

        Raises:
            JournalCorrupt, JournalUnavailable
        """

        def change(tables: sqlite3.Connection) -> Entry:
            current = self._current(tables, entry)
            if current.state == "done":
                return current
            for result in results:
                current = replace(current, state=result["state"], result=result, updated=time.time())
                names = ("status", "reason", "effect", "exitCode", "timedOut")
                self._write(tables, current, result["state"], **{name: result[name] for name in names})  # type: ignore[literal-required]  # five of its keys
            return current

        recorded: Entry = self._change_with_ballast(change)
        return recorded

    def release(self, entry: Entry, why: str) -> None:
        """Commits that a row's command was never run: the key is free again.

        Raises:
            JournalCorrupt, JournalUnavailable
        """

        def change(tables: sqlite3.Connection) -> None:
            current = self._current(tables, entry)
            if current.state == "executing":
                self._write(tables, replace(current, state="released", updated=time.time()), "released", why=why)

        self._change_with_ballast(change)

    def claim(self, entry: Entry, owner: str) -> Entry | None:
        """Makes `owner` the one that works on a row; None: somebody else has it by now, or it is done."""
        with self._transaction() as tables:
            current = self._current(tables, entry)
            if current.owner != entry.owner or current.state in {"done", "released"}:
                return None
            claimed = replace(current, owner=owner)
            journal_rows.write(tables, claimed)
            return claimed

    def note(self, kind: str, body: dict[str, Any]) -> None:
        """Adds to the audit what changes no row.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        with self._transaction() as tables:
            audit.append(tables, kind, body)

    def use_up(self, proof: Proof) -> None:
        """Remembers a signature that no row came of, until it would not be taken anyway.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        with self._transaction() as tables:
            _forget_expired(tables)  # not only at the next opening: nothing else limits how many there are
            tables.execute("INSERT OR IGNORE INTO nonce VALUES (?, ?, ?)", _nonce_row(proof))

    def _prune(self) -> None:
        week_ago = time.time() - RETENTION_SECONDS
        with self._transaction() as tables:
            journal_rows.prune(tables, before=week_ago, keep=KEPT_ROWS)
            audit.prune(tables, keep_from=datetime.fromtimestamp(week_ago, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
            _forget_expired(tables)

    def _place_of(self, tables: sqlite3.Connection, request: ControlRequest) -> int:
        """The number for a new row: that of a released row of the key, else the next one."""
        key = request["idempotencyKey"]
        found = journal_rows.read(tables, "loop_id = ? AND idempotency_key = ?", request["loopId"], key)
        if not found:
            return journal_rows.next_sequence(tables)
        if found[0].state != "released":
            raise IdempotencyKeyReused(f"key {key!r} was used already", details={"idempotencyKey": key})
        return found[0].sequence

    def _remember(self, tables: sqlite3.Connection, caller: Caller) -> None:
        if caller.proof is None:
            return
        try:
            tables.execute("INSERT INTO nonce VALUES (?, ?, ?)", _nonce_row(caller.proof))
        except sqlite3.IntegrityError as error:
            raise SignatureReplayed("the signature was used before; sign each attempt anew") from error

    def _current(self, tables: sqlite3.Connection, entry: Entry) -> Entry:
        found = journal_rows.read(tables, "sequence = ?", entry.sequence)
        if not found:
            raise JournalCorrupt(f"journal {self._path} has lost row {entry.sequence}")
        return found[0]

    def _write(self, tables: sqlite3.Connection, entry: Entry, kind: str, **facts: object) -> None:
        digest = journal_rows.write(tables, entry)
        request = entry.origin.request
        body = {
            "loopId": request["loopId"],
            "idempotencyKey": request["idempotencyKey"],
            "intent": request["intent"],
            "requestedBy": request["requestedBy"],
            "traceId": request.get("traceId"),
            "executionId": entry.execution_id,
            "row": {"sequence": entry.sequence, "digest": digest},
            **facts,
        }
        audit.append(tables, kind, body)

    def _read(self, condition: str, *values: object) -> list[Entry]:
        with self._transaction(write=False) as tables:
            return journal_rows.read(tables, condition, *values)

    def _refuse_without_room(self) -> None:
        """Without the ballast the outcome of a command might not be recorded."""
        try:
            self._folder.ensure_ballast()
        except OSError as error:
            raise JournalUnavailable(
                f"there is no room in {self._folder.path} to record what a command does: {error.strerror}"
            ) from error

    def _change_with_ballast(self, change: Callable[[sqlite3.Connection], Any]) -> Any:
        """Commits a change that must not be lost: a full disk is made less full, and a check is let end."""
        until, has_ballast = time.monotonic() + MOST_PATIENCE, True
        while True:
            try:
                with self._transaction() as tables:
                    return change(tables)
            except JournalUnavailable as error:
                code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
                if has_ballast and code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
                    self._folder.drop_ballast()
                    has_ballast = False
                elif code != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                    raise

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock, translated(self._path):
            if write:
                self._refuse_another_file()
            self._tables.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield self._tables
                self._tables.execute("COMMIT")
            except BaseException:
                if self._tables.in_transaction:
                    self._tables.execute("ROLLBACK")
                raise

    def _refuse_another_file(self) -> None:
        """What is written to a file that has lost its name is lost."""
        try:
            same = self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            same = False
        if not same:
            raise JournalCorrupt(f"journal {self._path} was exchanged while it was open; restart what uses it")


def _forget_expired(tables: sqlite3.Connection) -> None:
    tables.execute("DELETE FROM nonce WHERE expires < ?", (time.time(),))


def _nonce_row(proof: Proof) -> tuple[str, str, float]:
    return proof.key_id, proof.nonce, proof.expires
