"""The transport to an agent that is silent, late, or answers nonsense: bounded tries, and no wrong conclusions."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import socket
import time
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from opsmgr.errors import NoAnswer, NotReached, TransportRefused
from opsmgr.subscription import subscribe
from opsmgr.transport import silence, sprite_service
from opsmgr.transport.credentials import Credentials
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract import mirror
from sprite_agent.contract.error_details import to_status
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import (
    ContractError,
    ControlBusy,
    Draining,
    InternalError,
    JournalUnavailable,
    LoopNotFound,
    OpsError,
    RateLimited,
    RunMismatch,
    SignatureReplayed,
    SignatureStale,
    StreamLimit,
)
from sprite_agent.face.server import SERVICE_NAME, running
from sprite_agent.v1 import service_pb2 as pb
from sprite_agent.v1 import service_pb2_grpc
from support.certificates import Authority, put
from support.clocks import LoopClock
from support.repos import LOOP, MOMENT, event, line
from support.runtime import LOOKS_ONCE, SKIPS, executions, request
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from conftest import Agent

    from opsmgr.transport.local import LocalTransport
    from sprite_agent.contract.envelopes import ControlRequest
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
QUICK = RetryPolicy(attempts=3, budget=5.0, base=0.01, cap=0.02)
METHODS = ("GetInfo", "GetSnapshot", "ExecuteControl", "GetControl", "StreamEvents")


@dataclass(kw_only=True)
class Bare:
    """A status that is not the agent's: something on the way made it, or an agent of another kind."""

    code: grpc.StatusCode
    trailers: tuple[tuple[str, str | bytes], ...] = ()


class Never:
    """No answer at all."""


@dataclass
class FakeAgent:
    """Replays what it is told for each method, the last of it again and again; keeps the requests as they came.

    A step is a message or its bytes, an error that the agent would send, a `Bare` status,
    `Never`, a function of request and context, or for a stream a list of these.
    """

    steps: dict[str, list[Any]] = field(default_factory=dict)
    requests: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    metadata: list[dict[str, Any]] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)

    def next_step(self, method: str, request: bytes, context: Any) -> Any:
        """What to do with a request."""
        self.requests[method].append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.timeouts.append(context.time_remaining())
        steps = self.steps[method]
        return steps[min(len(self.requests[method]), len(steps)) - 1]

    async def unary(self, method: str, request: bytes, context: Any) -> bytes:
        """Handles a unary call."""
        return await _played(self.next_step(method, request, context), request, context)

    async def stream(self, method: str, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Handles a streaming call."""
        for step in self.next_step(method, request, context):
            yield await _played(step, request, context)


async def _played(step: Any, request: bytes, context: Any) -> bytes:
    if isinstance(step, Message):
        return step.SerializeToString()
    if isinstance(step, bytes):
        return step
    if isinstance(step, OpsError):
        trailers = (
            ("grpc-status-details-bin", to_status(step).SerializeToString()),
            ("x-ops-error-id", "a1b2"),
            ("x-ops-executed", {True: "true", False: "false", None: "unknown"}[step.executed]),
        )
        await context.abort(grpc.StatusCode[step.status], step.message, trailers)
    if isinstance(step, Bare):
        await context.abort(step.code, "as told", step.trailers)
    if step is Never:
        await asyncio.Event().wait()
    return cast("bytes", await step(request, context))


@contextlib.asynccontextmanager
async def faking(
    folder: Path, *, signer: Any = None, **steps: Any
) -> AsyncIterator[tuple[FakeAgent, SpriteServiceTransport]]:
    """A fake agent on a real server, and the transport to it."""
    fake = FakeAgent(dict(steps))
    server = grpc.aio.server()
    handlers: dict[str, Any] = {
        method: grpc.unary_unary_rpc_method_handler(functools.partial(fake.unary, method)) for method in METHODS[:-1]
    }
    handlers["StreamEvents"] = grpc.unary_stream_rpc_method_handler(functools.partial(fake.stream, "StreamEvents"))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    server.add_insecure_port(f"unix:{folder}/fake.sock")
    await server.start()
    credentials = Credentials(token=TOKEN, signer=signer)
    transport = SpriteServiceTransport(f"unix:{folder}/fake.sock", credentials=credentials, policy=QUICK)
    yield fake, transport
    await transport.close()
    await server.stop(0)


def wanted(**members: Any) -> ControlRequest:
    """A control request that does not wait."""
    return cast("ControlRequest", request(**{"confirmation": SKIPS, **members}))


async def all_events(transport: SpriteServiceTransport, **members: Any) -> list[Any]:
    """Every event of a subscription that ends by itself."""
    query = EventQuery(**{"loop_id": LOOP, **members})
    return [found async for batch in transport.events(query) for found in batch.events]


CALLS: dict[str, Callable[[SpriteServiceTransport], Awaitable[Any]]] = {
    "GetInfo": lambda transport: transport.info(),
    "GetSnapshot": lambda transport: transport.snapshot(LOOP),
    "ExecuteControl": lambda transport: transport.execute(wanted()),
    "GetControl": lambda transport: transport.get_control(LOOP, "key-1"),
    "StreamEvents": all_events,
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
UNARY = pytest.mark.parametrize("method", METHODS[:-1])


# No answer.


@EVERY_METHOD
async def test_where_nothing_listens_nothing_was_sent_after_as_many_tries_as_allowed(
    tmp_path: Path, method: str
) -> None:
    transport = SpriteServiceTransport(f"unix:{tmp_path}/none.sock", policy=QUICK)

    with pytest.raises(NotReached, match="no answer from unix:") as caught:
        await CALLS[method](transport)
    await transport.close()

    assert caught.value.executed is False
    assert caught.value.details == {"target": f"unix:{tmp_path}/none.sock", "grpcStatus": "UNAVAILABLE"}
    if method != "StreamEvents":  # which subscribe() tries again, from where it stands
        assert (transport.attempts.retries, list(transport.attempts.codes)) == (2, ["NOT_REACHED", "NOT_REACHED"])


async def test_a_name_that_leads_nowhere_is_looked_up_anew_by_each_try_and_nothing_was_sent(tmp_path: Path) -> None:
    credentials = Credentials(token=TOKEN, tls_ca=put(tmp_path / "ca.pem", Authority().pem))
    transport = SpriteServiceTransport("no-such-name.invalid:7443", credentials=credentials, policy=QUICK)
    channels = set()
    try:
        for _ in range(3):
            channels.add(transport._channel)  # noqa: SLF001  # it keeps what it was told of the name for minutes
            with pytest.raises(NotReached):
                await asyncio.wait_for(transport.info(), DEADLINE)
    finally:
        await transport.close()

    assert len(channels) == 3


@pytest.mark.parametrize("variable", ["http_proxy", "grpc_proxy", "https_proxy"])
async def test_what_goes_without_tls_goes_past_the_proxy_of_the_environment(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A proxy would be told the token."""
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        async with running(dataclasses.replace(config, listen="127.0.0.1:0")) as address:
            transport = SpriteServiceTransport(address, token=TOKEN, policy=QUICK)
            try:
                assert (await asyncio.wait_for(transport.info(), DEADLINE)).loops == [LOOP]
            finally:
                await transport.close()


async def test_where_no_port_is_open_nothing_was_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    transport = SpriteServiceTransport(f"127.0.0.1:{port}", policy=QUICK)

    with pytest.raises(NotReached, match=f"no answer from 127.0.0.1:{port}"):
        await transport.info()
    await transport.close()


@EVERY_METHOD
async def test_a_peer_that_accepts_and_says_nothing_gives_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(sprite_service, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(sprite_service, "COMMAND_ALLOWANCE", 0.3)
    policy = RetryPolicy(attempts=2, base=0.01)
    transport = SpriteServiceTransport(f"unix:{tmp_path}/silent.sock", policy=policy)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/silent.sock")
        silent.listen()

        with pytest.raises(NoAnswer):
            await asyncio.wait_for(CALLS[method](transport), DEADLINE)

        await transport.close()


@UNARY
async def test_an_agent_that_never_answers_gives_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(sprite_service, "READ_TIMEOUT", 0.1)
    monkeypatch.setattr(sprite_service, "COMMAND_ALLOWANCE", 0.1)
    async with faking(tmp_path, **{method: [Never]}) as (fake, transport):
        with pytest.raises(NoAnswer, match="DEADLINE_EXCEEDED"):
            await CALLS[method](transport)

        assert transport.attempts.retries == QUICK.attempts - 1
        assert len(fake.requests[method]) <= QUICK.attempts  # a slow machine may not even have connected in time


HEARTBEAT = 20.0
"""Seconds: a machine that stands still for a while is no silence."""
SILENT = 3 * HEARTBEAT


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    clock = LoopClock(monkeypatch)
    monkeypatch.setattr(silence, "time", SimpleNamespace(monotonic=clock.now))
    return clock


async def test_a_stream_that_falls_silent_is_dropped_after_three_heartbeats(tmp_path: Path, clock: LoopClock) -> None:
    async with faking(tmp_path, StreamEvents=[[batch(), Never]]) as (_, transport):
        batches = transport.events(EventQuery(loop_id=LOOP, follow=True, heartbeat_interval=HEARTBEAT))
        await anext(batches)
        reading = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)

        await clock.forward(SILENT - HEARTBEAT)
        assert not reading.done()
        await clock.forward(HEARTBEAT)
        with pytest.raises(NoAnswer, match="was silent for"):
            await asyncio.wait_for(reading, DEADLINE)


async def test_the_time_that_a_reader_takes_for_a_batch_is_no_silence(tmp_path: Path, clock: LoopClock) -> None:
    async with faking(tmp_path, StreamEvents=[[batch(), batch(), Never]]) as (_, transport):
        batches = transport.events(EventQuery(loop_id=LOOP, follow=True, heartbeat_interval=HEARTBEAT))
        await anext(batches)
        await clock.forward(2 * SILENT)

        await anext(batches)

        reading = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        await clock.forward(SILENT)
        with pytest.raises(NoAnswer, match="was silent for"):
            await asyncio.wait_for(reading, DEADLINE)


async def test_a_reader_that_is_cancelled_while_nothing_comes_is_cancelled(tmp_path: Path) -> None:
    async with faking(tmp_path, StreamEvents=[[batch(), Never]]) as (_, transport):
        batches = transport.events(EventQuery(loop_id=LOOP, follow=True, heartbeat_interval=HEARTBEAT))
        await anext(batches)
        reading = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0.1)
        reading.cancel()

        await asyncio.wait({reading})
        assert reading.cancelled()


async def test_a_stream_that_does_not_follow_is_dropped_when_it_is_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sprite_service, "READ_TIMEOUT", 0.2)
    async with faking(tmp_path, StreamEvents=[[Never]]) as (_, transport):
        with pytest.raises(NoAnswer):
            await all_events(transport)


@pytest.mark.parametrize(
    "code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL", "RESOURCE_EXHAUSTED"]
)
@EVERY_METHOD
async def test_a_status_that_is_not_the_agents_and_says_nothing_of_it_is_no_answer(
    tmp_path: Path, method: str, code: str
) -> None:
    step: Any = Bare(code=grpc.StatusCode[code])
    async with faking(tmp_path, **{method: [[step] if method == "StreamEvents" else step]}) as (fake, transport):
        with pytest.raises(NoAnswer) as caught:
            await CALLS[method](transport)

        assert caught.value.details["grpcStatus"] == code
        assert len(fake.requests[method]) == (1 if method == "StreamEvents" else QUICK.attempts)


# Refusals.


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "FAILED_PRECONDITION"])
@EVERY_METHOD
async def test_a_refusal_that_is_not_the_agents_is_not_tried_again(tmp_path: Path, method: str, code: str) -> None:
    step: Any = Bare(code=grpc.StatusCode[code])
    async with faking(tmp_path, **{method: [[step] if method == "StreamEvents" else step]}) as (fake, transport):
        with pytest.raises(TransportRefused, match=code) as caught:
            await CALLS[method](transport)

        assert (caught.value.executed, caught.value.details["grpcStatus"]) == (False, code)
        assert len(fake.requests[method]) == 1


@EVERY_METHOD
async def test_a_server_of_another_kind_refuses(tmp_path: Path, method: str) -> None:
    server = grpc.aio.server()
    server.add_insecure_port(f"unix:{tmp_path}/other.sock")
    await server.start()
    transport = SpriteServiceTransport(f"unix:{tmp_path}/other.sock", policy=QUICK)

    with pytest.raises(TransportRefused, match="UNIMPLEMENTED"):
        await CALLS[method](transport)

    await transport.close()
    await server.stop(0)


@EVERY_METHOD
async def test_a_refusal_of_the_agents_arrives_as_itself_and_is_not_tried_again(tmp_path: Path, method: str) -> None:
    step: Any = RunMismatch("run 2 is at hand", details={"runId": "2"})
    async with faking(tmp_path, **{method: [[step] if method == "StreamEvents" else step]}) as (fake, transport):
        with pytest.raises(RunMismatch) as caught:
            await CALLS[method](transport)

        assert (caught.value.message, caught.value.details) == ("run 2 is at hand", {"runId": "2"})
        assert (caught.value.error_id, caught.value.executed) == ("a1b2", False)
        assert len(fake.requests[method]) == 1


def future_reason() -> bytes:
    """A status with a reason that a later agent may have."""
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="as told")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="sprite-agent"))
    return bytes(status.SerializeToString())


def broken_detail() -> bytes:
    """A status whose detail does not hold what it says."""
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="as told")
    status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    return bytes(status.SerializeToString())


@pytest.mark.parametrize(
    "details",
    [b"", b"\xff\xff no status", future_reason(), broken_detail()],
    ids=["empty", "no status", "unknown reason", "broken detail"],
)
@pytest.mark.parametrize(("code", "raised"), [("UNAVAILABLE", NoAnswer), ("FAILED_PRECONDITION", TransportRefused)])
@pytest.mark.parametrize("method", ["GetSnapshot", "StreamEvents"])
async def test_details_that_are_not_understood_count_as_none(
    tmp_path: Path, method: str, code: str, raised: type[OpsError], details: bytes
) -> None:
    step: Any = Bare(code=grpc.StatusCode[code], trailers=(("grpc-status-details-bin", details),))
    async with faking(tmp_path, **{method: [[step] if method == "StreamEvents" else step]}) as (_, transport):
        with pytest.raises(raised):
            await CALLS[method](transport)


# Answers that are none.


BROKEN_SNAPSHOTS: dict[str, dict[str, Any]] = {
    "another version": {"schema_version": "v2"},
    "another envelope": {"envelope_type": "loop_run_event"},
    "no moment": {"emitted_at": "yesterday"},
    "no run id": {"run.run_id": ""},
    "iteration below 0": {"run.iteration": -1},
    "unset status": {"run.status": 0},
    "status from the future": {"run.status": 99},
    "summary that is no object": {"run.summary.json": "[1]"},
    "state that is no JSON": {"runtime.superloop_state.json": "{"},
    "no digest": {"artifacts.events.sha256": "xyz"},
}


@pytest.mark.parametrize("members", BROKEN_SNAPSHOTS.values(), ids=BROKEN_SNAPSHOTS.keys())
async def test_a_snapshot_that_breaks_the_schema_is_refused(
    local: LocalTransport, tmp_path: Path, members: dict[str, Any]
) -> None:
    snapshot = await local.snapshot(LOOP)
    answer = pb.GetSnapshotResponse(snapshot=mirror.snapshot_to_message(snapshot.envelope), resume_token="r1.x")  # noqa: S106  # no secret
    for path, value in members.items():
        *parts, last = path.split(".")
        setattr(functools.reduce(getattr, parts, answer.snapshot), last, value)
    async with faking(tmp_path, GetSnapshot=[answer]) as (fake, transport):
        with pytest.raises(ContractError):
            await transport.snapshot(LOOP)

        assert len(fake.requests["GetSnapshot"]) == 1


def batch(**members: Any) -> pb.StreamEventsResponse:
    """An empty batch, or one with parts of its own."""
    return pb.StreamEventsResponse(**{"emitted_at": MOMENT, **members})


def raw_event(text: str) -> dict[str, Any]:
    """An event with that for its raw line, and hardly anything else."""
    return {"source": {}, "cursor": {}, "run": {}, "event": {"raw": {"json": text}}}


UNSET: list[Any] = [
    pytest.param("GetSnapshot", pb.GetSnapshotResponse(), id="no snapshot"),
    pytest.param("ExecuteControl", pb.ExecuteControlResponse(), id="no result"),
    pytest.param("GetControl", pb.GetControlResponse(), id="no result of a key"),
    pytest.param("StreamEvents", [batch(events=[{}])], id="empty event"),
    pytest.param("StreamEvents", [batch(events=[raw_event("[1]")])], id="event that is no object"),
    pytest.param("StreamEvents", [batch(events=[raw_event("{}")])], id="event without a name"),
]


@pytest.mark.parametrize(("method", "answer"), UNSET)
async def test_an_answer_with_an_unset_part_is_refused_and_not_asked_for_again(
    tmp_path: Path, method: str, answer: Any
) -> None:
    async with faking(tmp_path, **{method: [answer]}) as (fake, transport):
        with pytest.raises(ContractError):
            await CALLS[method](transport)

        assert len(fake.requests[method]) == 1


@pytest.mark.parametrize("answer", [pb.ExecuteControlResponse(), b"\xff\xff"], ids=["unset", "no message"])
async def test_a_control_whose_answer_cannot_be_read_may_have_been_run(tmp_path: Path, answer: Any) -> None:
    """OK means that the journal has the key: to conclude that nothing was run would be wrong."""
    async with faking(tmp_path, ExecuteControl=[answer]) as (_, transport):
        with pytest.raises(OpsError) as caught:
            await transport.execute(wanted())

    assert caught.value.executed is None


@EVERY_METHOD
async def test_an_answer_that_is_no_message_is_an_error(tmp_path: Path, method: str) -> None:
    step: Any = b"\xff\xff"
    async with faking(tmp_path, **{method: [[batch(), step] if method == "StreamEvents" else step]}) as (_, transport):
        with pytest.raises(OpsError):
            await CALLS[method](transport)


# Trying again.


async def test_a_read_is_answered_once_the_agent_is_back(tmp_path: Path) -> None:
    steps = [Bare(code=grpc.StatusCode.UNAVAILABLE), JournalUnavailable("full"), pb.GetInfoResponse(repo_path="/repo")]
    async with faking(tmp_path, GetInfo=steps) as (_, transport):
        info = await transport.info()

    assert info.repo_path == "/repo"
    assert (transport.attempts.retries, list(transport.attempts.codes)) == (2, ["NO_ANSWER", "JOURNAL_UNAVAILABLE"])
    assert 0 <= transport.attempts.waited_seconds <= 0.04


async def test_what_the_agent_asks_to_wait_is_waited(tmp_path: Path) -> None:
    steps = [Draining("soon", retry_after=0.3), pb.GetInfoResponse()]
    async with faking(tmp_path, GetInfo=steps) as (_, transport):
        started = time.monotonic()
        await transport.info()

    assert time.monotonic() - started >= 0.3
    assert 0.3 <= transport.attempts.waited_seconds < 1


async def test_no_more_is_tried_than_the_policy_allows(tmp_path: Path) -> None:
    async with faking(tmp_path, GetInfo=[ControlBusy("busy")]) as (fake, transport):
        with pytest.raises(ControlBusy):
            await transport.info()

        assert len(fake.requests["GetInfo"]) == QUICK.attempts


async def test_no_longer_is_waited_than_the_budget_allows(tmp_path: Path) -> None:
    async with faking(tmp_path, GetInfo=[Draining("later", retry_after=QUICK.budget + 1)]) as (fake, transport):
        started = time.monotonic()
        with pytest.raises(Draining):
            await transport.info()

        assert len(fake.requests["GetInfo"]) == 1
    assert time.monotonic() - started < QUICK.budget


async def test_a_bug_of_the_agents_is_asked_about_again_with_the_same_key(tmp_path: Path) -> None:
    async with faking(tmp_path, ExecuteControl=[InternalError("internal error")]) as (fake, transport):
        with pytest.raises(InternalError) as caught:
            await transport.execute(wanted())

        assert caught.value.executed is None
        assert len(fake.requests["ExecuteControl"]) == QUICK.attempts


async def test_a_bug_of_the_agents_that_a_read_meets_is_not_asked_about_again(tmp_path: Path) -> None:
    async with faking(tmp_path, GetSnapshot=[InternalError("internal error")]) as (fake, transport):
        with pytest.raises(InternalError):
            await transport.snapshot(LOOP)

        assert len(fake.requests["GetSnapshot"]) == 1


async def test_an_answer_that_lost_its_trailers_on_the_way_does_not_say_that_nothing_was_run(tmp_path: Path) -> None:
    status = to_status(ControlBusy("busy")).SerializeToString()
    step = Bare(code=grpc.StatusCode.UNAVAILABLE, trailers=(("grpc-status-details-bin", status),))
    async with faking(tmp_path, ExecuteControl=[step]) as (_, transport):
        with pytest.raises(ControlBusy) as caught:
            await transport.execute(wanted())

    assert caught.value.executed is None


async def test_a_control_is_sent_again_byte_for_byte(tmp_path: Path) -> None:
    provenance = {"managerId": "m", "host": "h", "attempt": 1}
    async with faking(tmp_path, ExecuteControl=[Bare(code=grpc.StatusCode.UNAVAILABLE)]) as (fake, transport):
        with pytest.raises(NoAnswer):
            await transport.execute(wanted(provenance=provenance, note="looks right"))

        requests = fake.requests["ExecuteControl"]
    assert len(requests) == QUICK.attempts
    assert len(set(requests)) == 1


async def test_a_control_whose_answer_was_lost_is_run_once(tmp_path: Path, agent: Agent, repo: LoopFiles) -> None:
    repo.ask_approval()
    async with grpc.aio.insecure_channel(agent.address) as channel:
        real = service_pb2_grpc.SpriteAgentServiceStub(channel)

        async def forward(request: bytes, _: Any) -> bytes:
            message = pb.ExecuteControlRequest.FromString(request)
            answer = await real.ExecuteControl(message, metadata=agent.metadata, timeout=DEADLINE)
            return answer.SerializeToString()

        async def forward_and_lose(request: bytes, context: Any) -> bytes:
            await forward(request, context)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            return b""

        async with faking(tmp_path, ExecuteControl=[forward_and_lose, forward_and_lose, forward]) as (_, transport):
            result = await transport.execute(wanted())

    assert (result["status"], result["executed"], result["replayed"]) == ("executed_unconfirmed", True, True)
    assert len(executions(repo)) == 1


async def test_a_caller_that_is_cancelled_tries_no_more(tmp_path: Path) -> None:
    arrived = asyncio.Event()

    async def never(_request: bytes, _context: Any) -> None:
        arrived.set()
        await asyncio.Event().wait()

    async with faking(tmp_path, GetInfo=[never]) as (fake, transport):
        asking = asyncio.ensure_future(transport.info())
        await asyncio.wait_for(arrived.wait(), DEADLINE)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

        assert len(fake.requests["GetInfo"]) == 1


@pytest.mark.parametrize("milliseconds", ["0", "300"])
async def test_a_pushback_says_how_long_to_wait(tmp_path: Path, milliseconds: str) -> None:
    pushback = Bare(code=grpc.StatusCode.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", milliseconds),))
    async with faking(tmp_path, GetInfo=[pushback, pb.GetInfoResponse()]) as (_, transport):
        await transport.info()

    assert int(milliseconds) / 1000 <= transport.attempts.waited_seconds < int(milliseconds) / 1000 + 0.1


@pytest.mark.parametrize("text", ["-1", "never", "1.5", ""])
@pytest.mark.parametrize("agents", [False, True])
async def test_a_pushback_that_is_no_time_means_that_nothing_is_tried_again(
    tmp_path: Path, *, agents: bool, text: str
) -> None:
    details = (("grpc-status-details-bin", to_status(ControlBusy("busy")).SerializeToString()),) if agents else ()
    pushback = Bare(code=grpc.StatusCode.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", text), *details))
    async with faking(tmp_path, GetInfo=[pushback]) as (fake, transport):
        with pytest.raises(ControlBusy if agents else NoAnswer):
            await transport.info()

        assert len(fake.requests["GetInfo"]) == 1


@pytest.mark.parametrize("refusal", [RateLimited("too fast", retry_after=0.2), StreamLimit("64", retry_after=0.2)])
async def test_a_limit_is_tried_again_after_the_time_that_the_agent_names(tmp_path: Path, refusal: OpsError) -> None:
    async with faking(tmp_path, ExecuteControl=[refusal, LoopNotFound("no such loop")]) as (fake, transport):
        with pytest.raises(LoopNotFound):
            await transport.execute(wanted())

    assert len(fake.requests["ExecuteControl"]) == 2
    assert transport.attempts.waited_seconds >= 0.2
    assert list(transport.attempts.codes) == [refusal.reason]


# What is sent along.


class Numbering:
    """Signs with what it was given to sign and a number, so that every signature can be checked and told apart."""

    def __init__(self) -> None:
        self.count = 0

    def sign(
        self, method: str, body: bytes, *, token: str | None, actor: str | None = None, trace_id: str | None = None
    ) -> str:
        """The signature."""
        self.count += 1
        return f"{self.count} {method} {hashlib.sha256(body).hexdigest()} {token} {actor} {trace_id}"


def signed(fake: FakeAgent, method: str, *, actor: str | None = None, trace_id: str | None = None) -> list[str]:
    """What the signature of each request that came must be: of the very bytes that came."""
    return [
        f"{number} /{SERVICE_NAME}/{method} {hashlib.sha256(body).hexdigest()} {TOKEN} {actor} {trace_id}"
        for number, body in enumerate(fake.requests[method], 1)
    ]


@EVERY_METHOD
async def test_what_is_signed_is_what_is_sent(tmp_path: Path, method: str) -> None:
    step: Any = LoopNotFound("no such loop")
    steps: Any = {method: [[step] if method == "StreamEvents" else step]}
    async with faking(tmp_path, signer=Numbering(), **steps) as (fake, transport):
        with pytest.raises(LoopNotFound):
            await CALLS[method](transport)

    actor = "ada" if method == "ExecuteControl" else None
    assert [metadata["x-ops-signature"] for metadata in fake.metadata] == signed(fake, method, actor=actor)


async def test_a_trace_id_is_signed_as_well(tmp_path: Path) -> None:
    async with faking(tmp_path, signer=Numbering(), GetSnapshot=[LoopNotFound("none")]) as (fake, transport):
        with pytest.raises(LoopNotFound):
            await transport.snapshot(LOOP, trace_id="trace-1")

    assert fake.metadata[0]["x-ops-signature"] == signed(fake, "GetSnapshot", trace_id="trace-1")[0]


async def test_every_attempt_is_signed_anew_and_sends_the_same_bytes(tmp_path: Path) -> None:
    steps = [Bare(code=grpc.StatusCode.UNAVAILABLE), Draining("soon"), LoopNotFound("no such loop")]
    async with faking(tmp_path, signer=Numbering(), ExecuteControl=steps) as (fake, transport):
        with pytest.raises(LoopNotFound):
            await transport.execute(wanted(traceId="trace-1"))

    signatures = [metadata["x-ops-signature"] for metadata in fake.metadata]
    assert signatures == signed(fake, "ExecuteControl", actor="ada", trace_id="trace-1")
    assert len(signatures) == 3
    assert len(set(fake.requests["ExecuteControl"])) == 1


STALE = [SignatureStale("31 s old", details={"skewSeconds": 31}), SignatureReplayed("seen before")]


@pytest.mark.parametrize("refusal", STALE)
async def test_a_signature_that_came_late_or_twice_is_made_anew_at_once(tmp_path: Path, refusal: OpsError) -> None:
    async with faking(tmp_path, signer=Numbering(), GetInfo=[refusal, pb.GetInfoResponse()]) as (fake, transport):
        await transport.info()

    assert len({metadata["x-ops-signature"] for metadata in fake.metadata}) == 2
    assert (transport.attempts.waited_seconds, list(transport.attempts.codes)) == (0.0, [refusal.reason])


@pytest.mark.parametrize("refusal", STALE)
async def test_a_signature_is_made_anew_only_once(tmp_path: Path, refusal: OpsError) -> None:
    async with faking(tmp_path, signer=Numbering(), GetInfo=[refusal]) as (fake, transport):
        with pytest.raises(type(refusal)) as caught:
            await transport.info()

    assert len(fake.requests["GetInfo"]) == 2
    assert caught.value.attempts == 2
    assert caught.value.details == refusal.details


async def test_a_stream_is_signed_anew_once_after_each_progress(tmp_path: Path) -> None:
    stale, lost = STALE[0], Bare(code=grpc.StatusCode.UNAVAILABLE)
    steps: Any = [[stale], [batch(), lost], [stale], [batch(caught_up=True)]]
    async with faking(tmp_path, signer=Numbering(), StreamEvents=steps) as (fake, transport):
        batches = [found async for found in subscribe(transport, EventQuery(loop_id=LOOP), policy=QUICK)]

    assert len(batches) == 2
    assert [metadata["x-ops-signature"] for metadata in fake.metadata] == signed(fake, "StreamEvents")


async def test_a_stream_that_stays_stale_is_given_up(tmp_path: Path) -> None:
    async with faking(tmp_path, signer=Numbering(), StreamEvents=[[STALE[0]]]) as (fake, transport):
        with pytest.raises(SignatureStale):
            async for _ in subscribe(transport, EventQuery(loop_id=LOOP), policy=QUICK):
                pass

    assert len(fake.requests["StreamEvents"]) == 2


async def test_without_a_key_nothing_is_signed(tmp_path: Path) -> None:
    async with faking(tmp_path, GetInfo=[pb.GetInfoResponse()]) as (fake, transport):
        await transport.info()

    assert "x-ops-signature" not in fake.metadata[0]


@pytest.mark.parametrize(
    ("confirmation", "seconds"),
    [
        (SKIPS, 40),
        (LOOKS_ONCE, 40),
        ({"mode": "wait"}, 70),
        ({"mode": "wait", "timeoutSeconds": 60}, 100),
        ({"mode": "wait", "timeoutSeconds": 79}, 119),
    ],
)
async def test_a_control_has_a_deadline_for_its_turn_its_command_and_its_confirmation(
    tmp_path: Path, confirmation: dict[str, Any], seconds: float
) -> None:
    async with faking(tmp_path, ExecuteControl=[LoopNotFound("no such loop")]) as (fake, transport):
        with pytest.raises(LoopNotFound):
            await transport.execute(wanted(confirmation=confirmation))

    assert seconds - 2 < fake.timeouts[0] <= seconds + 1


async def test_a_read_has_a_deadline_and_a_stream_has_none(tmp_path: Path) -> None:
    async with faking(tmp_path, GetInfo=[pb.GetInfoResponse()], StreamEvents=[[batch()]]) as (fake, transport):
        await transport.info()
        await all_events(transport)

    assert 10 < fake.timeouts[0] <= 16
    assert fake.timeouts[1] is None


@EVERY_METHOD
async def test_the_token_goes_with_every_call(tmp_path: Path, method: str) -> None:
    step: Any = LoopNotFound("no such loop")
    async with faking(tmp_path, **{method: [[step] if method == "StreamEvents" else step]}) as (fake, transport):
        with pytest.raises(LoopNotFound):
            await CALLS[method](transport)

    assert [metadata["authorization"] for metadata in fake.metadata] == [f"Bearer {TOKEN}"]


async def test_a_query_is_sent_as_it_is(tmp_path: Path) -> None:
    async with faking(tmp_path, StreamEvents=[[batch()]]) as (fake, transport):
        await all_events(
            transport,
            after_line=7,
            max_events=3,
            follow=True,
            skip_malformed=True,
            heartbeat_interval=2.5,
            trace_id="t",
        )
        await all_events(transport, resume_token="r1.x", after_line=7)  # noqa: S106  # no secret

    one, two = (pb.StreamEventsRequest.FromString(sent) for sent in fake.requests["StreamEvents"])
    assert (one.event_line_offset, one.max_events, one.follow, one.skip_malformed) == (7, 3, True, True)
    assert (one.heartbeat_interval.ToMilliseconds(), one.trace_id) == (2500, "t")
    assert (two.WhichOneof("position"), two.resume_token) == ("resume_token", "r1.x")


async def test_what_the_fake_forwards_is_what_the_agent_says(tmp_path: Path, agent: Agent, repo: LoopFiles) -> None:
    """The fake itself adds nothing: an answer replayed by it is the answer."""
    repo.append(line(event()))
    async with grpc.aio.insecure_channel(agent.address) as channel:
        real = service_pb2_grpc.SpriteAgentServiceStub(channel)
        answer = await real.GetSnapshot(pb.GetSnapshotRequest(loop_id=LOOP), metadata=agent.metadata, timeout=DEADLINE)
    async with faking(tmp_path, GetSnapshot=[answer]) as (_, transport):
        snapshot = await transport.snapshot(LOOP)

    assert snapshot.envelope == mirror.snapshot_from_message(answer.snapshot)
    assert snapshot.resume_token == answer.resume_token
