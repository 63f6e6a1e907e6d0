"""The journal's rows: one for each idempotency key, each with a digest of itself.

SQLite notices a damaged page, not a changed byte in a text. A key that reads otherwise
would be a key that was never run, so every row says what it was when it was written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sprite_agent.contract import json_text

if TYPE_CHECKING:
    import sqlite3

    from sprite_agent.contract.envelopes import ControlRequest, ControlResult

SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    """
    CREATE TABLE control (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        loop_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('executing', 'executed', 'done', 'released')),
        execution_id TEXT NOT NULL UNIQUE,
        origin TEXT NOT NULL,
        owner TEXT NOT NULL,
        result TEXT NOT NULL,
        updated REAL NOT NULL,
        digest TEXT NOT NULL,
        UNIQUE (loop_id, idempotency_key)
    ) STRICT
    """,
    "CREATE INDEX control_open ON control (state) WHERE state IN ('executing', 'executed')",
    """
    CREATE TABLE nonce (
        key_id TEXT NOT NULL, nonce TEXT NOT NULL, expires REAL NOT NULL, PRIMARY KEY (key_id, nonce)
    ) STRICT, WITHOUT ROWID
    """,
)

_COLUMNS = "sequence, loop_id, idempotency_key, state, execution_id, origin, owner, result, updated"

Row = tuple[int, str, str, str, str, str, str, str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a row comes from: fixed when it is begun."""

    fingerprint: str
    request: ControlRequest
    caller: dict[str, Any]
    """Who asked, as far as that was proved."""
    boot_id: str
    """The boot of the machine on which its command was to be run."""
    baseline: dict[str, Any]
    """The loop before the command was started; see `evidence.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row: what was asked with a key, and what has become of it."""

    sequence: int
    state: str
    """executing, executed, done; released: its command was never run, and the key is free."""
    execution_id: str
    """Names what is run for it, if anything is."""
    origin: Origin
    owner: str
    """The engine that works on it, or did last."""
    result: ControlResult
    updated: float
    """Unix time."""

    @property
    def mark(self) -> str:
        """What its decision is recorded under."""
        proof = self.origin.caller["proof"]
        return mark_of(self.origin.request, None if proof is None else proof["issuer"], self.execution_id)


def mark_of(request: ControlRequest, issuer: str | None, execution_id: str) -> str:
    """What a decision is recorded under: who asked, who vouches for them, and which execution it was."""
    return f"{request['requestedBy']}{f'@{issuer}' if issuer else ''}#{execution_id}"


def read(tables: sqlite3.Connection, condition: str, *values: object) -> list[Entry]:
    """The rows that meet a condition, oldest first."""
    rows = tables.execute(f"SELECT {_COLUMNS} FROM control WHERE {condition} ORDER BY sequence", values)  # noqa: S608  # constants
    return [_entry(row) for row in rows]


def write(tables: sqlite3.Connection, entry: Entry) -> str:
    """Writes a row, in the place of what stood under its number; gives its digest."""
    row = _row(entry)
    digest = _digest(row)
    tables.execute(
        f"INSERT INTO control ({_COLUMNS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # constants
        " ON CONFLICT (sequence) DO UPDATE SET state = excluded.state, execution_id = excluded.execution_id,"
        " origin = excluded.origin, owner = excluded.owner, result = excluded.result, updated = excluded.updated,"
        " digest = excluded.digest",
        (*row, digest),
    )
    return digest


def next_sequence(tables: sqlite3.Connection) -> int:
    """The number of the next new row: none is ever given twice."""
    row = tables.execute("SELECT seq FROM sqlite_sequence WHERE name = 'control'").fetchone()
    return (row[0] if row else 0) + 1


def prune(tables: sqlite3.Connection, *, before: float, keep: int) -> None:
    """Forgets the oldest rows beyond the newest `keep`: those older than `before`, up to one that is still open."""
    tables.execute(
        "DELETE FROM control WHERE sequence <= (SELECT max(sequence) FROM control) - ?"
        " AND sequence < (SELECT coalesce(min(sequence), 9e18) FROM control"
        "  WHERE state IN ('executing', 'executed') OR updated >= ?)",
        (keep, before),
    )


def find_fault(tables: sqlite3.Connection) -> str | None:
    """What is wrong with the rows, in a few words; None: nothing."""
    expected: int | None = None
    following = next_sequence(tables)
    for *row, digest in tables.execute(f"SELECT {_COLUMNS}, digest FROM control ORDER BY sequence"):  # noqa: S608  # constants
        sequence = row[0]
        if expected is not None and sequence != expected:
            return f"row {expected} is missing"
        if _digest(cast("Row", tuple(row))) != digest:
            return f"row {sequence} was changed"
        expected = sequence + 1
    # The newest rows are always kept: there are none only if none was ever begun.
    if (expected or 1) != following:
        return f"row {expected or following - 1} is missing"
    return None


def _row(entry: Entry) -> Row:
    origin = entry.origin
    document = {
        "fingerprint": origin.fingerprint,
        "request": origin.request,
        "caller": origin.caller,
        "bootId": origin.boot_id,
        "baseline": origin.baseline,
    }
    return (
        entry.sequence,
        origin.request["loopId"],
        origin.request["idempotencyKey"],
        entry.state,
        entry.execution_id,
        json_text.encode(document).decode(),
        entry.owner,
        json_text.encode(entry.result).decode(),
        entry.updated,
    )


def _entry(row: Row) -> Entry:
    sequence, _, _, state, execution_id, origin_text, owner, result, updated = row
    origin = json_text.parse(origin_text)
    return Entry(
        sequence=sequence,
        state=state,
        execution_id=execution_id,
        origin=Origin(
            fingerprint=origin["fingerprint"],
            request=origin["request"],
            caller=origin["caller"],
            boot_id=origin["bootId"],
            baseline=origin["baseline"],
        ),
        owner=owner,
        result=cast("ControlResult", json_text.parse(result)),
        updated=updated,
    )


def _digest(row: Row) -> str:
    return hashlib.sha256(json_text.encode(list(row))).hexdigest()
