"""T8, T9, T10: writing fails at every place, the disk is full, and what is synchronized before what."""

from __future__ import annotations

import errno
import itertools
import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.control import failpoints
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import JournalUnavailable
from sprite_agent.repo import Repo
from support.driving import EXIT_CODE, Controlled, Driver, decision
from support.figures import found, scaled
from support.repos import LOOP, STANDIN, put
from support.runtime import SKIPS, executions, request, script, this_python_first, turn
from support.tracing import INJECTED, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from support.repos import Json

LONG = pytest.mark.timeout(scaled(120, 7200))


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver() as driver:
        yield driver


# T8

CALLS = ("write", "pwrite64", "fsync", "fdatasync", "rename", "unlink", "mkdir", "fallocate", "ftruncate", "link")


UNRECORDED = {("ftruncate", 1), ("fsync", 4)}
"""The executor's, of the result: without them it can't record. The agent makes none of these, and three of those."""


class Noted(Controlled):
    """Its command notes that it runs without any of these calls, so that none of them hides a run."""

    def __init__(self, place: Path, driver: Driver) -> None:
        super().__init__(place, driver)
        self._notes = place / "ran"
        self._notes.mkdir()
        note = f'"{self._notes}/${{7#*#}}.$$"'  # the mark's end, and the process
        self.runtime = script(place / "superloop", f": > {note}; exit {EXIT_CODE}")

    def ran(self) -> list[Json]:
        """What was run."""
        super().ran()
        return [{"argv": ["--by", f"#{note.name.partition('.')[0]}"]} for note in self._notes.iterdir()]


def fail_call(place: Path, driver: Driver, call: str, number: int) -> bool:
    """Has the n-th of one system call of the agent fail in the middle of a control; False: there is none."""
    place.mkdir()
    controlled = Noted(place, driver)
    document = decision()
    traces: list[Trace] = []

    def watch(pid: int) -> None:
        traces.append(Trace(pid, place / "trace", CALLS, inject=f"{call}:error=EIO:when={number}"))

    controlled.ask(document, watch=watch)
    failed = [text for text in traces[0].lines() if INJECTED in text]
    controlled.settle(document)
    controlled.ask(document, document)
    controlled.check(lost=(call, number) in UNRECORDED)
    assert len(controlled.ran()) == 1
    return bool(failed)


@LONG
@pytest.mark.parametrize("call", CALLS)
def test_whichever_call_fails_nothing_runs_unrecorded_and_the_truth_is_found(
    driver: Driver, tmp_path: Path, call: str
) -> None:
    step = scaled(6, 1) if call == "pwrite64" else 1
    number, tried = 1, 0
    while fail_call(tmp_path / f"{number}", driver, call, number):
        number, tried = number + step, tried + 1

    assert tried
    found("T8", f"{call}: failed {tried} times, each at another place: 1 execution, and its truth")


EXECUTOR_CALLS = {
    "fork": 1,
    "open": 6,
    "write": 1,
    "fsync": 5,
    "pwrite": 1,
    "ftruncate": 1,
    "posix_fallocate": 1,
    "execvpe": 1,
    "rename": 1,
}
LOSES = {"fsync.4", "pwrite.1", "ftruncate.1", "rename.1"}
"""Calls without which an executor can't record how the command ended."""
STARTS_NOTHING = {"execvpe.1"}
"""Likewise, can't start it: that is how it ended then."""


@pytest.mark.parametrize("call", [f"{call}.{n + 1}" for call, most in EXECUTOR_CALLS.items() for n in range(most)])
def test_whichever_call_of_the_executor_fails_the_truth_is_found(driver: Driver, tmp_path: Path, call: str) -> None:
    controlled = Controlled(tmp_path, driver)
    document = decision()

    answer = controlled.settle(document, failpoints=f"executor.{call}=EIO")

    controlled.ask(document, document)
    assert [file.name for file in controlled.fired.iterdir()] == [f"executor.{call}"]
    assert answer["executed"] == (call not in STARTS_NOTHING)
    assert len(controlled.ran()) == answer["executed"]
    assert (answer["exitCode"] is None) == (call in LOSES | STARTS_NOTHING)
    controlled.check(lost=answer["exitCode"] is None)


# T9


class Disk:
    """The disk under a journal, as large as it is used now: nothing fits on it until the ballast is dropped."""

    def __init__(self, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tables = repo._engine.journal._tables  # noqa: SLF001  # in the place of a disk
        drop = StateFolder.drop_ballast

        def drop_and_make_room(folder: StateFolder) -> None:
            self.dropped = True
            drop(folder)
            self.empty()

        monkeypatch.setattr(StateFolder, "drop_ballast", drop_and_make_room)
        self.dropped = False

    def fill(self) -> None:
        """Leaves no room: a row that grows, or a new one, is SQLITE_FULL."""
        used = self._tables.execute("PRAGMA page_count").fetchone()[0]
        self._tables.execute(f"PRAGMA max_page_count = {used}")

    def empty(self) -> None:
        """Makes room."""
        self._tables.execute("PRAGMA max_page_count = 1000000")


@pytest.fixture
def controlled(driver: Driver, tmp_path: Path) -> Controlled:
    return Controlled(tmp_path, driver)


@pytest.fixture
def core(controlled: Controlled) -> Iterator[Repo]:
    """The loop's repo in this process; it has run a control before."""
    core = Repo(controlled.loop.repo, state_folder=controlled.state, runtime=str(STANDIN))
    put(controlled.loop.state, {"active": True, "current_loop_id": LOOP})
    core.execute(request("cancel", confirmation=SKIPS))
    (controlled.loop.runtime / "standin-executions.jsonl").unlink()
    yield core
    core.close()


def test_on_a_full_disk_a_key_gets_no_row_and_nothing_is_run(
    core: Repo, controlled: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(core, monkeypatch)
    disk.fill()
    document = decision(note="x" * 2_000)  # which fits into no page that is there

    for _ in range(2):
        with pytest.raises(JournalUnavailable) as unavailable:
            core.execute(document)
        assert (unavailable.value.executed, unavailable.value.retryable) == (False, True)
    assert not disk.dropped
    assert core.read_loop(LOOP).snapshot["run"]["status"] == "awaiting_approval"
    assert executions(controlled.loop) == []

    disk.empty()
    assert core.execute(document)["exitCode"] == EXIT_CODE
    assert len(executions(controlled.loop)) == 1
    found("T9", "no room for the row: UNAVAILABLE, 0 executions; then 1")


def test_without_room_for_the_ballast_nothing_is_run(
    core: Repo, controlled: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    document = decision()
    StateFolder(controlled.state, controlled.loop.repo).drop_ballast()
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", no_room)

        with pytest.raises(JournalUnavailable, match="no room"):
            core.execute(document)
        assert isinstance(core.control_fault(), JournalUnavailable)
        assert executions(controlled.loop) == []

    assert core.execute(document)["exitCode"] == EXIT_CODE
    found("T9", "no room for the ballast: UNAVAILABLE, 0 executions; then 1")


@pytest.mark.parametrize("place", ["agent.prepared", "executor.posix_fallocate.1", "executor.open.3"])
def test_without_room_for_the_executor_nothing_is_run_and_the_key_is_free(
    driver: Driver, controlled: Controlled, place: str
) -> None:
    document = decision()

    (said,) = controlled.ask(document, failpoints=f"{place}=ENOSPC")

    assert (said["error"]["reason"], said["error"]["executed"]) == ("NOT_EXECUTED", False)
    assert controlled.ran() == []
    controlled.settle(document)
    controlled.check()
    found("T9", f"no room at {place}: UNAVAILABLE, 0 executions; then 1")


def test_what_a_command_did_is_recorded_in_the_room_of_the_ballast(
    core: Repo, controlled: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn(controlled.loop, exit_code=EXIT_CODE, output_bytes=8_000)
    disk = Disk(core, monkeypatch)
    monkeypatch.setattr(failpoints, "hit", lambda place: disk.fill() if place == "released" else None)

    result = core.execute(decision())

    assert disk.dropped
    assert (result["exitCode"], result["state"]) == (EXIT_CODE, "done")
    assert result["output"].endswith("x" * 8_000)
    assert core.get_control(LOOP, result["idempotencyKey"]) == {**result, "replayed": True}
    assert core.control_fault() is None
    assert (controlled.state / "ballast").exists()
    found("T9", "no room for the result: recorded in the ballast's, which is taken again afterwards")


def test_files_that_cannot_grow_lose_nothing_that_was_run(controlled: Controlled) -> None:
    document = decision()

    (said,) = controlled.ask(document, failpoints="agent.released=full")

    assert (said["error"]["reason"], said["error"]["executed"]) == ("INTERNAL_ERROR", None)
    assert controlled.settle(document)["exitCode"] == EXIT_CODE
    assert len(controlled.ran()) == 1
    controlled.check()
    found("T9", "RLIMIT_FSIZE after the command was started: unknown; the next agent finds its exit code")


# T10

_TAKEN_BACK_NO_MORE = r"pwrite64\(\d+<.*/journal\.sqlite3-journal>, \"(\\0)+\", 28, 0\)"
"""The beginning of SQLite's own journal, blank: this is the commit."""
AN_ORDER = (
    r"execve\(.*/executor\.py",
    r"sendmsg\(\d+<.*>, .*execution",
    r"fdatasync\(\d+<.*/journal\.sqlite3>\)",
    _TAKEN_BACK_NO_MORE,
    r"fdatasync\(\d+<.*/journal\.sqlite3-journal>\)",
    r"sendto\(\d+<.*>, \"G\"",
    r"fsync\(\d+<.*/started>\)",
    r"fsync\(\d+<.*/executions/\w+>\)",
    r"fsync\(\d+<.*/executions>\)",
    r"execve\(\".*/superloop\"",
    r"fsync\(\d+<.*/result\.draft>\)",
    r"rename\(\"result\.draft\", \"result\.json\"\)",
    _TAKEN_BACK_NO_MORE,
    r"fdatasync\(\d+<.*/journal\.sqlite3-journal>\)",
    _TAKEN_BACK_NO_MORE,
    r"fdatasync\(\d+<.*/journal\.sqlite3-journal>\)",
    r"writev\(.*attempt",
)
"""The executor is started and told what to run, the row is on the disk, the executor is let through, its mark is on the
disk, the command is started, its result is on the disk, twice the row is, and the answer is given."""
COMMIT, EXECUTOR, COMMAND, FOLDER, NAMED = AN_ORDER[3], AN_ORDER[0], AN_ORDER[9], AN_ORDER[7], AN_ORDER[11]
UNLOOKED = (*AN_ORDER[:-3], AN_ORDER[-1])
"""Nobody looks for the effect: the row is final with how the command ended, and committed once more, not twice."""
SYNCED = ("fsync", "fdatasync", "rename", "execve", "write", "writev", "pwrite64", "sendmsg", "sendto")


def ordered(lines: list[str], order: Sequence[str] = AN_ORDER) -> None:
    """Fails unless the calls were made in that order, and nothing was committed besides."""
    rest = iter(lines)
    for pattern in order:
        assert any(re.search(pattern, text) for text in rest), f"not in its place: {pattern}"
    before_it = itertools.takewhile(lambda text: not re.search(COMMAND, text), lines)
    assert sum(re.search(EXECUTOR, text) is not None for text in before_it) == 1, "not one executor"
    after_it = itertools.dropwhile(lambda text: not re.search(NAMED, text), lines)
    assert any(re.search(FOLDER, text) for text in after_it), "the name of the result is not synced"
    commits = sum(re.search(COMMIT, text) is not None for text in lines)
    assert commits == order.count(COMMIT), f"{commits} commits"


def traced(controlled: Controlled, output: Path, *, ahead: bool = False, **members: Any) -> list[str]:
    """The calls of one control, with a journal that is there already."""
    controlled.settle(request("cancel", confirmation=SKIPS))
    traces: list[Trace] = []
    controlled.ask(decision(**members), ahead=ahead, watch=lambda pid: traces.append(Trace(pid, output, SYNCED)))
    return traces[0].lines()


@pytest.mark.parametrize("ahead", [False, True], ids=["started for it", "waiting"])
def test_each_step_is_on_the_disk_before_the_next_begins(
    controlled: Controlled, tmp_path: Path, *, ahead: bool
) -> None:
    ordered(traced(controlled, tmp_path / "trace", ahead=ahead))

    found("T10", "executor told < row synced < mark synced < command < result synced < row synced twice < answer")


def test_where_nobody_looks_for_the_effect_a_row_is_done_by_the_commit_that_says_how_its_command_ended(
    controlled: Controlled, tmp_path: Path
) -> None:
    turn(controlled.loop)

    ordered(traced(controlled, tmp_path / "trace", confirmation=SKIPS), UNLOOKED)


def test_a_row_that_is_committed_after_its_command_is_not_in_order(driver: Driver, tmp_path: Path) -> None:
    controlled = Controlled(tmp_path, driver, mutant="commit_the_row_after_the_command")

    with pytest.raises(AssertionError, match="not in its place"):
        ordered(traced(controlled, tmp_path / "trace"))
