"""The journal's file: made whole or not at all, checked when it is opened, and put aside when it can't be trusted.

Beside it stands a file with its id: a journal that was lost, emptied or exchanged is not
taken for a new one, by which every key could be run again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import uuid
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import quote

from sprite_agent.contract.secrets import changing, replace_guarded
from sprite_agent.control import audit, journal_rows
from sprite_agent.control.durability import sync
from sprite_agent.errors import ContractError, JournalCorrupt, JournalUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sprite_agent.control.audit import AuditEntry

VERSION = 2
BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process's transaction."""

_KEPT_BYTES = 1024 * 1024
"""Of SQLite's own journal between commits; a control takes some dozen pages of it."""
_AUDITED_AT_OPENING = 1_000
"""So many of the newest audit entries are checked whenever a journal is opened; `check` looks at all."""


def open_journal(path: Path) -> tuple[sqlite3.Connection, str]:
    """A connection to the journal at `path` and its id; makes one where there never was one.

    Raises:
        JournalCorrupt: it is lost, damaged, or not of this version.
        JournalUnavailable: it can't be opened or written.
    """
    with translated(path):
        if _is_lost(path):
            raise JournalCorrupt(
                f"journal {path} is gone: put it back, or begin another one with 'sprite-agent journal reset'"
            )
        if not path.exists():
            _make(path)
        tables = _connect(path)
        try:
            # Kept between commits, with its room on the disk: making and removing it takes two flushes of the folder.
            tables.execute("PRAGMA journal_mode = PERSIST")
            tables.execute(f"PRAGMA journal_size_limit = {_KEPT_BYTES}")
            journal_id = _checked(path, tables)
        except BaseException:
            tables.close()
            raise
    return tables, journal_id


def find_faults(path: Path) -> list[str]:
    """What is wrong with the journal at `path`, in one sentence each; empty: nothing.

    Raises:
        JournalUnavailable: it can't be opened.
    """
    try:
        with translated(path):
            if _is_lost(path):
                return [f"journal {path} is gone"]
            if not path.exists():
                return []
            with contextlib.closing(_connect(path)) as tables:
                _checked(path, tables)
                broken = audit.find_break(audit.entries(tables))
    except JournalCorrupt as error:
        return [error.message]
    return [f"audit entry {broken.sequence}: {broken.what}"] if broken else []


def read_audit(path: Path) -> list[AuditEntry]:
    """Every audit entry in the journal at `path`, oldest first; nothing of it is verified.

    Raises:
        JournalCorrupt: it is gone, or can't be read.
        JournalUnavailable: it can't be opened.
    """
    with translated(path):
        if _is_lost(path):
            raise JournalCorrupt(f"journal {path} is gone")
        if not path.exists():
            return []
        with contextlib.closing(_connect(path)) as tables:
            return list(audit.entries(tables))


def put_aside(path: Path) -> Path | None:
    """Renames the journal, so that the next one to open it makes another; gives its new place.

    Nobody may have it open.

    Raises:
        JournalUnavailable: it can't be renamed.
    """
    kept = path.with_name(f"{path.stem}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:4]}")
    with translated(path):
        for suffix in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(kept.with_name(f"{kept.name}{path.suffix}{suffix}"))
        _marker(path).unlink(missing_ok=True)
        sync(path.parent)
    aside = kept.with_name(f"{kept.name}{path.suffix}")
    return aside if aside.exists() else None


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raises what goes wrong with the journal at `path` as the agent's errors."""
    try:
        yield
    except sqlite3.OperationalError as error:
        # No such table, or (without a code) a text that is none.
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR:
            raise JournalCorrupt(_damaged(path, error)) from error
        raise JournalUnavailable(f"journal {path}: {error}") from error
    except (sqlite3.DatabaseError, ContractError, UnicodeDecodeError) as error:  # SQLite's text may quote the damage
        raise JournalCorrupt(_damaged(path, error)) from error
    except OSError as error:
        raise JournalUnavailable(f"journal {path}: {error.strerror}") from error


def _damaged(path: Path, what: object) -> str:
    return f"journal {path} is damaged: {what}; look at it with 'sprite-agent journal check'"


def _connect(path: Path) -> sqlite3.Connection:
    # Never makes the file: it may have been put aside since somebody looked.
    place = f"file:{quote(os.fsencode(path.absolute()))}?mode=rw"
    tables = sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT)
    try:
        for pragma in ("synchronous = EXTRA", "trusted_schema = OFF", "cell_size_check = ON"):
            tables.execute(f"PRAGMA {pragma}")
    except BaseException:
        tables.close()
        raise
    return tables


def _is_lost(path: Path) -> bool:
    """Whether there was a journal at `path` and there is none any more."""
    # In this order: another process may be making both, the journal before its marker.
    return _marker(path).exists() and not path.exists()


def _make(path: Path) -> None:
    """Makes a journal beside its place, and moves it there in one step unless another process was quicker."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.closing(_connect(draft)) as tables:
            tables.execute("BEGIN IMMEDIATE")
            for statement in (*journal_rows.SCHEMA, audit.SCHEMA):
                tables.execute(statement)
            tables.execute("INSERT INTO meta VALUES ('journal_id', ?)", (str(uuid.uuid4()),))
            tables.execute(f"PRAGMA user_version = {VERSION}")
            tables.execute("COMMIT")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _checked(path: Path, tables: sqlite3.Connection) -> str:
    """The journal's id, if it is whole."""
    version = tables.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        raise JournalCorrupt(f"journal {path} has version {version}, this is for {VERSION}")
    tables.execute("BEGIN")
    try:
        if (found := tables.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise JournalCorrupt(_damaged(path, found))
        if (fault := journal_rows.find_fault(tables)) is not None:
            raise JournalCorrupt(_damaged(path, fault))
        last = audit.head(tables).sequence
        newest = islice(audit.entries(tables, after=max(0, last - _AUDITED_AT_OPENING)), _AUDITED_AT_OPENING)
        if (broken := audit.find_break(newest)) is not None:
            raise JournalCorrupt(_damaged(path, f"audit entry {broken.sequence}: {broken.what}"))
        named = tables.execute("SELECT value FROM meta WHERE key = 'journal_id'").fetchone()
        if named is None:
            raise JournalCorrupt(_damaged(path, "it has no id"))
    finally:
        tables.execute("ROLLBACK")
    _check_marker(path, named[0])
    return str(named[0])


def _check_marker(path: Path, journal_id: str) -> None:
    marker = _marker(path)
    if not marker.exists():  # the first one to open it: making it ends with this
        with changing(marker):
            replace_guarded(marker, f"{journal_id}\n".encode())
    expected = marker.read_text().strip()
    if expected != journal_id:
        raise JournalCorrupt(f"journal {path} is another one: its id is {journal_id}, {marker.name} has {expected}")


def _marker(path: Path) -> Path:
    return path.with_name("journal.id")
