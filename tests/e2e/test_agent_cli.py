"""The real sprite-agent: how it starts, what it refuses and with which code, and how it drains."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opsmgr.errors import NoAnswer
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent import __version__
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import Draining
from sprite_agent.face import server
from sprite_agent.face.credential_text import token_line
from sprite_agent.face.credentials import new_token
from sprite_agent.face.server import DESCRIPTORS, SERVICE_NAME
from support.certificates import Authority, put
from support.following import Follower
from support.repos import LOOP, event, line
from support.runtime import SKIPS, executions, request, turn
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import AgentProgram

    from sprite_agent.contract.envelopes import ControlRequest
    from sprite_agent.face.config import ServeConfig
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


def test_it_gives_itself_the_descriptors_that_it_may_have(start_agent: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        program = start_agent("--listen", "127.0.0.1:0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    program.address()

    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    assert resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE) == (wanted, hard)


async def test_a_unix_socket_is_for_its_owner_only(start_agent: Start, tmp_path: Path) -> None:
    start_agent("--listen", f"unix:{tmp_path}/agent.sock").address()

    assert (tmp_path / "agent.sock").stat().st_mode & 0o777 == 0o600


async def test_insecure_has_to_be_said_and_is_warned_of(start_agent: Start) -> None:
    program = start_agent("--listen", "127.0.0.1:0", "--insecure", OPS_MANAGER_SERVICE_TOKEN="")
    transport = SpriteServiceTransport(program.address(), policy=ONE_TRY)

    assert (await transport.info()).agent_version == __version__

    await transport.close()
    warnings = until(lambda: program.said("warning", by="level"), "it says so")
    assert warnings[0]["event"] == "insecure: everyone who reaches the address may read and control"
    assert warnings[0]["address"] == program.address()


async def test_insecure_is_warned_of_again_and_again(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "INSECURE_REMINDER", 0.01)
    with structlog.testing.capture_logs() as log:
        async with server.running(dataclasses.replace(config, token=None, insecure=True)):
            text = "insecure: everyone who reaches the address may read and control"
            await asyncio.to_thread(
                until, lambda: [entry["event"] for entry in log].count(text) >= 3, "it is said again"
            )
    assert all(task is asyncio.current_task() for task in asyncio.all_tasks())  # nobody goes on warning


def test_with_a_token_it_has_nothing_to_warn_of_and_keeps_it_to_itself(program: AgentProgram) -> None:
    program.address()
    program.process.terminate()
    assert program.exit_code() == 0

    assert program.said("warning", by="level") == []
    assert TOKEN not in program.text


async def test_a_token_file_beats_the_environment(start_agent: Start, tmp_path: Path) -> None:
    token, known = new_token("t1", ["read"])
    file = put(tmp_path / "tokens", f"{token_line(known)}\n".encode())
    program = start_agent("--listen", "127.0.0.1:0", "--token-file", str(file), "--sprite-id", "sprite-9")
    transport = SpriteServiceTransport(program.address(), token=token, policy=ONE_TRY)

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


def test_a_second_agent_on_the_repo_is_refused_whatever_its_state_folder_is(
    program: AgentProgram, start_agent: Start, tmp_path: Path
) -> None:
    program.address()

    second = start_agent("--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "another"))

    assert second.exit_code() == 1
    assert re.fullmatch(r"Error: another agent serves this repo already, with another --state-dir: .*\n", second.text)
    assert program.process.poll() is None


def test_an_agent_that_has_no_place_for_the_repos_lock_serves_and_says_so(start_agent: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    program = start_agent(
        "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state"), XDG_STATE_HOME=str(tmp_path / "file")
    )

    program.address()
    assert program.said("agents with another --state-dir are not kept from this repo", by="event")


def test_the_repo_can_be_served_again_after_a_kill(program: AgentProgram, start_agent: Start) -> None:
    program.address()
    program.end()

    assert start_agent("--listen", "127.0.0.1:0").address()


def test_a_port_that_is_taken_is_refused(start_agent: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        program = start_agent("--listen", listen)

        assert program.exit_code() == 1
    assert program.text == f"Error: can't listen on {listen}: Address already in use\n"


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("missing/agent.sock", "No such file or directory"),
        ("file", "Address already in use"),
        ("x" * 120, "AF_UNIX path too long"),
    ],
    ids=["no folder", "a regular file", "too long"],
)
def test_a_place_where_no_socket_can_be_is_refused_with_the_cause(
    start_agent: Start, tmp_path: Path, place: str, cause: str
) -> None:
    (tmp_path / "file").write_text("kept")

    program = start_agent("--listen", f"unix:{tmp_path}/{place}")

    assert program.exit_code() == 1
    assert program.text == f"Error: can't listen on unix:{tmp_path}/{place}: {cause}\n"
    assert (tmp_path / "file").read_text() == "kept"


def test_a_unix_socket_that_another_agent_listens_on_is_refused(start_agent: Start, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/agent.sock"
    start_agent("--listen", listen).address()

    other = start_agent("--listen", listen, XDG_STATE_HOME=str(tmp_path / "another"))  # as another user's would be

    until(lambda: other.process.poll() is not None or other.said("serving"), "it has started or not")
    assert other.process.poll() == 1
    assert "another process does" in other.text


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


def test_a_state_folder_that_cannot_be_written_is_refused_and_says_what_to_do(
    start_agent: Start, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "agent.lock").mkdir()  # as root, who runs these tests at times, no mode would keep it from being written

    program = start_agent("--listen", "127.0.0.1:0", "--state-dir", str(state))

    assert program.exit_code() == 1
    remedy = f"let uid {os.geteuid()} write there, or give another --state-dir"
    assert program.text == f"Error: state folder {state} can't be written: Is a directory; {remedy}\n"


def test_a_repo_that_is_not_there_is_refused(tmp_path: Path) -> None:
    ended = called("serve", "--repo", str(tmp_path / "none"), "--listen", "127.0.0.1:0", "--insecure")

    assert ended.returncode == 1
    assert ended.stderr == f"Error: no folder at {tmp_path / 'none'}, or none that this user may look at\n"


# Who may be let in, and where.


@dataclass(frozen=True, kw_only=True)
class Files:
    """What can be given to an agent, right and wrong."""

    token: str
    cert: str
    key: str
    ca: str


@pytest.fixture
def files(tmp_path: Path) -> Files:
    authority = Authority()
    cert, key = authority.issue().put(tmp_path, "agent")
    ca = put(tmp_path / "ca.pem", authority.pem)
    token = put(tmp_path / "tokens", f"{token_line(new_token('t1', ['read'])[1])}\n".encode())
    return Files(token=str(token), cert=str(cert), key=str(key), ca=str(ca))


TLS = ("--tls-cert", "{cert}", "--tls-key", "{key}")
OPEN = "everyone who reaches '{}' could read and control: give --token-file,"
REFUSED = [
    pytest.param("127.0.0.1:0", (), OPEN, id="loopback, nothing"),
    pytest.param("unix:{folder}/a.sock", (), OPEN, id="unix, nothing"),
    pytest.param("127.0.0.1:0", TLS, OPEN, id="loopback, TLS only"),
    pytest.param("0.0.0.0:0", (), "--listen '{}' is not loopback: it needs --tls-cert", id="all, nothing"),
    pytest.param("[::]:0", ("--token-file", "{token}"), "is not loopback: it needs --tls-cert", id="all, token only"),
    pytest.param("8.8.8.8:50051", ("--token-file", "{token}"), "is not loopback: it needs", id="another, token only"),
    pytest.param("example.com:50051", (), "is not loopback: it needs", id="a name, nothing"),
    pytest.param("0.0.0.0:0", TLS, OPEN, id="all, TLS only"),
    pytest.param("0.0.0.0:0", ("--insecure",), "--insecure is for loopback and Unix sockets", id="all, insecure"),
    pytest.param("0.0.0.0:0", (*TLS, "--insecure"), "--insecure is for loopback", id="all, TLS, insecure"),
    pytest.param("127.0.0.1:0", ("--insecure", "--token-file", "{token}"), "leave out one of the two", id="both"),
    pytest.param("127.0.0.1:0", ("--tls-cert", "{cert}"), "--tls-cert and --tls-key go together", id="no key"),
    pytest.param("127.0.0.1:0", ("--tls-key", "{key}"), "--tls-cert and --tls-key go together", id="no certificate"),
    pytest.param("127.0.0.1:0", ("--tls-client-ca", "{ca}"), "--tls-client-ca needs --tls-cert", id="CA only"),
]


@pytest.mark.parametrize(("listen", "words", "message"), REFUSED)
def test_what_lets_in_whom_it_should_not_is_refused_and_says_what_to_do(
    files: Files, tmp_path: Path, listen: str, words: tuple[str, ...], message: str
) -> None:
    listen = listen.format(folder=tmp_path)
    words = tuple(word.format(**dataclasses.asdict(files)) for word in words)

    ended = called("serve", "--repo", str(tmp_path), "--listen", listen, *words)

    assert (ended.returncode, ended.stdout) == (64, "")
    assert message.format(listen) in ended.stderr


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("127.0.0.1:0", ("--token-file", "{token}")),
        ("unix:{folder}/a.sock", ("--token-file", "{token}")),
        ("127.0.0.1:0", (*TLS, "--token-file", "{token}")),
        ("0.0.0.0:0", (*TLS, "--token-file", "{token}")),
        ("0.0.0.0:0", (*TLS, "--tls-client-ca", "{ca}")),
        ("127.0.0.1:0", (*TLS, "--tls-client-ca", "{ca}")),
        ("unix:{folder}/a.sock", ("--insecure",)),
    ],
    ids=["loopback, token", "unix, token", "loopback, both", "all, both", "all, mTLS", "loopback, mTLS", "insecure"],
)
def test_what_lets_in_nobody_but_whom_it_should_is_served(
    start_agent: Start, files: Files, tmp_path: Path, listen: str, words: tuple[str, ...]
) -> None:
    words = tuple(word.format(**dataclasses.asdict(files)) for word in words)

    program = start_agent("--listen", listen.format(folder=tmp_path), *words, OPS_MANAGER_SERVICE_TOKEN="")

    assert program.address()


def test_a_key_that_others_can_read_is_refused(start_agent: Start, files: Files) -> None:
    Path(files.key).chmod(0o640)
    program = start_agent("--listen", "127.0.0.1:0", "--tls-cert", files.cert, "--tls-key", files.key)

    assert program.exit_code() == 1
    assert program.text == f"Error: key file {files.key} can be read by others; chmod 600 it\n"


async def test_strangers_leave_nothing_in_the_log_that_is_no_json(start_agent: Start, files: Files) -> None:
    program = start_agent("--listen", "127.0.0.1:0", "--tls-cert", files.cert, "--tls-key", files.key)
    stranger = SpriteServiceTransport(program.address(), token=TOKEN, policy=ONE_TRY)
    with pytest.raises(NoAnswer):
        await stranger.info()
    await stranger.close()
    program.process.terminate()
    assert await asyncio.to_thread(program.exit_code) == 0

    assert all(text.startswith("{") for text in program.text.splitlines())


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
        ("serve", "--repo", ".", "--listen", "127.0.0.1:0", "--insecure", "--max-streams-per-caller", "0"),
        ("serve", "--repo", ".", "--listen", "127.0.0.1:0", "--insecure", "--max-control-rate", "nan"),
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
    turn(repo, sleep_before=12)
    asked = asyncio.ensure_future(transport.execute(control()))
    await asyncio.to_thread(until, lambda: executions(repo), "the command runs")
    program.process.terminate()
    await asyncio.to_thread(until, lambda: program.said("draining"), "it drains")
    late = SpriteServiceTransport(program.address(), token=TOKEN, policy=ONE_TRY)

    with pytest.raises(Draining):
        await late.execute(control(idempotencyKey="key-2"))

    await late.close()
    os.kill(executions(repo)[0]["pid"], signal.SIGKILL)  # nobody waits for it any longer
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
