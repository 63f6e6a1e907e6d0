"""The real sprite-agent: how it starts, what it refuses and with which code, and how it drains."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opsmgr.errors import NoAnswer
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent import __version__
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import Draining
from sprite_agent.server import SERVICE_NAME
from support.following import Follower
from support.repos import LOOP, event, line
from support.runtime import SKIPS, executions, request, turn
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import AgentProgram

    from sprite_agent.contract.envelopes import ControlRequest
    from support.repos import LoopFiles

    Start = Callable[..., AgentProgram]

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
PROGRAM = Path(sys.executable).with_name("sprite-agent")
ONE_TRY = RetryPolicy(attempts=1)


@pytest.fixture
def program(start_agent: Start) -> AgentProgram:
    """An agent on a free port, with a token."""
    return start_agent("--listen", "127.0.0.1:0")


@pytest.fixture
async def transport(program: AgentProgram) -> AsyncIterator[SpriteServiceTransport]:
    """The transport to it, which tries once."""
    transport = SpriteServiceTransport(program.address(), token=TOKEN, policy=ONE_TRY)
    yield transport
    await transport.close()


def control(**members: Any) -> ControlRequest:
    """An approval that does not wait for its effect."""
    return cast("ControlRequest", request(**{"confirmation": SKIPS, **members}))


def called(*words: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a call that is expected to end by itself."""
    return subprocess.run(
        [PROGRAM, *words], check=False, timeout=DEADLINE, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


# Starting.


async def test_it_takes_a_free_port_says_which_and_answers(
    program: AgentProgram, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    repo.append(line(event()))

    info = await transport.info()
    snapshot = await transport.snapshot(LOOP)

    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", program.address())
    assert (info.agent_version, info.repo_path, info.loops) == (__version__, str(repo.repo), [LOOP])
    assert snapshot.envelope["cursor"]["eventLineCount"] == 1


@pytest.mark.parametrize("listen", ["[::1]:0", "localhost:0"])
async def test_other_names_of_loopback_do_as_well(start_agent: Start, listen: str) -> None:
    address = start_agent("--listen", listen).address()
    transport = SpriteServiceTransport(address, token=TOKEN, policy=ONE_TRY)

    assert (await transport.info()).agent_version == __version__

    await transport.close()


async def test_a_unix_socket_is_for_its_owner_only(start_agent: Start, tmp_path: Path) -> None:
    start_agent("--listen", f"unix:{tmp_path}/agent.sock").address()

    assert (tmp_path / "agent.sock").stat().st_mode & 0o777 == 0o600


def test_without_a_token_it_serves_and_says_that_everyone_may_call(start_agent: Start) -> None:
    program = start_agent("--listen", "127.0.0.1:0", OPS_MANAGER_SERVICE_TOKEN="")
    program.address()

    warnings = until(lambda: program.said("warning", by="level"), "it says so")
    assert "no token: everyone who reaches the address may read and control" in warnings[0]["event"]


def test_with_a_token_it_has_nothing_to_warn_of_and_keeps_it_to_itself(program: AgentProgram) -> None:
    program.address()
    program.process.terminate()
    assert program.exit_code() == 0

    assert program.said("warning", by="level") == []
    assert TOKEN not in program.text


async def test_a_token_file_beats_the_environment(start_agent: Start, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-the-file\n")
    file.chmod(0o600)
    program = start_agent("--listen", "127.0.0.1:0", "--token-file", str(file), "--sprite-id", "sprite-9")
    transport = SpriteServiceTransport(program.address(), token="from-the-file", policy=ONE_TRY)  # noqa: S106  # see above

    assert (await transport.info()).sprite_id == "sprite-9"

    await transport.close()


async def test_a_key_survives_the_agent(
    program: AgentProgram, start_agent: Start, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    repo.ask_approval()
    first = await transport.execute(control())
    program.end()
    again = SpriteServiceTransport(start_agent("--listen", "127.0.0.1:0").address(), token=TOKEN, policy=ONE_TRY)

    assert await again.execute(control()) == {**first, "replayed": True}

    await again.close()
    assert len(executions(repo)) == 1


# Refusing.


def test_a_second_agent_on_the_repo_is_refused(program: AgentProgram, start_agent: Start) -> None:
    program.address()

    second = start_agent("--listen", "127.0.0.1:0")

    assert second.exit_code() == 1
    assert re.fullmatch(r"Error: another agent serves this repo already \(lock in .*\)\n", second.text)
    assert program.process.poll() is None


def test_the_repo_can_be_served_again_after_a_kill(program: AgentProgram, start_agent: Start) -> None:
    program.address()
    program.end()

    assert start_agent("--listen", "127.0.0.1:0").address()


def test_a_port_that_is_taken_is_refused(start_agent: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        program = start_agent("--listen", listen)

        assert program.exit_code() == 1
    assert f"Error: can't listen on {listen}: " in program.text


def test_a_unix_socket_that_another_agent_listens_on_is_refused(start_agent: Start, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/agent.sock"
    start_agent("--listen", listen).address()

    other = start_agent("--listen", listen, "--state-dir", str(tmp_path / "another-state"))

    until(lambda: other.process.poll() is not None or other.said("serving"), "it has started or not")
    assert other.process.poll() == 1


def test_a_socket_that_was_left_behind_is_taken_over(start_agent: Start, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/agent.sock"
    first = start_agent("--listen", listen)
    first.address()
    first.end()

    assert start_agent("--listen", listen).address() == listen


@pytest.mark.parametrize("folder", ["", ".superloop/state"])
def test_a_state_folder_that_sandbox_code_can_write_is_refused(
    start_agent: Start, repo: LoopFiles, folder: str
) -> None:
    program = start_agent("--listen", "127.0.0.1:0", "--state-dir", str(repo.repo / folder))

    assert program.exit_code() == 1
    assert "is inside the repo" in program.text


def test_a_repo_that_is_not_there_is_refused(tmp_path: Path) -> None:
    ended = called("serve", "--repo", str(tmp_path / "none"), "--listen", "127.0.0.1:0")

    assert (ended.returncode, ended.stderr) == (1, f"Error: no folder at {tmp_path / 'none'}\n")


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "8.8.8.8:50051", "example.com:50051"])
def test_an_address_that_others_can_reach_is_refused(repo: LoopFiles, listen: str) -> None:
    ended = called("serve", "--repo", str(repo.repo), "--listen", listen)

    assert ended.returncode == 64
    assert f"--listen '{listen}' is not loopback: it needs TLS" in ended.stderr


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("serve",),
        ("serve", "--repo", "."),
        ("serve", "--listen", "127.0.0.1:0"),
        ("serve", "--repo", ".", "--listen", "127.0.0.1"),
        ("serve", "--repo", ".", "--listen", "unix:"),
        ("serve", "--repo", ".", "--listen", "127.0.0.1:0", "--token-file", "/no/such/token"),
        ("serve", "--repo", ".", "--listen", "127.0.0.1:0", "--token", "secret"),
        ("serve", "--repo", ".", "--listen", "127.0.0.1:0", "--log-level", "loud"),
        ("serve", "--repo", ".", "--listen", "127.0.0.1:0", "more"),
        ("dance",),
        ("--loud",),
    ],
    ids=" ".join,
)
def test_a_wrong_call_ends_with_64_and_says_why_on_stderr(words: tuple[str, ...]) -> None:
    ended = called(*words)

    assert (ended.returncode, ended.stdout) == (64, "")
    assert ended.stderr


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("-h",), ("serve", "--help")], ids=" ".join)
def test_a_question_is_answered_on_stdout(words: tuple[str, ...]) -> None:
    ended = called(*words)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


def test_the_version_is_the_packages() -> None:
    assert called("--version").stdout == f"sprite-agent, version {__version__}\n"


# Ending.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_agent_ends_at_once_and_well(program: AgentProgram, number: signal.Signals) -> None:
    program.address()
    program.process.send_signal(number)
    sent = time.monotonic()

    assert program.exit_code() == 0
    assert time.monotonic() - sent < 5
    assert [len(program.said(step)) for step in ("draining", "stopped")] == [1, 1]


async def test_draining_ends_streams_with_where_to_resume(
    program: AgentProgram, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    repo.append(line(event(n=1)))
    query = EventQuery(loop_id=LOOP, follow=True)
    async with Follower(transport.events(query)) as following:
        await following.next()
        program.process.terminate()
        batches = await following.to_end()  # no error: the stream ends with OK

    assert await asyncio.to_thread(program.exit_code) == 0
    assert [len(batch.events) for batch in batches] == [1, 0]
    assert batches[1].resume_token == batches[0].resume_token


async def test_draining_lets_a_running_control_finish(
    program: AgentProgram, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    repo.ask_approval()
    turn(repo, sleep_before=1)
    asked = asyncio.ensure_future(transport.execute(control()))
    await asyncio.to_thread(until, lambda: executions(repo), "the command runs")

    program.process.terminate()
    result = await asked

    assert (result["status"], result["executed"], result["exitCode"]) == ("executed_unconfirmed", True, 0)
    assert await asyncio.to_thread(program.exit_code) == 0


async def test_draining_refuses_new_control_and_says_so(
    program: AgentProgram, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    repo.ask_approval()
    turn(repo, sleep_before=1)
    asked = asyncio.ensure_future(transport.execute(control()))
    await asyncio.to_thread(until, lambda: executions(repo), "the command runs")
    program.process.terminate()
    await asyncio.to_thread(until, lambda: program.said("draining"), "it drains")
    late = SpriteServiceTransport(program.address(), token=TOKEN, policy=ONE_TRY)

    with pytest.raises(Draining):
        await late.execute(control(idempotencyKey="key-2"))

    await late.close()
    await asked
    assert await asyncio.to_thread(program.exit_code) == 0
    assert len(executions(repo)) == 1


async def test_draining_does_not_wait_for_those_who_watch_its_health(program: AgentProgram) -> None:
    async with grpc.aio.insecure_channel(program.address()) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watching = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME)))
        assert (await anext(watching)).status == health_pb2.HealthCheckResponse.SERVING

        program.process.terminate()
        assert (await anext(watching)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.to_thread(until, lambda: program.said("stopped"), "it has drained", deadline=5)


async def test_draining_does_not_wait_for_a_reader_that_does_not_read(
    program: AgentProgram, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    repo.append(line(event(text="x" * 10_000)) * 2000)
    async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True))) as following:
        await following.next()
        await asyncio.to_thread(until, standstill(program), "it can send no more")

        program.process.terminate()
        await asyncio.to_thread(until, lambda: program.said("stopped"), "it has drained", deadline=5)


def standstill(program: AgentProgram) -> Callable[[], bool]:
    """Whether the program has read nothing in a fifth of a second."""
    counter = Path(f"/proc/{program.process.pid}/io")
    seen, since = "", time.monotonic()

    def looked() -> bool:
        nonlocal seen, since
        if (now := counter.read_text().partition("\n")[0]) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 0.2

    return looked


async def test_a_second_signal_ends_it_at_once_though_a_control_runs(
    program: AgentProgram, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    repo.ask_approval()
    turn(repo, sleep_before=12)
    asked = asyncio.ensure_future(transport.execute(control()))
    await asyncio.to_thread(until, lambda: executions(repo), "the command runs")
    program.process.terminate()
    await asyncio.to_thread(until, lambda: program.said("draining"), "it drains")

    program.process.terminate()
    sent = time.monotonic()
    assert await asyncio.to_thread(program.exit_code) != 0
    assert time.monotonic() - sent < 5
    with pytest.raises(NoAnswer):
        await asked
    os.kill(executions(repo)[0]["pid"], signal.SIGKILL)  # the command outlives its agent


async def test_an_agent_outlives_streams_that_are_left(
    program: AgentProgram, transport: SpriteServiceTransport, repo: LoopFiles
) -> None:
    for _ in range(5):
        async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True))) as following:
            await following.next()

    assert (await transport.info()).loops == [LOOP]
    assert program.process.poll() is None
