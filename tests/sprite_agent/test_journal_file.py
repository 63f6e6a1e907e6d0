"""A journal is made whole or not at all; one that is lost, damaged or exchanged is never taken for a new one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.control import journal_file
from sprite_agent.control.journal import Journal
from sprite_agent.control.journal_file import find_faults, open_journal, put_aside, read_audit
from sprite_agent.errors import JournalCorrupt, JournalUnavailable
from support.journals import begun, opened, sql
from support.repos import LOOP
from support.runtime import executions, made_folder, request

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprite_agent.repo import Repo
    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]


@pytest.fixture
def path(state: Path) -> Path:
    return state / "journal.sqlite3"


@pytest.fixture
def marker(state: Path) -> Path:
    return state / "journal.id"


def opened_id(path: Path) -> str:
    """The id of the journal, which is made where there never was one."""
    tables, journal_id = open_journal(path)
    tables.close()
    return journal_id


def names(state: Path) -> set[str]:
    """What there is in the state folder."""
    return {file.name for file in state.iterdir()}


# How it is made.


def test_the_first_one_to_open_it_makes_it_and_says_beside_it_which_one_it_is(
    state: Path, path: Path, marker: Path
) -> None:
    state.mkdir(mode=0o700)

    journal_id = opened_id(path)

    assert marker.read_text() == f"{journal_id}\n"
    assert names(state) == {"journal.sqlite3", "journal.id"}
    assert opened_id(path) == journal_id


def test_of_many_that_make_it_at_once_all_get_the_same(state: Path, path: Path) -> None:
    state.mkdir(mode=0o700)
    together = threading.Barrier(8)

    def make(_: int) -> str:
        together.wait()
        return opened_id(path)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(make, range(8)))) == 1
    assert names(state) == {"journal.sqlite3", "journal.id"}


def test_who_is_too_late_to_make_it_takes_the_one_that_is_there(
    state: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    link = os.link

    def somebody_else_first(draft: Path, place: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        made.append(opened_id(path))
        link(draft, place)

    state.mkdir(mode=0o700)
    monkeypatch.setattr(os, "link", somebody_else_first)

    assert opened_id(path) == made[0]
    assert names(state) == {"journal.sqlite3", "journal.id"}


@pytest.mark.parametrize(
    "look", [opened_id, find_faults, read_audit], ids=["who opens it", "who checks it", "who reads its audit"]
)
def test_one_that_is_made_between_two_looks_is_not_taken_for_lost(
    state: Path, path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path], object]
) -> None:
    exists = Path.exists

    def then_made(place: Path) -> bool:
        found = exists(place)
        monkeypatch.setattr(Path, "exists", exists)
        opened_id(path)
        return found

    state.mkdir(mode=0o700)
    monkeypatch.setattr(Path, "exists", then_made)

    assert look(path) in (opened_id(path), [])


def test_one_that_could_not_be_made_leaves_nothing_and_is_made_the_next_time(
    state: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    state.mkdir(mode=0o700)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", fail)
        with pytest.raises(JournalUnavailable, match="Input/output error"):
            open_journal(path)
    assert names(state) == set()

    assert opened_id(path)


def test_one_whose_maker_was_killed_before_it_said_which_one_it_is_is_taken(
    state: Path, path: Path, marker: Path
) -> None:
    state.mkdir(mode=0o700)
    journal_id = opened_id(path)
    marker.unlink()

    assert opened_id(path) == journal_id
    assert marker.read_text() == f"{journal_id}\n"


# One that can't be trusted.


def damage_header(path: Path) -> None:
    path.write_bytes(b"not a database " * 1000)


def damage_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


def exchange(path: Path) -> None:
    other = path.parent.with_name("other")
    other.mkdir(mode=0o700)
    opened_id(other / path.name)
    (other / path.name).replace(path)


def raise_version(path: Path) -> None:
    sql(path, "PRAGMA user_version = 3")


def drop_rows(path: Path) -> None:
    sql(path, "DROP TABLE control")


def no_json(path: Path) -> None:
    sql(path, "UPDATE control SET result = '{' WHERE sequence = 1")


def no_text(path: Path) -> None:
    sql(path, "UPDATE control SET result = CAST(x'FF' AS TEXT) WHERE sequence = 1")


def change_state(path: Path) -> None:
    sql(path, "UPDATE control SET state = 'released' WHERE sequence = 1")


def change_key(path: Path) -> None:
    sql(path, "UPDATE control SET idempotency_key = 'key-9' WHERE sequence = 1")


def delete_one_between(path: Path) -> None:
    sql(path, "DELETE FROM control WHERE sequence = 2")


def delete_the_last(path: Path) -> None:
    sql(path, "DELETE FROM control WHERE sequence = 3")


def delete_all(path: Path) -> None:
    sql(path, "DELETE FROM control")


def forget_the_numbers(path: Path) -> None:
    sql(path, "DELETE FROM sqlite_sequence")


def change_audit(path: Path) -> None:
    sql(path, "UPDATE audit SET body = '{}' WHERE sequence = 2")


def shorten_audit(path: Path) -> None:
    sql(path, "DELETE FROM audit WHERE sequence = 2")


DAMAGE = {
    damage_header: "is damaged: file is not a database",
    damage_pages: "is damaged: ",
    cut_off: "is damaged: ",
    empty: "has version 0, this is for 2",
    remove: "is gone",
    exchange: "is another one: its id is ",
    raise_version: "has version 3, this is for 2",
    drop_rows: "is damaged: no such table: control",
    no_json: "is damaged: row 1 was changed",
    no_text: "is damaged: ",
    change_state: "is damaged: row 1 was changed",
    change_key: "is damaged: row 1 was changed",
    delete_one_between: "is damaged: row 2 is missing",
    delete_the_last: "is damaged: row 3 is missing",
    delete_all: "is damaged: row 3 is missing",
    forget_the_numbers: "is damaged: row 4 is missing",
    shorten_audit: "is damaged: audit entry 3: the entries after 1 are missing",
    change_audit: "is damaged: audit entry 2: it was changed",
}


@pytest.mark.parametrize(("damage", "fault"), DAMAGE.items(), ids=[damage.__name__ for damage in DAMAGE])
def test_a_damaged_journal_is_refused_and_the_fault_named(
    state: Path, path: Path, damage: Callable[[Path], None], fault: str
) -> None:
    with opened(state) as journal:
        for number in range(3):
            begun(journal, f"key-{number}")
    assert find_faults(path) == []
    damage(path)
    before = path.read_bytes() if path.exists() else None

    with pytest.raises(JournalCorrupt) as corrupt:
        open_journal(path)
    assert fault in corrupt.value.message
    (found,) = find_faults(path)
    assert fault in found
    # It is left as it is, for whoever looks into it.
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("damage", [damage_header, damage_pages, empty, remove, exchange, no_json, delete_all])
def test_with_a_journal_that_cannot_be_trusted_nothing_is_run_and_reading_goes_on(
    make_repo: MakeRepo, loop: LoopFiles, path: Path, damage: Callable[[Path], None]
) -> None:
    """I6: a key is never run again because its row can't be read."""
    repo = make_repo()
    assert repo.execute(request("cancel"))["reason"] == "not_needed"
    repo.close()
    damage(path)

    again = make_repo()
    for document in (request("cancel"), request(idempotencyKey="key-2")):
        with pytest.raises(JournalCorrupt) as corrupt:
            again.execute(document)
        assert corrupt.value.executed is False
    with pytest.raises(JournalCorrupt):
        again.get_control(LOOP, "key-1")
    assert isinstance(again.control_fault(), JournalCorrupt)
    assert again.journal_head() is None
    assert again.read_loop(LOOP).snapshot["health"]["hasPendingApproval"]
    assert executions(loop) == []


def test_older_audit_entries_are_looked_at_by_who_asks_for_all_of_it(
    state: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a journal must not take longer with every entry."""
    monkeypatch.setattr("sprite_agent.control.journal_file._AUDITED_AT_OPENING", 2)
    with opened(state) as journal:
        for number in range(4):
            begun(journal, f"key-{number}")

    sql(path, "UPDATE audit SET body = '{}' WHERE sequence = 1")
    assert opened_id(path)
    assert find_faults(path) == ["audit entry 1: it was changed: its hash is not the one of its content"]
    sql(path, "UPDATE audit SET body = '{}' WHERE sequence = 4")
    with pytest.raises(JournalCorrupt, match="audit entry 4"):
        open_journal(path)


def test_where_there_never_was_a_journal_there_is_no_fault(path: Path, marker: Path) -> None:
    assert find_faults(path) == []
    assert read_audit(path) == []
    assert not path.exists()
    assert not marker.exists()


def test_the_audit_of_a_damaged_journal_can_still_be_read(state: Path, path: Path) -> None:
    with opened(state) as journal:
        begun(journal)
        entries = journal.audit_entries()
    sql(path, "UPDATE control SET result = '{'")

    assert read_audit(path) == entries
    path.unlink()
    with pytest.raises(JournalCorrupt, match="is gone"):
        read_audit(path)


# Another one.


def test_a_journal_that_is_put_aside_is_kept_and_the_next_one_is_another(state: Path, path: Path) -> None:
    with opened(state) as journal:
        begun(journal)
        old = journal.id

    kept = put_aside(path)

    assert kept is not None
    assert kept.parent == state
    assert sql(kept, "SELECT idempotency_key FROM control") == [("key-1",)]
    with opened(state) as journal:
        assert journal.id != old
        assert journal.find(LOOP, "key-1") is None
        assert begun(journal).sequence == 1


@pytest.mark.parametrize("damage", [damage_header, damage_pages, empty, exchange, raise_version, delete_all])
def test_a_damaged_journal_can_be_put_aside(state: Path, path: Path, damage: Callable[[Path], None]) -> None:
    with opened(state) as journal:
        begun(journal)
    damage(path)
    content = path.read_bytes()

    kept = put_aside(path)

    assert kept is not None
    assert kept.read_bytes() == content
    with opened(state) as journal:
        assert begun(journal).sequence == 1


def test_a_journal_that_is_lost_can_be_given_up(state: Path, path: Path) -> None:
    with opened(state):
        pass
    path.unlink()

    assert put_aside(path) is None
    with opened(state) as journal:
        assert begun(journal).sequence == 1


def test_what_is_half_written_is_put_aside_with_its_journal(state: Path, path: Path) -> None:
    """Or the next one would take it for its own, and be damaged by it."""
    with opened(state) as journal:
        begun(journal)
    path.with_name("journal.sqlite3-journal").write_bytes(b"half of something")

    kept = put_aside(path)

    assert kept is not None
    assert kept.with_name(f"{kept.name}-journal").read_bytes() == b"half of something"
    assert "journal.sqlite3-journal" not in names(state)


def test_two_that_are_put_aside_are_both_kept(state: Path, path: Path) -> None:
    kept = set()
    for _ in range(3):
        with opened(state):
            pass
        kept.add(put_aside(path))

    assert len(kept) == 3
    assert all(one is not None and one.exists() for one in kept)


# One that can't be written.


def a_file_for_a_folder(state: Path) -> None:
    state.touch()


def a_file_on_the_way(state: Path) -> None:
    # The state folder itself becomes a file's child by way of a link.
    (state.parent / "file").touch()
    state.symlink_to(state.parent / "file" / "state")


def a_folder_for_a_journal(state: Path) -> None:
    state.mkdir(mode=0o700)
    (state / "journal.sqlite3").mkdir()


@pytest.mark.parametrize("obstacle", [a_file_for_a_folder, a_file_on_the_way, a_folder_for_a_journal])
def test_without_a_journal_nothing_is_run_and_reading_goes_on(
    make_repo: MakeRepo, loop: LoopFiles, state: Path, obstacle: Any
) -> None:
    repo = make_repo()
    obstacle(state)

    with pytest.raises(JournalUnavailable) as unavailable:
        repo.execute(request())
    assert (unavailable.value.executed, unavailable.value.retryable) == (False, True)
    with pytest.raises(JournalUnavailable):
        repo.get_control(LOOP, "key-1")
    assert isinstance(repo.control_fault(), JournalUnavailable)
    assert repo.read_loop(LOOP).snapshot["health"]["hasPendingApproval"]
    assert executions(loop) == []


def test_when_the_obstacle_is_gone_the_same_request_is_run(make_repo: MakeRepo, loop: LoopFiles, state: Path) -> None:
    repo = make_repo()
    state.touch()
    with pytest.raises(JournalUnavailable):
        repo.execute(request())

    state.unlink()

    assert repo.execute(request())["executed"]
    assert len(executions(loop)) == 1


def test_a_journal_that_another_process_holds_is_unavailable(
    make_repo: MakeRepo, loop: LoopFiles, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprite_agent.control.journal_file.BUSY_TIMEOUT", 0.1)
    repo = make_repo()
    repo.execute(request("cancel"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")

        with pytest.raises(JournalUnavailable, match="locked"):
            repo.execute(request(idempotencyKey="key-2"))
    assert executions(loop) == []
    assert repo.execute(request(idempotencyKey="key-2"))["executed"]


def test_who_holds_a_journal_for_a_moment_is_waited_for(loop: LoopFiles, state: Path, path: Path) -> None:
    journal = Journal(made_folder(state, loop))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other, ThreadPoolExecutor() as pool:
        other.execute("BEGIN IMMEDIATE")
        waiting = pool.submit(begun, journal)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        other.execute("COMMIT")

        assert waiting.result().sequence == 1
    journal.close()


def test_who_looks_at_a_journal_that_is_put_aside_meanwhile_makes_none_in_its_place(
    state: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(state):
        pass
    connect = journal_file._connect  # noqa: SLF001  # nothing else comes between looking and opening

    def put_aside_first(place: Path) -> sqlite3.Connection:
        monkeypatch.setattr(journal_file, "_connect", connect)
        put_aside(place)
        return connect(place)

    monkeypatch.setattr(journal_file, "_connect", put_aside_first)
    with pytest.raises((JournalCorrupt, JournalUnavailable)):
        read_audit(path)

    assert not path.exists()
    with opened(state):  # as `journal reset` does next
        pass


def test_a_journal_that_can_not_be_trusted_is_looked_at_again_when_it_has_changed(
    make_repo: MakeRepo, loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(state) as journal:
        begun(journal)
    marker = state / "journal.id"
    said = marker.read_text()
    marker.write_text("another\n")
    looks = 0
    judge = journal_file.open_journal

    def counted(path: Path) -> Any:
        nonlocal looks
        looks += 1
        return judge(path)

    monkeypatch.setattr("sprite_agent.control.journal.open_journal", counted)
    repo = make_repo()
    for _ in range(3):
        assert isinstance(repo.control_fault(), JournalCorrupt)
    assert looks == 1

    marker.write_text(said)
    assert repo.control_fault() is None
