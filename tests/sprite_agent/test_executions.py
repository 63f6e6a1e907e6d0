"""A command is run by an executor as an argument vector, clean, bounded in time and output; what is left tells how."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest

from sprite_agent.control.executions import MAX_OUTPUT_BYTES, CommandOutcome, Executions
from sprite_agent.control.processes import name_of
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import NotExecuted
from support.commands import carried_out
from support.runtime import script
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")


class Run(Protocol):
    """Runs a command."""

    def __call__(self, command: list[str], timeout: float = 20.0) -> CommandOutcome:
        """How it ended."""


class Shell(Protocol):
    """Runs a line of shell."""

    def __call__(self, text: str, timeout: float = 20.0) -> CommandOutcome:
        """How it ended."""


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    """The state folder of a repo that is not looked at."""
    folder = StateFolder(tmp_path / "state", tmp_path / "repo")
    folder.make()
    return folder


@pytest.fixture
def lane(folder: StateFolder) -> Iterator[int]:
    with folder.lane(0) as lane:
        yield lane


@pytest.fixture
def run(folder: StateFolder, lane: int) -> Run:
    def run(command: list[str], timeout: float = 20.0) -> CommandOutcome:
        outcome = carried_out(Executions(folder.executions, timeout=timeout), uuid.uuid4().hex[:16], command, lane)
        assert outcome is not None
        return outcome

    return run


@pytest.fixture
def shell(run: Run) -> Shell:
    return lambda text, timeout=20.0: run(["/bin/sh", "-c", text], timeout)


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """A file for pids, one a line, of what would outlive the test."""
    pids = tmp_path / "pids"
    pids.touch()
    yield pids
    for pid in pids.read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


# How it ends.


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code_is_the_commands(shell: Shell, code: int) -> None:
    assert shell(f"exit {code}") == CommandOutcome(exit_code=code, timed_out=False, output="")


def test_a_command_ended_by_a_signal_has_the_signal_as_a_negative_exit_code(shell: Shell) -> None:
    assert shell("kill -TERM $$") == CommandOutcome(exit_code=-15, timed_out=False, output="")


def test_a_command_that_cannot_be_started_has_no_exit_code(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0\0")
    broken.chmod(0o755)

    outcome = run([str(broken)])

    assert outcome == CommandOutcome(exit_code=None, timed_out=False, output=f"{broken}: Exec format error")


def test_a_command_that_ends_at_once_is_answered_at_once(shell: Shell) -> None:
    """The quickest of several: a busy machine may hold up any of them."""
    taken = []
    for _ in range(5):
        began = time.monotonic()
        shell("exit 0")
        taken.append(time.monotonic() - began)

    assert min(taken) < 1


# What it prints.


def test_both_streams_are_kept_in_their_order(shell: Shell) -> None:
    assert shell("echo out; echo err >&2; echo out").output == "out\nerr\nout\n"


def test_of_a_long_output_the_end_is_kept(shell: Shell) -> None:
    outcome = shell("yes 0123456789 | head -c 5500000; echo END")

    assert outcome.output.endswith("0123456789\nEND\n")
    assert len(outcome.output) == MAX_OUTPUT_BYTES


def test_output_printed_just_before_the_end_is_not_lost(shell: Shell) -> None:
    for number in range(20):
        assert shell(f"head -c 60000 /dev/zero | tr '\\0' x; echo {number}").output.endswith(f"x{number}\n")


def test_output_that_is_not_utf_8_is_bounded_as_well(shell: Shell) -> None:
    outcome = shell("head -c 20000 /dev/zero | tr '\\0' '\\377'")

    assert set(outcome.output) == {"\N{REPLACEMENT CHARACTER}"}
    assert len(outcome.output.encode()) <= MAX_OUTPUT_BYTES


def test_a_command_that_closes_its_output_is_waited_for(shell: Shell) -> None:
    assert shell("exec >&- 2>&-; sleep 0.3; exit 3") == CommandOutcome(exit_code=3, timed_out=False, output="")


# What it is given.


def test_the_environment_is_path_home_and_lang_and_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "secret")
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    outcome = run(["/usr/bin/env"])

    assert sorted(outcome.output.splitlines()) == ["HOME=/home/ada", "LANG=C.UTF-8", "PATH=/usr/bin:/bin"]


def test_a_shell_script_finds_nothing_more_than_what_its_shell_adds(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "secret")

    outcome = run([script(tmp_path / "superloop", "env")])

    names = {entry.partition("=")[0] for entry in outcome.output.splitlines()}
    assert {"PATH", "LANG"} <= names <= {"PATH", "HOME", "LANG", "PWD", "OLDPWD", "SHLVL", "_"}


def test_a_home_that_is_not_set_stays_unset(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)

    assert "HOME=" not in run(["/usr/bin/env"]).output


def test_without_a_path_there_is_the_systems(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH", raising=False)

    assert f"PATH={os.defpath}" in run(["/usr/bin/env"]).output


def test_the_command_has_no_input_a_session_of_its_own_and_the_root_folder(run: Run) -> None:
    program = "import os, sys; print(sys.stdin.read() == '', os.getsid(0) == os.getpid() == os.getpgrp(), os.getcwd())"

    assert run([sys.executable, "-c", program]).output == "True True /\n"


def test_the_command_inherits_the_lane_and_no_other_descriptor_but_the_standard_ones(
    shell: Shell, folder: StateFolder
) -> None:
    with Path("/dev/null").open() as ours:
        os.set_inheritable(ours.fileno(), True)  # noqa: FBT003  # its one parameter has no other form

        listed = shell("exec ls -l /proc/self/fd").output.splitlines()

    opened = dict(each.split()[-3::2] for each in listed if "->" in each)
    assert opened.pop("0") == "/dev/null"
    assert [opened.pop(name).partition(":")[0] for name in "12"] == ["pipe", "pipe"]
    # Besides the lane there is the folder that the command itself reads.
    assert [place for place in opened.values() if not place.startswith("/proc/")] == [str(folder.path / "lane.lock")]


def test_a_command_is_run_however_many_files_are_open(shell: Shell) -> None:
    """As in an agent with a thousand streams: select() knows no descriptor beyond 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
        for _ in range(1050):
            opened.callback(os.close, os.open("/dev/null", os.O_RDONLY))

        assert shell("echo out; exit 3") == CommandOutcome(exit_code=3, timed_out=False, output="out\n")


# Its time.


def with_time(attempt: Callable[[float], _T], has_begun: Callable[[_T], bool]) -> _T:
    """What comes of a command with a time limit; where the machine stood still until it was over, of one with more."""
    outcome = attempt(0.5)
    return outcome if has_begun(outcome) else attempt(8.0)


def test_a_command_over_its_time_is_ended_with_all_its_children(shell: Shell, pids: Path) -> None:
    text = f"trap '' TERM INT HUP; (trap '' TERM; sleep 1000) & echo $! $$ >> {pids}; echo waiting; wait; sleep 1000"

    def attempt(limit: float) -> CommandOutcome:
        began = time.monotonic()
        outcome = shell(text, timeout=limit)
        assert limit <= time.monotonic() - began < limit + 10
        return outcome

    outcome = with_time(attempt, lambda outcome: outcome.output != "")

    assert outcome == CommandOutcome(exit_code=-9, timed_out=True, output="waiting\n")
    for pid in pids.read_text().split():
        until(lambda pid=int(pid): name_of(pid) is None, f"process {pid} is gone")  # type: ignore[misc]


def test_a_command_that_prints_without_end_is_ended_at_its_time(shell: Shell) -> None:
    outcome = with_time(lambda limit: shell("yes", timeout=limit), lambda outcome: outcome.output != "")

    assert (outcome.exit_code, outcome.timed_out) == (-9, True)
    assert outcome.output == "y\n" * (MAX_OUTPUT_BYTES // 2)


def test_a_command_that_closes_its_output_is_ended_at_its_time(shell: Shell) -> None:
    outcome = shell("exec >&- 2>&-; exec sleep 1000", timeout=0.3)

    assert (outcome.exit_code, outcome.timed_out) == (-9, True)


def test_a_child_that_keeps_the_output_open_does_not_hold_the_command_up(shell: Shell, pids: Path) -> None:
    began = time.monotonic()

    outcome = shell(f"sleep 1000 & echo $! >> {pids}; echo done; exit 4")

    assert time.monotonic() - began < 5
    assert outcome == CommandOutcome(exit_code=4, timed_out=False, output="done\n")


def test_a_child_that_goes_on_printing_does_not_hold_the_command_up(shell: Shell, pids: Path) -> None:
    outcome = shell(f"yes & echo $! >> {pids}; exit 4")

    assert (outcome.exit_code, outcome.timed_out) == (4, False)


# What is left behind.

KEY = "0123456789abcdef"


def test_an_outcome_stays_until_it_is_forgotten(folder: StateFolder, lane: int) -> None:
    """Whoever asks: the agent that ran it, or the next one."""
    outcome = carried_out(Executions(folder.executions), KEY, ["/bin/sh", "-c", "echo no; exit 3"], lane)

    later = Executions(folder.executions)
    assert later.outcome(KEY) == outcome == CommandOutcome(exit_code=3, timed_out=False, output="no\n")
    assert later.was_started(KEY)
    later.forget(KEY)
    later.forget(KEY)
    assert (later.outcome(KEY), later.was_started(KEY)) == (None, False)
    assert list(folder.executions.iterdir()) == []


def test_what_nobody_asks_for_any_more_is_removed(folder: StateFolder) -> None:
    executions = Executions(folder.executions)
    executions.forget_all_but([])
    for name in ("a", "b", "c"):
        (folder.executions / name).mkdir(parents=True)
        (folder.executions / name / "result.json").write_text("{}")

    executions.forget_all_but(["b", "x"])

    assert [left.name for left in folder.executions.iterdir()] == ["b"]


def test_what_nobody_asks_for_any_more_stays_where_it_cannot_be_listed(folder: StateFolder) -> None:
    """An agent starts, and answers, without it."""
    (folder.executions / "a").mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(0)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            list(folder.executions.iterdir())
        Executions(folder.executions).forget_all_but([])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert [left.name for left in folder.executions.iterdir()] == ["a"]


def test_only_the_agents_user_may_look_into_an_execution(folder: StateFolder, lane: int) -> None:
    before = os.umask(0)
    try:
        carried_out(Executions(folder.executions), KEY, ["true"], lane)
    finally:
        os.umask(before)

    place = folder.executions / KEY
    assert [stat.S_IMODE(each.stat().st_mode) for each in (folder.executions, place)] == [0o700, 0o700]


# An executor that does not do its work.


def test_an_execution_is_never_run_twice(folder: StateFolder, lane: int, tmp_path: Path) -> None:
    executions = Executions(folder.executions)
    carried_out(executions, KEY, ["true"], lane)

    with pytest.raises(NotExecuted, match="File exists"):
        carried_out(executions, KEY, ["touch", str(tmp_path / "ran")], lane)
    assert not (tmp_path / "ran").exists()


def test_a_command_that_is_not_released_is_never_run_and_leaves_nothing(folder: StateFolder, tmp_path: Path) -> None:
    """As when its row can't be committed: the lane is free as soon as the caller lets go of it."""
    executions = Executions(folder.executions)
    with (
        pytest.raises(ValueError, match="no row"),
        folder.lane(0) as lane,
        executions.ready(KEY, ["touch", str(tmp_path / "ran")], lane) as execution,
    ):
        raise ValueError("no row")

    assert list(folder.executions.iterdir()) == []
    with folder.lane(0) as lane:
        assert carried_out(executions, KEY, ["true"], lane) is not None
    assert not execution.was_released
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("program", [("/nowhere/python",), (sys.executable, "-c", "raise SystemExit(3)")])
def test_an_executor_that_did_not_begin_has_run_nothing(
    folder: StateFolder, lane: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: tuple[str, ...]
) -> None:
    monkeypatch.setattr("sprite_agent.control.executors.EXECUTOR", program)

    with pytest.raises(NotExecuted) as error:
        carried_out(Executions(folder.executions), KEY, ["touch", str(tmp_path / "ran")], lane)

    assert (error.value.executed, error.value.retryable, error.value.retry_after) == (False, True, 1.0)
    assert not (tmp_path / "ran").exists()


def test_the_command_of_a_killed_executor_is_waited_for_and_its_end_is_not_known(
    folder: StateFolder, lane: int, tmp_path: Path
) -> None:
    ended = tmp_path / "ended"
    text = f"kill -9 $PPID; sleep 0.3; touch {ended}"

    outcome = carried_out(Executions(folder.executions), KEY, ["/bin/sh", "-c", text], lane)

    assert outcome is None
    assert ended.exists()


def test_the_command_of_a_killed_executor_is_ended_at_its_time_with_all_its_children(
    folder: StateFolder, lane: int, pids: Path
) -> None:
    text = f"(sleep 1000) & echo $! $$ >> {pids}; kill -9 $PPID; sleep 1000"

    def attempt(limit: float) -> CommandOutcome | None:
        began = time.monotonic()
        executions = Executions(folder.executions, timeout=limit)
        outcome = carried_out(executions, uuid.uuid4().hex[:16], ["/bin/sh", "-c", text], lane)
        assert limit <= time.monotonic() - began < limit + 10
        return outcome

    assert with_time(attempt, lambda outcome: outcome is None) is None
    for pid in pids.read_text().split():
        until(lambda pid=int(pid): name_of(pid) is None, f"process {pid} is gone")  # type: ignore[misc]


def test_an_executor_that_hangs_is_ended_and_its_command_too(
    folder: StateFolder, lane: int, pids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprite_agent.control.executions._RECORDING", 0.3)
    text = f"echo $PPID $$ >> {pids}; kill -STOP $PPID; sleep 1000"

    def attempt(limit: float) -> CommandOutcome | NotExecuted | None:
        try:
            executions = Executions(folder.executions, timeout=limit)
            return carried_out(executions, uuid.uuid4().hex[:16], ["/bin/sh", "-c", text], lane)
        except NotExecuted as error:
            assert not pids.read_text()
            return error

    assert with_time(attempt, lambda outcome: outcome is None) is None
    for pid in pids.read_text().split():
        until(lambda pid=int(pid): name_of(pid) is None, f"process {pid} is gone")  # type: ignore[misc]


# Orphans.


@pytest.fixture
def orphan(folder: StateFolder) -> Iterator[subprocess.Popen[bytes]]:
    """A command of a killed executor, and what that has left."""
    (folder.executions / KEY).mkdir(parents=True)
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as process:
        (folder.executions / KEY / "process").write_bytes(Path(f"/proc/{process.pid}/stat").read_bytes())
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        yield process
        process.kill()
        reaper.join()


def test_an_orphan_is_ended_when_its_time_is_over(folder: StateFolder, orphan: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()

    Executions(folder.executions).end_orphan(KEY, within=0.3)

    assert 0.3 <= time.monotonic() - began < 5
    assert name_of(orphan.pid) is None


def test_an_orphan_that_ends_by_itself_is_only_waited_for(folder: StateFolder, orphan: subprocess.Popen[bytes]) -> None:
    threading.Timer(0.2, orphan.terminate).start()

    Executions(folder.executions).end_orphan(KEY, within=60)

    assert until(lambda: orphan.returncode, "it was reaped") == -signal.SIGTERM


def test_another_process_under_the_pid_of_an_orphan_is_left_alone(
    folder: StateFolder, orphan: subprocess.Popen[bytes]
) -> None:
    """C10: nothing is killed by its pid alone."""
    file = folder.executions / KEY / "process"
    front, parenthesis, fields = file.read_text().rpartition(")")
    words = fields.split()
    words[19] = str(int(words[19]) - 1)
    file.write_text(f"{front}{parenthesis} {' '.join(words)}")

    Executions(folder.executions).end_orphan(KEY, within=0)

    assert name_of(orphan.pid) is not None


@pytest.mark.parametrize("left", [None, "", "nonsense", "1 (x)"])
def test_where_no_process_is_named_there_is_nothing_to_end(folder: StateFolder, left: str | None) -> None:
    (folder.executions / KEY).mkdir(parents=True)
    if left is not None:
        (folder.executions / KEY / "process").write_text(left)

    Executions(folder.executions).end_orphan(KEY, within=0)
