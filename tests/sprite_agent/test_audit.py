"""The audit is a chain: whoever changes, takes out or adds an entry breaks it where it was done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from typing import TYPE_CHECKING

import pytest

from sprite_agent.contract import clock
from sprite_agent.control import audit
from sprite_agent.control.audit import AuditHead, Break, append, entries, find_break, head, prune

if TYPE_CHECKING:
    from collections.abc import Iterator

NOTHING = "0" * 64


@pytest.fixture
def tables() -> Iterator[sqlite3.Connection]:
    """An empty audit."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as tables:
        tables.execute(audit.SCHEMA)
        yield tables


@pytest.fixture
def five(tables: sqlite3.Connection) -> sqlite3.Connection:
    """An audit of five entries."""
    for number in range(1, 6):
        append(tables, "begun", {"number": number})
    return tables


def broken(tables: sqlite3.Connection) -> Break | None:
    """Where the chain is broken."""
    return find_break(entries(tables))


def test_an_audit_without_entries_has_a_head_that_says_so(tables: sqlite3.Connection) -> None:
    assert head(tables) == AuditHead(sequence=0, hash=NOTHING)
    assert broken(tables) is None


def test_each_entry_has_the_hash_of_the_one_before_and_the_last_one_is_the_head(five: sqlite3.Connection) -> None:
    found = list(entries(five))

    assert [entry.sequence for entry in found] == [1, 2, 3, 4, 5]
    assert [entry.previous for entry in found] == [NOTHING, *(entry.hash for entry in found[:-1])]
    assert len({entry.hash for entry in found}) == 5
    assert head(five) == AuditHead(sequence=5, hash=found[-1].hash)
    assert broken(five) is None


def test_a_hash_can_be_computed_by_anybody(five: sqlite3.Connection) -> None:
    """SHA-256 of the compact JSON of what stands in the entry, the hash of the one before at its head."""
    for entry in entries(five):
        content = [entry.previous, entry.sequence, entry.at, entry.kind, entry.body]
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        assert entry.hash == hashlib.sha256(text.encode()).hexdigest()


def test_what_is_appended_is_the_new_head(five: sqlite3.Connection) -> None:
    assert append(five, "done", {}) == head(five) == AuditHead(sequence=6, hash=list(entries(five))[-1].hash)


def test_an_entry_is_read_as_it_was_written(tables: sqlite3.Connection) -> None:
    append(tables, "refused", {"reason": "RUN_MISMATCH", "note": "é 日本"})

    (entry,) = entries(tables)

    assert entry.document == {
        "sequence": 1,
        "at": entry.at,
        "kind": "refused",
        "body": {"reason": "RUN_MISMATCH", "note": "é 日本"},
        "previous": NOTHING,
        "hash": entry.hash,
    }


def test_entries_after_a_number_are_the_later_ones(five: sqlite3.Connection) -> None:
    assert [entry.sequence for entry in entries(five, after=3)] == [4, 5]
    assert list(entries(five, after=5)) == []


CHANGED = "it was changed: its hash is not the one of its content"


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE audit SET body = '{}' WHERE sequence = 3", Break(sequence=3, what=CHANGED)),
        ("UPDATE audit SET kind = 'done' WHERE sequence = 1", Break(sequence=1, what=CHANGED)),
        ("UPDATE audit SET at = '2026-01-02T03:04:05Z' WHERE sequence = 5", Break(sequence=5, what=CHANGED)),
        ("UPDATE audit SET hash = previous WHERE sequence = 3", Break(sequence=3, what=CHANGED)),
        (
            "UPDATE audit SET previous = hash WHERE sequence = 3",
            Break(sequence=3, what="it does not follow entry 2 as that reads now"),
        ),
        ("DELETE FROM audit WHERE sequence = 3", Break(sequence=4, what="the entries after 2 are missing")),
        ("DELETE FROM audit WHERE sequence IN (2, 3, 4)", Break(sequence=5, what="the entries after 1 are missing")),
        ("UPDATE audit SET sequence = 7 WHERE sequence = 5", Break(sequence=7, what="the entries after 4 are missing")),
        (
            "UPDATE audit SET previous = hash WHERE sequence = 1",
            Break(sequence=1, what="it is the first entry and names one before it"),
        ),
    ],
)
def test_what_was_done_to_an_entry_is_found_at_that_entry(
    five: sqlite3.Connection, statement: str, found: Break
) -> None:
    five.execute(statement)

    assert broken(five) == found


def test_an_entry_that_was_changed_together_with_its_hash_is_found_at_the_next(five: sqlite3.Connection) -> None:
    forged = sqlite3.connect(":memory:", isolation_level=None)
    forged.execute(audit.SCHEMA)
    for number in (1, 2, 33):
        append(forged, "begun", {"number": number})
    five.execute("DELETE FROM audit WHERE sequence <= 3")
    five.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", forged.execute("SELECT * FROM audit").fetchall())
    forged.close()

    assert broken(five) == Break(sequence=4, what="it does not follow entry 3 as that reads now")


def test_who_has_kept_a_head_sees_that_all_of_it_was_written_anew(five: sqlite3.Connection) -> None:
    kept = head(five)
    five.execute("DELETE FROM audit")
    for number in range(1, 6):
        append(five, "begun", {"number": -number})

    assert broken(five) is None
    assert head(five).sequence == kept.sequence
    assert head(five).hash != kept.hash


def test_what_was_before_the_first_entry_is_taken_as_given(five: sqlite3.Connection) -> None:
    five.execute("DELETE FROM audit WHERE sequence <= 2")

    assert broken(five) is None
    assert find_break(entries(five, after=4)) is None


@pytest.mark.parametrize(
    ("most", "keep_from", "kept"),
    [
        (2, "2999-01-01T00:00:00Z", [4, 5]),
        (4, "2999-01-01T00:00:00Z", [2, 3, 4, 5]),
        (100, "2999-01-01T00:00:00Z", [1, 2, 3, 4, 5]),
        (2, "2000-01-01T00:00:00Z", [1, 2, 3, 4, 5]),
    ],
)
def test_the_oldest_entries_are_forgotten_when_there_are_too_many_and_they_are_old_enough(
    five: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, most: int, keep_from: str, kept: list[int]
) -> None:
    monkeypatch.setattr(audit, "MAX_ENTRIES", most)
    before = head(five)

    prune(five, keep_from=keep_from)

    assert [entry.sequence for entry in entries(five)] == kept
    assert head(five) == before
    assert broken(five) is None
    assert append(five, "done", {}).sequence == 6


def test_a_clock_that_was_wrong_for_a_while_makes_no_gap(
    tables: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I15: an entry from the future keeps those after it."""
    for at in ("2026-01-01", "2026-01-02", "2036-01-03", "2026-01-04", "2026-01-05"):
        monkeypatch.setattr(clock, "now", lambda at=at: f"{at}T00:00:00Z")
        append(tables, "begun", {})
    monkeypatch.setattr(audit, "MAX_ENTRIES", 1)

    prune(tables, keep_from="2030-01-01T00:00:00Z")

    assert [entry.sequence for entry in entries(tables)] == [3, 4, 5]
    assert broken(tables) is None
