"""An agent that serves keeps an executor waiting, which has nothing of the agent's, and never outlives it idle."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import stat
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from opsmgr.transport.local import LocalTransport
from sprite_agent.control import executors
from sprite_agent.control.executions import CommandOutcome, Executions
from sprite_agent.control.state_folder import StateFolder, free
from sprite_agent.errors import NotExecuted
from sprite_agent.repo import Repo
from support.commands import carried_out
from support.repos import STANDIN
from support.runtime import asking_loop, executors_of, request
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.contract.envelopes import ControlRequest
    from support.repos import LoopFiles

PROCESSES = 2
"""Of an executor: its own, and the one that is to become the command."""


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    """The state folder of a repo that is not looked at."""
    folder = StateFolder(tmp_path / "state", tmp_path / "repo")
    folder.make()
    return folder


@pytest.fixture
def executions(folder: StateFolder) -> Iterator[Executions]:
    """What an agent that serves has, before its start is through."""
    executions = Executions(folder.executions, ahead=True)
    yield executions
    executions.close()


@pytest.fixture
def shell(executions: Executions, folder: StateFolder) -> Callable[[str], CommandOutcome]:
    """Runs a line of shell."""

    def shell(text: str) -> CommandOutcome:
        with folder.lane(0) as lane:
            outcome = carried_out(executions, uuid.uuid4().hex[:16], ["/bin/sh", "-c", text], lane)
            free(lane)  # as the engine does: the executor may still be about to end
        assert outcome is not None
        return outcome

    return shell


def waiting_for(executions: Executions, state: Path) -> list[int]:
    """The processes of the executor that waits; the first is its own."""
    executions.prepare()
    return sorted(until(lambda: all_of(state), "an executor waits"))


def all_of(state: Path) -> list[int]:
    """The processes of an executor that waits, once it has all of them."""
    found = executors_of(state)
    return found if len(found) == PROCESSES else []


def holds(process: Path, sockets: int) -> list[str]:
    """What a process has open, once it has no more than so many sockets."""
    held = [str(each.readlink()) for each in (process / "fd").iterdir()]
    return held if sum(each.startswith("socket") for each in held) <= sockets else []


# While it waits.


def test_nothing_is_started_before_it_is_asked_for(executions: Executions, folder: StateFolder) -> None:
    assert executors_of(folder.path) == []
    assert not folder.executions.exists()


def test_one_waits_however_often_it_is_asked_for(executions: Executions, folder: StateFolder) -> None:
    first = waiting_for(executions, folder.path)

    for _ in range(3):
        assert waiting_for(executions, folder.path) == first


def test_it_has_no_file_lock_or_listener_of_the_agents_and_nothing_of_its_environment(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "secret")
    with contextlib.ExitStack() as opened:
        for name in ("journal", "lane"):
            ours = opened.enter_context((folder.path / name).open("w"))
            os.set_inheritable(ours.fileno(), True)  # noqa: FBT003  # its one parameter has no other form
        executions = Executions(folder.executions, ahead=True)
        opened.callback(executions.close)

        # To its agent, and from one of its processes to the other.
        for pid, sockets in zip(waiting_for(executions, folder.path), (2, 1), strict=True):
            process = Path(f"/proc/{pid}")
            held = until(functools.partial(holds, process, sockets), "it has closed what is not its own")
            assert {each.partition(":")[0] for each in held} <= {"/dev/null", "pipe", "socket"}
            environment = (process / "environ").read_bytes().split(b"\0")
            assert {word.partition(b"=")[0] for word in environment} <= {b"PATH", b"HOME", b"LANG", b""}
            assert (process / "cwd").readlink() == Path("/")


def test_it_ends_when_it_is_closed_and_leaves_neither_process_nor_thread(
    executions: Executions, folder: StateFolder
) -> None:
    waiting_for(executions, folder.path)

    executions.close()
    executions.prepare()

    until(lambda: not executors_of(folder.path), "it has ended")
    assert not any(thread.name == "executors" for thread in threading.enumerate())


def test_one_that_was_stopped_is_ended_all_the_same(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is to end by itself, as after its command."""
    monkeypatch.setattr(executors, "_ENDING", 0.1)
    process = executors.ExecutorProcess(folder.executions, changes_user=False)
    own, other = sorted(until(lambda: all_of(folder.path), "it waits"))
    os.kill(own, signal.SIGSTOP)
    until(lambda: "T (stopped)" in Path(f"/proc/{own}/status").read_text(), "it is stopped")

    assert process.end() == -signal.SIGKILL
    until(lambda: not Path(f"/proc/{other}").exists(), "what was to become the command has ended too")


def test_it_can_be_closed_at_any_moment(executions: Executions) -> None:
    """Also where its thread is about to start one: what tells it to end is not taken for a wish that it has met."""
    inside = executions._executors  # noqa: SLF001  # the moment takes less than a microsecond

    class SetTooLate(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited = super().wait(timeout)
            self.set()
            inside._wanted.set()  # noqa: SLF001  # likewise
            return waited

    inside._closing = SetTooLate()  # noqa: SLF001  # likewise
    executions.prepare()

    until(lambda: not any(thread.name == "executors" for thread in threading.enumerate()), "its thread has ended")


def test_it_ends_with_a_killed_agent(start_agent: Callable[..., object], repo: LoopFiles, tmp_path: Path) -> None:
    """Whether it had come to wait or not: it has the agent's word for what to run, or runs nothing."""
    state = tmp_path / "state"
    for _ in range(2):
        agent = start_agent("--listen", f"unix:{tmp_path}/agent.sock", "--state-dir", str(state))
        until(lambda: all_of(state), "an executor waits")

        agent.process.kill()  # type: ignore[attr-defined]  # an AgentProgram

        until(lambda: not executors_of(state), "nothing is left")


@pytest.mark.parametrize("runtime", [None, str(STANDIN)])
def test_an_agent_keeps_one_once_recovery_is_through_if_it_has_a_runtime(
    repo: LoopFiles, tmp_path: Path, runtime: str | None
) -> None:
    state = tmp_path / "state"
    with contextlib.closing(Repo(repo.repo, state_folder=state, runtime=runtime, executors_ahead=True)) as core:
        assert not any(thread.name == "executors" for thread in threading.enumerate())
        core.recover()

        assert any(thread.name == "executors" for thread in threading.enumerate()) == (runtime is not None)
        if runtime is not None:
            until(lambda: all_of(state), "an executor waits")


async def test_the_local_transport_keeps_none(tmp_path: Path) -> None:
    state = tmp_path / "state"
    loop = asking_loop(tmp_path / "repo")
    transport = LocalTransport(loop.repo, runtime=str(STANDIN), state_folder=state)

    result = await transport.execute(cast("ControlRequest", request()))

    assert result["exitCode"] == 0
    assert not any(thread.name == "executors" for thread in threading.enumerate())
    assert executors_of(state) == []
    await transport.close()


# When there is a command.


def test_the_one_that_waits_runs_the_command_and_then_the_next_one_waits(
    executions: Executions, folder: StateFolder, shell: Callable[[str], CommandOutcome]
) -> None:
    first, command = waiting_for(executions, folder.path)

    outcome = shell("echo $PPID $$")

    assert outcome == CommandOutcome(exit_code=0, timed_out=False, output=f"{first} {command}\n")
    assert not {first, command} & set(waiting_for(executions, folder.path))


def test_a_command_is_given_what_is_so_now_and_not_what_was_so_when_the_executor_was_started(
    executions: Executions,
    folder: StateFolder,
    shell: Callable[[str], CommandOutcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    waiting_for(executions, folder.path)
    monkeypatch.setenv("HOME", "/home/ada")

    assert shell(f"echo $HOME; umask; touch {tmp_path}/made; pwd").output == "/home/ada\n0022\n/\n"
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o644


def test_commands_one_after_the_other_are_each_run_once(
    executions: Executions, shell: Callable[[str], CommandOutcome], tmp_path: Path
) -> None:
    executions.prepare()

    outcomes = [shell(f"echo {number} >> {tmp_path}/ran; exit {number}") for number in range(8)]

    assert [outcome.exit_code for outcome in outcomes] == list(range(8))
    assert (tmp_path / "ran").read_text().split() == [str(number) for number in range(8)]


@pytest.mark.parametrize("which", [0, 1], ids=["its own process", "the command's"])
def test_one_that_was_killed_while_it_waited_does_not_fail_the_next_command(
    executions: Executions, folder: StateFolder, shell: Callable[[str], CommandOutcome], which: int
) -> None:
    pids = waiting_for(executions, folder.path)
    os.kill(pids[which], signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), "it is gone")

    assert shell("echo ran; exit 3") == CommandOutcome(exit_code=3, timed_out=False, output="ran\n")


def test_one_that_can_not_be_started_ahead_fails_nothing(
    executions: Executions,
    folder: StateFolder,
    shell: Callable[[str], CommandOutcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = threading.Event()

    class Broken(executors.ExecutorProcess):
        def __init__(self, *_: object, **__: object) -> None:
            tried.set()
            raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as broken:
        broken.setattr(executors, "ExecutorProcess", Broken)
        executions.prepare()
        assert tried.wait(10)
        with pytest.raises(NotExecuted, match="Resource temporarily unavailable"):
            shell("exit 3")

    assert shell("exit 3").exit_code == 3
    assert len(waiting_for(executions, folder.path)) == PROCESSES


def test_two_agents_executors_are_their_own(tmp_path: Path) -> None:
    """One that is closed leaves the other's alone."""
    with contextlib.ExitStack() as closed:
        folders = [tmp_path / name for name in ("one", "two")]
        first, second = (Executions(folder / "executions", ahead=True) for folder in folders)
        closed.callback(second.close)
        waiting_for(first, folders[0])
        kept = waiting_for(second, folders[1])

        first.close()

        until(lambda: not executors_of(folders[0]), "the first one's has ended")
        assert sorted(executors_of(folders[1])) == kept
