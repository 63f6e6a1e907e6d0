"""The journal keeps a durable row for each key, and adds to its audit whatever changes one."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.callers import Caller, Proof
from sprite_agent.contract.requests import fingerprint
from sprite_agent.control import journal_file
from sprite_agent.control.audit import find_break
from sprite_agent.control.journal import KEPT_ROWS, RETENTION_SECONDS
from sprite_agent.control.journal_file import open_journal
from sprite_agent.control.processes import this_boot
from sprite_agent.control.results import interrupted_result
from sprite_agent.errors import IdempotencyKeyReused, JournalCorrupt, SignatureReplayed
from support.journals import begun, new_row, opened, sql
from support.repos import LOOP

if TYPE_CHECKING:
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.control.journal_rows import Entry

DAY = 24 * 3600


@pytest.fixture
def path(state: Path) -> Path:
    return state / "journal.sqlite3"


def executed(entry: Entry) -> ControlResult:
    """The result of a row whose command has ended."""
    return {**entry.result, "state": "executed", "executed": True, "exitCode": 0}


def done(entry: Entry) -> ControlResult:
    """The final result of a row."""
    return {**executed(entry), "state": "done", "status": "confirmed"}


# Rows.


def test_a_row_is_there_for_every_other_connection_as_soon_as_it_is_begun(state: Path) -> None:
    """I3: before anything is run for it."""
    with opened(state) as first, opened(state) as second:
        entry = begun(first)

        assert second.find(LOOP, "key-1") == entry
        assert second.unfinished() == [entry]


def test_a_row_keeps_where_it_comes_from(state: Path) -> None:
    """I14: the request as it was made, who asked as far as that was proved, and what the loop was like before."""
    proof = Proof(issuer="ops-1", key_id="k-1", actor="ada", nonce="n-1", expires=time.time() + 60)
    caller = Caller(identity="ops-1", address="unix:", proof=proof)
    row = new_row(
        caller=caller, owner="x:1:1/00000000", execution_id="e" * 16, traceId="trace-1", provenance={"managerId": "m"}
    )

    with opened(state) as first:
        first.begin(row)
    with opened(state) as later:
        entry = later.find(LOOP, "key-1")

    assert entry is not None
    assert (entry.sequence, entry.state, entry.execution_id, entry.owner) == (
        1,
        "executing",
        "e" * 16,
        "x:1:1/00000000",
    )
    assert entry.origin.request == row.request
    assert entry.origin.fingerprint == fingerprint(row.request)
    assert entry.origin.boot_id == this_boot()
    assert entry.origin.baseline == row.baseline
    assert entry.origin.caller == {
        "identity": "ops-1",
        "address": "unix:",
        "proof": {"issuer": "ops-1", "key_id": "k-1", "actor": "ada", "nonce": "n-1", "expires": proof.expires},
    }
    assert entry.updated == pytest.approx(time.time(), abs=60)


def test_rows_are_numbered_one_after_the_other_in_a_journal_with_a_name(state: Path) -> None:
    with opened(state) as first:
        places = [begun(first, f"key-{number}").result["journal"] for number in range(3)]

        assert [place["sequence"] for place in places] == [1, 2, 3]
        assert {place["id"] for place in places} == {first.id}
    uuid.UUID(first.id)
    with opened(state) as later:
        assert later.id == first.id
        assert begun(later, "key-3").sequence == 4


def test_another_journal_has_another_name(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as first, opened(tmp_path / "b") as second:
        assert first.id != second.id


def test_a_key_has_one_row_whoever_asks(state: Path) -> None:
    """I2: and no row is lost to another one."""
    with opened(state) as first, opened(state) as second:
        begun(first)

        with pytest.raises(IdempotencyKeyReused):
            begun(second)
        assert begun(second, "key-2").sequence == 2
        assert [entry.sequence for entry in first.unfinished()] == [1, 2]


def test_a_key_is_scoped_by_its_loop(state: Path) -> None:
    with opened(state) as journal:
        begun(journal)

        assert journal.find("other", "key-1") is None


def test_a_row_is_found_by_its_execution(state: Path) -> None:
    with opened(state) as journal:
        entry = begun(journal)
        begun(journal, "key-2")

        assert journal.find_execution(entry.execution_id) == entry
        assert journal.find_execution("0" * 16) is None


def test_a_key_is_looked_up_in_an_index_however_many_there_are(state: Path, path: Path) -> None:
    """I8: no file is read and written whole for each control."""
    with opened(state):
        pass

    (plan,) = sql(
        path, "EXPLAIN QUERY PLAN SELECT * FROM control WHERE loop_id = ? AND idempotency_key = ?", LOOP, "key-1"
    )

    assert plan[-1] == "SEARCH control USING INDEX sqlite_autoindex_control_2 (loop_id=? AND idempotency_key=?)"


def test_a_row_that_is_done_is_never_changed(state: Path) -> None:
    with opened(state) as journal:
        entry = begun(journal)
        final = journal.record(entry, done(entry))

        assert journal.record(entry, executed(entry)) == final
        assert journal.record(entry, {**done(entry), "status": "ambiguous"}) == final
        journal.release(entry, "why")

        assert journal.find(LOOP, "key-1") == final
        assert (final.state, final.result["status"]) == ("done", "confirmed")


def test_rows_that_are_not_done_are_unfinished_oldest_first(state: Path) -> None:
    with opened(state) as journal:
        entries = [begun(journal, f"key-{number}") for number in range(5)]
        journal.record(entries[1], done(entries[1]))
        journal.record(entries[2], executed(entries[2]))
        journal.release(entries[3], "why")

        assert [entry.sequence for entry in journal.unfinished()] == [1, 3, 5]


def test_a_row_that_is_lost_while_it_is_worked_on_is_told(state: Path, path: Path) -> None:
    with opened(state) as journal:
        entry = begun(journal)
        sql(path, "DELETE FROM control")

        with pytest.raises(JournalCorrupt, match="has lost row 1"):
            journal.record(entry, done(entry))


# Whose row it is, and keys that are free again.


def test_a_row_is_claimed_by_one(state: Path) -> None:
    with opened(state) as first, opened(state) as second:
        entry = begun(first)

        claimed = first.claim(entry, "first")

        assert claimed is not None
        assert (claimed.owner, claimed.updated) == ("first", entry.updated)
        assert second.claim(entry, "second") is None
        assert second.find(LOOP, "key-1") == claimed


@pytest.mark.parametrize("state_after", ["done", "released"])
def test_a_row_that_is_settled_is_claimed_by_nobody(state: Path, state_after: str) -> None:
    with opened(state) as journal:
        entry = begun(journal)
        if state_after == "done":
            journal.record(entry, done(entry))
        else:
            journal.release(entry, "why")

        assert journal.claim(entry, "another") is None


def test_a_released_key_is_free_and_its_number_is_taken_over(state: Path) -> None:
    with opened(state) as journal:
        entry = begun(journal)
        begun(journal, "key-2")
        journal.release(entry, "why")

        assert journal.find(LOOP, "key-1") is None
        assert journal.find_execution(entry.execution_id) is None
        again = begun(journal, note="another request by now")

        assert (again.sequence, again.result["journal"]["sequence"], again.state) == (1, 1, "executing")
        assert again.execution_id != entry.execution_id
        assert journal.find(LOOP, "key-1") == again
    with opened(state) as later:
        assert [entry.sequence for entry in later.unfinished()] == [1, 2]


def test_a_key_whose_command_has_run_is_never_released(state: Path) -> None:
    with opened(state) as journal:
        entry = begun(journal)
        journal.record(entry, executed(entry))

        journal.release(entry, "why")

        found = journal.find(LOOP, "key-1")
        assert found is not None
        assert found.state == "executed"


# Signatures.


def proved(nonce: str, seconds: float = 60) -> Caller:
    """A caller with a signature of that nonce, to be remembered for so long."""
    proof = Proof(issuer="ops-1", key_id="k-1", actor=None, nonce=nonce, expires=time.time() + seconds)
    return Caller(identity="ops-1", proof=proof)


def test_a_signature_is_remembered_with_the_row_it_came_for(state: Path) -> None:
    caller = proved("n-1")

    with opened(state) as first:
        begun(first, caller=caller)
        begun(first, "key-2")
    with opened(state) as later:
        assert caller.proof is not None
        assert later.nonces() == [("k-1", "n-1", caller.proof.expires)]


def test_a_signature_that_was_used_before_begins_nothing(state: Path) -> None:
    with opened(state) as first, opened(state) as second:
        begun(first, caller=proved("n-1"))

        with pytest.raises(SignatureReplayed) as refused:
            begun(second, "key-2", caller=proved("n-1"))
        assert refused.value.executed is False
        assert second.find(LOOP, "key-2") is None
        assert begun(second, "key-2", caller=proved("n-2")).sequence == 2


def test_a_signature_that_has_expired_is_forgotten_when_the_journal_is_opened(state: Path) -> None:
    with opened(state) as first:
        begun(first, caller=proved("n-1", -1))
        begun(first, "key-2", caller=proved("n-2"))
    with opened(state) as later:
        assert [nonce for _, nonce, _ in later.nonces()] == ["n-2"]


def test_a_signature_that_no_row_came_of_is_remembered_until_it_has_expired(state: Path) -> None:
    expired, used = proved("n-1", -1).proof, proved("n-2").proof
    assert expired is not None
    assert used is not None
    with opened(state) as first:
        for proof in (expired, used, used):
            first.use_up(proof)

        assert first.nonces() == [("k-1", "n-2", used.expires)]
        with pytest.raises(SignatureReplayed):
            begun(first, caller=Caller(identity="ops-1", proof=used))
    with opened(state) as later:
        assert later.nonces() == [("k-1", "n-2", used.expires)]


# The audit.


def test_whatever_changes_a_row_is_in_the_audit(state: Path, path: Path) -> None:
    with opened(state) as journal:
        first = begun(journal, traceId="trace-1")
        journal.release(first, "never run")
        second = begun(journal)
        journal.record(second, executed(second))
        final = journal.record(second, done(second))
        row = new_row(idempotencyKey="key-2")
        needless = journal.begin(replace(row, result={**row.result, "state": "done", "status": "confirmed"}))
        journal.note("refused", {"reason": "RUN_MISMATCH"})

        entries = journal.audit_entries()
        assert [(entry.sequence, entry.kind) for entry in entries] == [
            (1, "begun"),
            (2, "released"),
            (3, "begun"),
            (4, "executed"),
            (5, "done"),
            (6, "not_needed"),
            (7, "refused"),
        ]
        assert journal.audit_entries(after=5) == entries[5:]
        assert find_break(entries) is None
        assert journal.head() == (journal.id, 7, entries[-1].hash)
    bodies = [json.loads(entry.body) for entry in entries]
    assert [body["row"]["sequence"] for body in bodies[:6]] == [1, 1, 1, 1, 1, 2]
    assert bodies[1]["why"] == "never run"
    assert (bodies[4]["executionId"], needless.state) == (final.execution_id, "done")
    # What an entry says of a row can be compared with the row.
    assert [bodies[4]["row"]["digest"]] == [digest for (digest,) in sql(path, "SELECT digest FROM control LIMIT 1")]


def test_an_audit_entry_says_who_asked_for_what_and_how_it_came_out(state: Path) -> None:
    """I14: on the agent's side, where the sandbox can't write."""
    caller = proved("n-1")
    with opened(state) as journal:
        entry = begun(journal, caller=caller, traceId="trace-1", execution_id="e" * 16)
        journal.record(entry, done(entry))
        start, end = [json.loads(found.body) for found in journal.audit_entries()]

    told = {
        "loopId": LOOP,
        "idempotencyKey": "key-1",
        "intent": "approve",
        "requestedBy": "ada",
        "traceId": "trace-1",
        "executionId": "e" * 16,
    }
    assert {**start, "row": None} == {**told, "row": None, "caller": entry.origin.caller, "command": ["superloop"]}
    outcome = {"status": "confirmed", "reason": None, "effect": "none", "exitCode": 0, "timedOut": False}
    assert {**end, "row": None} == {**told, "row": None, **outcome}


def test_a_row_and_its_audit_entry_are_there_together_or_not_at_all(state: Path, path: Path) -> None:
    with opened(state) as journal:
        sql(path, "CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END")

        with pytest.raises(JournalCorrupt):
            begun(journal)
        sql(path, "DROP TRIGGER refuse")
        assert journal.find(LOOP, "key-1") is None
        assert begun(journal).sequence == 1


def test_an_empty_journal_has_a_head_too(state: Path) -> None:
    with opened(state) as journal:
        assert journal.head() == (journal.id, 0, "0" * 64)


# On the disk.


def test_the_journal_is_as_durable_as_it_can_be(state: Path, path: Path) -> None:
    with opened(state):
        pass

    tables, _ = open_journal(path)

    with contextlib.closing(tables):
        assert tables.execute("PRAGMA journal_mode").fetchone() == ("persist",)
        assert tables.execute("PRAGMA synchronous").fetchone() == (3,)


def test_what_sqlite_keeps_beside_the_journal_stays_small(state: Path, path: Path) -> None:
    with opened(state) as journal:
        for number in range(300):
            journal.note("noted", {"number": number, "text": "x" * 10_000})
        with journal._transaction() as tables:  # noqa: SLF001  # as large a change as pruning makes
            tables.execute("UPDATE audit SET body = body || ' '")
            assert path.with_name("journal.sqlite3-journal").stat().st_size > 2 * 1024 * 1024

    assert path.with_name("journal.sqlite3-journal").stat().st_size <= 1024 * 1024


def rename(path: Path) -> None:
    path.rename(path.with_name("kept"))


def exchange(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.with_name("filler").touch()  # or the new file may get the old one's inode
    path.write_bytes(content)


@pytest.mark.parametrize("disturb", [rename, exchange])
def test_nothing_is_written_to_a_file_that_has_lost_its_name(state: Path, path: Path, disturb: Any) -> None:
    with opened(state) as journal:
        entry = begun(journal)
        disturb(path)

        for write in (
            lambda: begun(journal, "key-2"),
            lambda: journal.record(entry, done(entry)),
            lambda: journal.note("refused", {}),
            journal.check_place,
        ):
            with pytest.raises(JournalCorrupt, match="was exchanged while it was open"):
                write()


def test_a_journal_that_is_in_its_place_and_has_room_can_be_written(state: Path) -> None:
    with opened(state) as journal:
        journal.check_place()

        assert (state / "ballast").exists()


# How long rows are kept.


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Moves the clock of this process, by seconds."""
    now = time.time

    def move(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)

    return move


def numbers(state: Path) -> list[int]:
    """The rows that there are once the journal is opened."""
    with opened(state):
        return [
            number for (number,) in sql(state / "journal.sqlite3", "SELECT sequence FROM control ORDER BY sequence")
        ]


def test_a_key_is_kept_for_a_week_after_it_was_done(state: Path, later: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sprite_agent.control.journal.KEPT_ROWS", 1)
    with opened(state) as first:
        entries = [begun(first, f"key-{number}") for number in range(3)]
        for entry in entries:
            first.record(entry, done(entry))

    later(RETENTION_SECONDS - 60)
    assert numbers(state) == [1, 2, 3]
    later(RETENTION_SECONDS + 60)
    assert numbers(state) == [3]
    assert RETENTION_SECONDS == 7 * DAY


def test_the_newest_keys_are_kept_however_old_and_no_number_is_given_twice(
    state: Path, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprite_agent.control.journal.KEPT_ROWS", 2)
    with opened(state) as first:
        entries = [begun(first, f"key-{number}") for number in range(4)]
        for entry in entries:
            first.record(entry, done(entry))

    later(100 * DAY)
    with opened(state) as again:
        assert again.find(LOOP, "key-1") is None
        assert again.find(LOOP, "key-2") is not None
        assert begun(again, "key-0").sequence == 5
    assert numbers(state) == [4, 5]
    assert KEPT_ROWS == 10_000


@pytest.mark.parametrize("row_state", ["executing", "executed"])
def test_a_row_that_is_not_done_is_kept_whatever_its_age_and_those_after_it(
    state: Path, later: Any, monkeypatch: pytest.MonkeyPatch, row_state: str
) -> None:
    monkeypatch.setattr("sprite_agent.control.journal.KEPT_ROWS", 1)
    with opened(state) as first:
        entries = [begun(first, f"key-{number}") for number in range(4)]
        for entry in (entries[0], *entries[2:]):
            first.record(entry, done(entry))
        if row_state == "executed":
            first.record(entries[1], executed(entries[1]))

    later(100 * DAY)

    assert numbers(state) == [2, 3, 4]


def test_opening_a_journal_twice_changes_nothing(state: Path, path: Path) -> None:
    with opened(state) as first:
        begun(first)
    before = path.read_bytes()

    with opened(state):
        pass

    assert path.read_bytes() == before
    assert {file.name for file in state.iterdir()} == {
        "journal.sqlite3",
        "journal.sqlite3-journal",  # blank
        "journal.id",
        "ballast",
    }


def test_an_outcome_is_recorded_once_whoever_looks_at_all_of_the_journal_has_ended(
    state: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "BUSY_TIMEOUT", 0.05)
    with opened(state) as journal:
        entry = begun(journal)
        reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM control").fetchone()
        ending = threading.Timer(0.5, lambda: reader.execute("ROLLBACK"))
        ending.start()
        try:
            assert journal.record(entry, interrupted_result(entry.result)).state == "executed"
        finally:
            ending.join()
            reader.close()
