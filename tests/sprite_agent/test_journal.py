"""The journal keeps a durable row for each key, or says that it can't be trusted or written."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
import uuid
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprite_agent.contract.requests import fingerprint
from sprite_agent.control_results import executing_result
from sprite_agent.errors import ControlNotFound, IdempotencyKeyReused, JournalCorrupt, JournalUnavailable
from sprite_agent.journal import RETENTION_SECONDS, Journal
from sprite_agent.repo import Repo
from sprite_agent.state_folder import StateFolder, default_path
from support.repos import LOOP, STANDIN, LoopFiles, event, line
from support.runtime import executions, request, this_python_first

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlRequest, ControlResult

DAY = 24 * 3600


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    """A loop that waits for approval."""
    loop = LoopFiles(tmp_path / "repo")
    loop.append(line(event("approval_requested")))
    loop.ask_approval()
    return loop


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def path(state: Path) -> Path:
    return state / "journal.sqlite3"


@pytest.fixture
def repo(loop: LoopFiles, state: Path) -> Iterator[Repo]:
    repo = Repo(loop.repo, state_folder=state, runtime=str(STANDIN))
    yield repo
    repo.close()


@contextlib.contextmanager
def reopened(loop: LoopFiles, state: Path) -> Iterator[Repo]:
    """The repo as a process started anew has it."""
    repo = Repo(loop.repo, state_folder=state, runtime=str(STANDIN))
    try:
        yield repo
    finally:
        repo.close()


@contextlib.contextmanager
def journal(path: Path) -> Iterator[Journal]:
    """An open journal."""
    path.parent.mkdir(exist_ok=True)
    journal = Journal(path)
    try:
        yield journal
    finally:
        journal.close()


def sql(path: Path, statement: str, *values: Any) -> list[Any]:
    """What a statement gives, run by a connection of its own."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def begun(journal: Journal, key: str = "key-1", owner: str = "x:1:1") -> ControlResult:
    """A new row of a command about to start."""
    document = cast("ControlRequest", request(idempotencyKey=key))
    return journal.begin(document, fingerprint(document), owner, executing_result(document, ["superloop"]))


# Rows.


def test_a_row_is_there_for_every_other_connection_as_soon_as_it_is_begun(path: Path) -> None:
    with journal(path) as first, journal(path) as second:
        result = begun(first)

        entry = second.find(LOOP, "key-1")
        assert entry is not None
        assert entry.result == result
        assert entry.owner == "x:1:1"
        assert entry.fingerprint == fingerprint(cast("ControlRequest", request()))


def test_rows_are_numbered_one_after_the_other_in_a_journal_with_a_name(path: Path) -> None:
    with journal(path) as opened:
        places = [begun(opened, f"key-{number}")["journal"] for number in range(3)]

        assert [place["sequence"] for place in places] == [1, 2, 3]
        assert {place["id"] for place in places} == {opened.id}
    uuid.UUID(opened.id)
    with journal(path) as again:
        assert again.id == opened.id
        assert begun(again, "key-3")["journal"]["sequence"] == 4


def test_another_journal_has_another_name(tmp_path: Path) -> None:
    with journal(tmp_path / "a.sqlite3") as first, journal(tmp_path / "b.sqlite3") as second:
        assert first.id != second.id


def test_a_key_has_one_row_whoever_asks(path: Path) -> None:
    with journal(path) as first, journal(path) as second:
        begun(first)

        with pytest.raises(IdempotencyKeyReused):
            begun(second)
        assert begun(second, "key-2")["journal"]["sequence"] == 2


def test_a_key_is_scoped_by_its_loop(path: Path) -> None:
    with journal(path) as opened:
        begun(opened)

        assert opened.find("other", "key-1") is None


def test_a_row_that_is_done_is_never_changed(path: Path) -> None:
    with journal(path) as opened:
        executing = begun(opened)
        done: ControlResult = {**executing, "state": "done", "status": "confirmed"}
        opened.record(done)

        opened.record({**executing, "state": "executed"})
        opened.record({**done, "status": "ambiguous"})

        entry = opened.find(LOOP, "key-1")
        assert entry is not None
        assert entry.result == done


def test_rows_that_are_not_done_are_unfinished_oldest_first(path: Path) -> None:
    with journal(path) as opened:
        results = [begun(opened, f"key-{number}") for number in range(4)]
        opened.record({**results[1], "state": "done", "status": "confirmed"})
        opened.record({**results[2], "state": "executed"})

        assert [entry.result["idempotencyKey"] for entry in opened.unfinished()] == ["key-0", "key-2", "key-3"]


def test_a_row_keeps_the_request(path: Path) -> None:
    with journal(path) as opened:
        begun(opened)

    assert sql(path, "SELECT json_extract(request, '$.requestedBy') FROM control") == [("ada",)]


# Who may read it, and where it is.


def test_only_this_user_may_read_folder_journal_and_locks_whatever_the_mask(
    repo: Repo, state: Path, path: Path
) -> None:
    before = os.umask(0)
    try:
        repo.execute(request())
    finally:
        os.umask(before)

    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in state.iterdir()} == {
        "journal.sqlite3": 0o600,
        "lane.lock": 0o600,
    }


def test_the_journal_is_as_durable_as_it_can_be(path: Path) -> None:
    with journal(path):
        assert sql(path, "PRAGMA journal_mode") == [("delete",)]


@pytest.mark.parametrize("inside", [".", ".superloop/state", "../repo/state", "link/state"])
def test_a_state_folder_inside_the_repo_is_refused(loop: LoopFiles, inside: str) -> None:
    (loop.repo / "link").symlink_to(loop.runtime)

    with pytest.raises(ValueError, match="inside the repo"):
        Repo(loop.repo, state_folder=loop.repo / inside, runtime=None)


def test_a_state_folder_that_leads_into_the_repo_is_refused(loop: LoopFiles, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(loop.repo)

    with pytest.raises(ValueError, match="inside the repo"):
        Repo(loop.repo, state_folder=tmp_path / "link" / "state", runtime=None)


def test_a_state_folder_beside_the_repo_is_not_inside_it(loop: LoopFiles) -> None:
    Repo(loop.repo, state_folder=loop.repo.with_name("repo-state"), runtime=None).close()


def test_the_state_folder_of_a_repo_is_its_own_below_the_users(
    loop: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "link").symlink_to(loop.repo)

    assert default_path(loop.repo).parent == tmp_path / "xdg" / "sprite-agent"
    assert default_path(tmp_path / "link") == default_path(loop.repo)
    assert default_path(tmp_path) != default_path(loop.repo)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path(loop.repo).parent == tmp_path / ".local" / "state" / "sprite-agent"


def test_nothing_is_made_before_control_is_asked_for(loop: LoopFiles, state: Path) -> None:
    with reopened(loop, state) as repo:
        repo.read_loop(LOOP)

    assert not state.exists()


def test_one_agent_holds_the_agent_lock(loop: LoopFiles, state: Path) -> None:
    first, second = StateFolder(state, loop.repo), StateFolder(state, loop.repo)

    with first.agent_lock():
        assert (state / "agent.lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(BlockingIOError), second.agent_lock():
            pass
    with second.agent_lock():
        pass


# How long rows are kept.


def aged(path: Path, seconds: float) -> None:
    """Has every row last changed that long ago."""
    sql(path, "UPDATE control SET updated = ?", time.time() - seconds)


def test_a_key_is_kept_for_a_week_after_it_was_done(repo: Repo, loop: LoopFiles, state: Path, path: Path) -> None:
    first = repo.execute(request())
    repo.close()
    aged(path, RETENTION_SECONDS - 60)

    with reopened(loop, state) as again:
        assert again.get_control(LOOP, "key-1") == {**first, "replayed": True}
    assert RETENTION_SECONDS == 7 * DAY


def test_an_older_key_is_forgotten_and_its_number_not_given_again(
    repo: Repo, loop: LoopFiles, state: Path, path: Path
) -> None:
    repo.execute(request())
    repo.close()
    aged(path, RETENTION_SECONDS + 60)

    with reopened(loop, state) as again:
        with pytest.raises(ControlNotFound):
            again.get_control(LOOP, "key-1")
        assert again.execute(request(idempotencyKey="key-2"))["journal"]["sequence"] == 2


@pytest.mark.parametrize("row_state", ["executing", "executed"])
def test_a_row_that_is_not_done_is_kept_whatever_its_age(path: Path, row_state: str) -> None:
    with journal(path) as opened:
        result = begun(opened)
        opened.record(cast("ControlResult", {**result, "state": row_state}))
    aged(path, 100 * DAY)

    with journal(path) as again:
        assert [entry.result["state"] for entry in again.unfinished()] == [row_state]


# A journal that can't be trusted.


def damage_header(path: Path) -> None:
    path.write_bytes(b"not a database " * 1000)


def damage_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def raise_version(path: Path) -> None:
    sql(path, "PRAGMA user_version = 2")


def damage_result(path: Path) -> None:
    sql(path, "UPDATE control SET result = '{'")


def drop_rows(path: Path) -> None:
    sql(path, "DROP TABLE control")


@pytest.mark.parametrize("damage", [damage_header, damage_pages, cut_off, raise_version, damage_result, drop_rows])
def test_with_a_journal_that_cannot_be_trusted_nothing_is_run_and_reading_goes_on(
    repo: Repo, loop: LoopFiles, state: Path, path: Path, damage: Any
) -> None:
    repo.execute(request("cancel"))
    repo.close()
    damage(path)

    with reopened(loop, state) as again:
        with pytest.raises(JournalCorrupt) as corrupt:
            again.execute(request("cancel"))
        assert corrupt.value.executed is False
        with pytest.raises(JournalCorrupt):
            again.get_control(LOOP, "key-1")
        assert again.read_loop(LOOP).snapshot["health"]["hasPendingApproval"]
    assert executions(loop) == []


def test_a_journal_of_a_later_version_is_left_as_it_is(repo: Repo, loop: LoopFiles, state: Path, path: Path) -> None:
    repo.execute(request("cancel"))
    repo.close()
    raise_version(path)
    before = path.read_bytes()

    with reopened(loop, state) as again, pytest.raises(JournalCorrupt, match="version 2, this is for 1"):
        again.execute(request(idempotencyKey="key-2"))

    assert path.read_bytes() == before


# A journal that can't be written.


def a_file_for_a_folder(state: Path) -> None:
    state.touch()


def a_file_on_the_way(state: Path) -> None:
    # The state folder itself becomes a file's child by way of a link.
    (state.parent / "file").touch()
    state.symlink_to(state.parent / "file" / "state")


def a_folder_for_a_journal(state: Path) -> None:
    (state / "journal.sqlite3").mkdir(parents=True)


@pytest.mark.parametrize("obstacle", [a_file_for_a_folder, a_file_on_the_way, a_folder_for_a_journal])
def test_without_a_journal_nothing_is_run_and_reading_goes_on(
    repo: Repo, loop: LoopFiles, state: Path, obstacle: Any
) -> None:
    obstacle(state)

    with pytest.raises(JournalUnavailable) as unavailable:
        repo.execute(request())
    assert (unavailable.value.executed, unavailable.value.retryable) == (False, True)
    with pytest.raises(JournalUnavailable):
        repo.get_control(LOOP, "key-1")
    assert repo.read_loop(LOOP).snapshot["health"]["hasPendingApproval"]
    assert executions(loop) == []


def test_when_the_obstacle_is_gone_the_same_request_is_run(repo: Repo, loop: LoopFiles, state: Path) -> None:
    state.touch()
    with pytest.raises(JournalUnavailable):
        repo.execute(request())

    state.unlink()

    assert repo.execute(request())["executed"]
    assert len(executions(loop)) == 1


def test_a_journal_that_another_process_holds_is_unavailable(repo: Repo, loop: LoopFiles, path: Path) -> None:
    repo.execute(request("cancel"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")

        with pytest.raises(JournalUnavailable, match="locked"):
            repo.execute(request(idempotencyKey="key-2"))
    assert executions(loop) == []
