"""The executor runs nothing before its gate is open, and leaves behind how far it got, whoever was killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.control.executor import NEVER_RUN, OPEN
from sprite_agent.control.executors import EXECUTOR
from sprite_agent.control.processes import name_from_stat
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import ControlBusy
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Started:
    """One executor with its folder and the agent's end of its socket. Lives until its test ends."""

    def __init__(self, folder: Path, lane: int | None, text: str, **plan: Any) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        document = {
            "execution": folder.name,
            "command": ["/bin/sh", "-c", text],
            "environment": {"PATH": os.environ["PATH"]},
            "timeoutSeconds": DEADLINE,
            "outputBytes": 8192,
            "user": None,
            "umask": 0o022,
            **plan,
        }
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        words = [*EXECUTOR, str(folder.parent), str(number), "0"]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd="/", pass_fds=(number,))
        theirs.close()
        if lane is not None:
            socket.send_fds(self.socket, [json.dumps(document).encode()], [lane])

    def tell(self, text: bytes) -> None:
        """Sends what is to open the gate, and hangs up."""
        if text:
            self.socket.send(text)
        self.hang_up()

    def hang_up(self) -> None:
        """Closes the agent's end, as the end of the agent does."""
        self.socket.close()

    def exit_code(self) -> int:
        """How it ended, once it has."""
        return self.process.wait(DEADLINE)

    @property
    def left(self) -> set[str]:
        """What there is in its folder."""
        return {file.name for file in self.folder.iterdir()}

    @property
    def result(self) -> Any:
        """What it has recorded."""
        return json.loads((self.folder / "result.json").read_bytes())


@pytest.fixture
def states(tmp_path: Path) -> StateFolder:
    """The state folder of a repo that is not looked at."""
    states = StateFolder(tmp_path / "state", tmp_path / "repo")
    states.make()
    return states


@pytest.fixture
def start(states: StateFolder, tmp_path: Path) -> Iterator[Any]:
    """Starts executors with a line of shell; the lane is this process's."""
    with contextlib.ExitStack() as opened:
        lane = opened.enter_context(states.lane(0))

        def start(text: str, folder: Path = tmp_path / "execution", **plan: Any) -> Started:
            started = Started(folder, lane, text, **plan)
            opened.callback(started.process.wait)
            opened.callback(started.process.kill)
            opened.callback(started.hang_up)
            return started

        yield start


# The gate.


def test_nothing_is_run_before_the_gate_is_opened(start: Any, tmp_path: Path) -> None:
    started = start(f"touch {tmp_path}/ran")
    until(lambda: "process" in started.left, "it waits at the gate")

    assert started.left == {"result.draft", "process"}
    assert not (tmp_path / "ran").exists()
    started.tell(OPEN)

    assert started.exit_code() == 0
    assert (tmp_path / "ran").exists()
    assert started.left == {"started", "process", "result.json"}


@pytest.mark.parametrize("word", [b"", b"X", b"g"])
def test_a_gate_that_is_closed_and_was_not_opened_means_that_nothing_is_run(
    start: Any, tmp_path: Path, word: bytes
) -> None:
    """As when the agent is killed before the row is safe."""
    started = start(f"touch {tmp_path}/ran")

    started.tell(word)

    assert started.exit_code() == NEVER_RUN
    assert "started" not in started.left
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_was_used_before_is_never_used_again(start: Any, tmp_path: Path) -> None:
    first = start(f"echo ran >> {tmp_path}/ran")
    first.tell(OPEN)
    first.exit_code()

    second = start(f"echo ran >> {tmp_path}/ran")
    second.tell(OPEN)

    assert second.exit_code() == NEVER_RUN
    assert (tmp_path / "ran").read_text() == "ran\n"
    assert second.result["exitCode"] == 0


# What is left.


def test_the_mark_is_there_before_the_command_is_and_the_result_after_it(start: Any, tmp_path: Path) -> None:
    started = start(f"ls {tmp_path}/execution")

    started.tell(OPEN)
    started.exit_code()

    seen = set(started.result["output"].split())
    assert {"process", "started", "result.draft"} <= seen
    assert "result.json" not in seen


def test_the_result_says_how_the_command_ended(start: Any) -> None:
    started = start("echo out; echo err >&2; exit 7")

    started.tell(OPEN)
    started.exit_code()

    assert started.result == {"exitCode": 7, "timedOut": False, "output": "out\nerr\n"}


def test_the_command_is_named_with_its_start(start: Any) -> None:
    started = start("echo $$; cat /proc/$$/stat")

    started.tell(OPEN)
    started.exit_code()

    pid, _, text = started.result["output"].partition("\n")
    name = name_from_stat((started.folder / "process").read_bytes())
    assert name is not None
    assert name == name_from_stat(text.encode())
    assert name.split(":")[1] == pid


def test_only_the_agents_user_may_read_what_is_left(start: Any) -> None:
    before = os.umask(0)
    try:
        started = start("true")
        started.tell(OPEN)
        started.exit_code()
    finally:
        os.umask(before)

    for name in ("started", "result.json"):
        assert stat.S_IMODE((started.folder / name).stat().st_mode) == 0o600


def test_the_command_has_the_mask_of_its_plan(start: Any, tmp_path: Path) -> None:
    """What it makes in the repo is to be read by others, whatever the agent keeps to itself."""
    started = start(f"touch {tmp_path}/made", umask=0o027)

    started.tell(OPEN)
    started.exit_code()

    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o640


def test_a_killed_executor_leaves_no_result_and_its_command_runs_on(start: Any, tmp_path: Path) -> None:
    started = start(f"kill -9 $PPID; sleep 0.2; touch {tmp_path}/ran")

    started.tell(OPEN)

    assert started.exit_code() == -signal.SIGKILL
    assert {"started", "process"} <= started.left
    assert "result.json" not in started.left
    until((tmp_path / "ran").exists, "the command has run to its end")


def test_nobodys_modules_get_into_it(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from where it runs nor from the environment."""
    for folder in (tmp_path / "execution", tmp_path / "modules"):
        folder.mkdir()
        for module in ("json", "subprocess", "sitecustomize"):
            (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    started = start("true")

    started.tell(OPEN)

    assert started.exit_code() == 0
    assert not (tmp_path / "imported").exists()


# The lane.

AGENT = """
import os, subprocess, sys, time
from pathlib import Path
from sprite_agent.control.executions import Executions
from sprite_agent.control.state_folder import StateFolder

states = StateFolder(Path(sys.argv[1]), Path(sys.argv[2]))
executions = Executions(states.executions)
with (
    states.lane(0) as lane,
    executions.ready("0123456789abcdef", ["/bin/sh", "-c", sys.argv[3]], lane) as execution,
):
    executions.run(execution)
    time.sleep(1000)
"""
"""A process of its own that runs a line of shell, and comes to no end."""


def test_while_the_command_of_a_killed_agent_runs_the_lane_is_taken_and_then_free(
    states: StateFolder, tmp_path: Path
) -> None:
    """Also where a child that never ends has inherited it."""
    pids, gate = tmp_path / "pids", tmp_path / "gate"
    os.mkfifo(gate)
    text = f"(sleep 1000 > /dev/null 2>&1 & echo $! > {pids}); read line < {gate}"
    with subprocess.Popen([sys.executable, "-c", AGENT, states.path, tmp_path / "repo", text]) as agent:
        until(pids.exists, "the command runs")
        agent.kill()
    try:
        with pytest.raises(ControlBusy), states.lane(0.1):
            pass
        gate.write_text("go\n")

        with states.lane(DEADLINE):
            assert (states.executions / "0123456789abcdef" / "result.json").exists()
    finally:
        os.kill(int(pids.read_text()), signal.SIGKILL)


def test_when_an_agent_is_killed_after_its_command_the_lane_is_free(states: StateFolder, tmp_path: Path) -> None:
    """Also where a child that never ends has inherited it, and however long the agent has lived since."""
    child = tmp_path / "child"
    text = f"sleep 1000 > /dev/null 2>&1 & echo $! > {child}"
    with subprocess.Popen([sys.executable, "-c", AGENT, states.path, tmp_path / "repo", text]) as agent:
        until((states.executions / "0123456789abcdef" / "result.json").exists, "the command has ended")
        try:
            with pytest.raises(ControlBusy), states.lane(0.3):
                pass
            agent.kill()

            with states.lane(DEADLINE):
                pass
        finally:
            agent.kill()
            os.kill(int(child.read_text()), signal.SIGKILL)


def test_an_executor_leaves_the_lane_to_its_agent_until_that_has_hung_up(start: Any, states: StateFolder) -> None:
    started = start("true")
    started.socket.send(OPEN)
    assert started.socket.recv(1) == b""
    assert started.result["exitCode"] == 0

    with pytest.raises(ControlBusy), states.lane(0.1):
        pass
    assert started.process.poll() is None
    started.hang_up()

    assert started.exit_code() == 0
    with states.lane(0):
        pass
