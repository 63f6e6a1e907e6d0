"""The audit: an append-only chain of entries in the journal, each carrying the hash of the one before.

Who changes or takes out an entry changes every hash after it, and the newest one goes out
in every reply: whoever kept one of those can tell.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sprite_agent.contract import clock, json_text

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator

MAX_ENTRIES = 100_000
"""More are kept only as long as the keys they tell of."""

SCHEMA = """
CREATE TABLE audit (
    sequence INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT
"""

_COLUMNS = "sequence, at, kind, body, previous, hash"
_NOTHING = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """One entry, as it was written."""

    sequence: int
    at: str
    """RFC 3339, UTC, whole seconds."""
    kind: str
    body: str
    """JSON text of an object."""
    previous: str
    """Hash of the entry before."""
    hash: str

    @property
    def document(self) -> dict[str, Any]:
        """The entry as one JSON object; a body that somebody made no JSON is there as its text."""
        body, fault = json_text.attempt(self.body)
        return {
            "sequence": self.sequence,
            "at": self.at,
            "kind": self.kind,
            "body": self.body if fault else body,
            "previous": self.previous,
            "hash": self.hash,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditHead:
    """How far an audit has got."""

    sequence: int = 0
    hash: str = _NOTHING


@dataclass(frozen=True, kw_only=True, slots=True)
class Break:
    """Where a chain is broken."""

    sequence: int
    """Of the first entry that does not fit."""
    what: str


def append(tables: sqlite3.Connection, kind: str, body: dict[str, Any]) -> AuditHead:
    """Adds an entry in the caller's transaction."""
    last = head(tables)
    sequence, at, text = last.sequence + 1, clock.now(), json_text.encode(body).decode()
    digest = _hash(last.hash, sequence, at, kind, text)
    tables.execute(
        f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608  # a constant
        (sequence, at, kind, text, last.hash, digest),
    )
    return AuditHead(sequence=sequence, hash=digest)


def head(tables: sqlite3.Connection) -> AuditHead:
    """How far the audit has got."""
    row = tables.execute("SELECT sequence, hash FROM audit ORDER BY sequence DESC LIMIT 1").fetchone()
    return AuditHead(sequence=row[0], hash=row[1]) if row else AuditHead()


def entries(tables: sqlite3.Connection, *, after: int = 0) -> Iterator[AuditEntry]:
    """The entries after number `after`, oldest first."""
    rows = tables.execute(f"SELECT {_COLUMNS} FROM audit WHERE sequence > ? ORDER BY sequence", (after,))  # noqa: S608  # likewise
    for sequence, at, kind, body, previous, digest in rows:
        yield AuditEntry(sequence=sequence, at=at, kind=kind, body=body, previous=previous, hash=digest)


def prune(tables: sqlite3.Connection, *, keep_from: str) -> None:
    """Forgets the oldest of more than `MAX_ENTRIES` entries, up to one not older than `keep_from` (RFC 3339)."""
    tables.execute(
        "DELETE FROM audit WHERE sequence <= (SELECT max(sequence) FROM audit) - ?"
        " AND sequence < (SELECT coalesce(min(sequence), 9e18) FROM audit WHERE at >= ?)",
        (MAX_ENTRIES, keep_from),
    )


def find_break(chain: Iterable[AuditEntry]) -> Break | None:
    """Where a chain is broken first; None: nowhere. What comes before its first entry is taken as given."""
    last: AuditEntry | None = None
    for entry in chain:
        if last is not None and entry.sequence != last.sequence + 1:
            return Break(sequence=entry.sequence, what=f"the entries after {last.sequence} are missing")
        if last is None and entry.sequence == 1 and entry.previous != _NOTHING:
            return Break(sequence=1, what="it is the first entry and names one before it")
        if last is not None and entry.previous != last.hash:
            return Break(sequence=entry.sequence, what=f"it does not follow entry {last.sequence} as that reads now")
        if _hash(entry.previous, entry.sequence, entry.at, entry.kind, entry.body) != entry.hash:
            return Break(sequence=entry.sequence, what="it was changed: its hash is not the one of its content")
        last = entry
    return None


def _hash(previous: str, *content: int | str) -> str:
    return hashlib.sha256(json_text.encode([previous, *content])).hexdigest()
