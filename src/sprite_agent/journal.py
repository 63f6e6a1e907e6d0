"""The journal: a durable row for each idempotency key, committed before anything is run for it.

SQLite with a rollback journal and EXTRA synchronization: a commit is on the disk when it
returns. Every process that runs control for a repo, the agent or a local manager, uses
the same file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sprite_agent.contract import json_text
from sprite_agent.errors import ContractError, IdempotencyKeyReused, JournalCorrupt, JournalUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlRequest, ControlResult

RETENTION_SECONDS = 7 * 24 * 3600
"""How long a finished key is kept."""

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE control (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    loop_id TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('executing', 'executed', 'done')),
    owner TEXT NOT NULL,
    request TEXT NOT NULL,
    result TEXT NOT NULL,
    updated REAL NOT NULL,
    UNIQUE (loop_id, idempotency_key)
) STRICT;
CREATE INDEX control_open ON control (state) WHERE state <> 'done';
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row: what was asked with a key, and what has become of it."""

    sequence: int
    fingerprint: str
    owner: str
    """The process that ran it; see `processes.py`."""
    result: ControlResult


class Journal:
    """An open journal. Lives as long as its process; any thread may call."""

    def __init__(self, path: Path) -> None:
        """Opens the journal, and makes it where there is none.

        Raises:
            JournalCorrupt: the file is damaged, or not a journal of this version.
            JournalUnavailable: it can't be opened or written.
        """
        # Guards the one connection; never held while a command runs.
        self._lock = threading.Lock()
        with _translated(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
            self._path = path
            self._connection.execute("PRAGMA synchronous = EXTRA")
            self._connection.execute("PRAGMA trusted_schema = OFF")
            with self._transaction() as tables:
                if tables.execute("PRAGMA user_version").fetchone()[0] == 0:
                    for statement in _SCHEMA.split(";"):
                        tables.execute(statement)
                    tables.execute("INSERT INTO meta VALUES ('journal_id', ?)", (str(uuid.uuid4()),))
                    tables.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                version = tables.execute("PRAGMA user_version").fetchone()[0]
                if version != _SCHEMA_VERSION:
                    raise JournalCorrupt(f"journal {path} has version {version}, this is for {_SCHEMA_VERSION}")
                self.id: str = tables.execute("SELECT value FROM meta WHERE key = 'journal_id'").fetchone()[0]
                tables.execute(
                    "DELETE FROM control WHERE state = 'done' AND updated < ?", (time.time() - RETENTION_SECONDS,)
                )

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def find(self, loop_id: str, key: str) -> Entry | None:
        """The row of a key."""
        with self._transaction(write=False) as tables:
            row = tables.execute(
                "SELECT sequence, fingerprint, owner, result FROM control WHERE loop_id = ? AND idempotency_key = ?",
                (loop_id, key),
            ).fetchone()
            return None if row is None else _entry(row)

    def unfinished(self) -> list[Entry]:
        """Rows that are not done, oldest first."""
        with self._transaction(write=False) as tables:
            rows = tables.execute(
                "SELECT sequence, fingerprint, owner, result FROM control WHERE state <> 'done' ORDER BY sequence"
            ).fetchall()
            return [_entry(row) for row in rows]

    def begin(self, request: ControlRequest, fingerprint: str, owner: str, result: ControlResult) -> ControlResult:
        """Commits the row of a new key, and gives back `result` with its place in the journal.

        Raises:
            IdempotencyKeyReused: the key has a row already.
            JournalUnavailable: it could not be committed, so nothing may be run.
        """
        with self._transaction() as tables:
            try:
                cursor = tables.execute(
                    "INSERT INTO control"
                    " (loop_id, idempotency_key, fingerprint, state, owner, request, result, updated)"
                    " VALUES (?, ?, ?, ?, ?, ?, '{}', ?)",
                    (
                        request["loopId"],
                        request["idempotencyKey"],
                        fingerprint,
                        result["state"],
                        owner,
                        json_text.encode(request).decode(),
                        time.time(),
                    ),
                )
            except sqlite3.IntegrityError as error:
                raise IdempotencyKeyReused(f"key {request['idempotencyKey']!r} was used already") from error
            placed: ControlResult = {**result, "journal": {"id": self.id, "sequence": cursor.lastrowid or 0}}
            _write(tables, placed)
        return placed

    def record(self, result: ControlResult) -> None:
        """Commits a row's new result. A row that is done is never changed.

        Raises:
            JournalUnavailable
        """
        with self._transaction() as tables:
            _write(tables, result)

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _write(tables: sqlite3.Connection, result: ControlResult) -> None:
    tables.execute(
        "UPDATE control SET state = ?, result = ?, updated = ?"
        " WHERE sequence = ? AND (state <> 'done' OR result = '{}')",
        (result["state"], json_text.encode(result).decode(), time.time(), result["journal"]["sequence"]),
    )


def _entry(row: tuple[int, str, str, str]) -> Entry:
    sequence, fingerprint, owner, result = row
    return Entry(
        sequence=sequence,
        fingerprint=fingerprint,
        owner=owner,
        result=cast("ControlResult", json_text.parse(result)),
    )


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # no such table
            raise JournalCorrupt(f"journal {path} is damaged: {error}") from error
        raise JournalUnavailable(f"journal {path}: {error}") from error
    except (sqlite3.DatabaseError, ContractError) as error:
        raise JournalCorrupt(f"journal {path} is damaged: {error}") from error
    except OSError as error:
        raise JournalUnavailable(f"journal {path}: {error.strerror}") from error
