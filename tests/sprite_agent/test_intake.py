"""A call is answered whether its request comes whole, in pieces, late, or not at all."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2

from sprite_agent.contract.error_details import from_status
from sprite_agent.errors import RequestUndecodable, TokenMissing
from sprite_agent.face.intake import _Arrivals
from sprite_agent.face.server import SERVICE_NAME, running
from sprite_agent.quota import PER_MINUTE, Quota
from sprite_agent.v1 import service_pb2 as pb
from support.clocks import LoopClock
from support.http2 import connected, message
from support.repos import LOOP, event, line
from support.runtime import executions
from support.waiting import eventually, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Agent

    from sprite_agent.errors import OpsError
    from sprite_agent.face.config import ServeConfig
    from support.http2 import Answered, Http2Peer
    from support.repos import LoopFiles

METHODS = [
    f"/{SERVICE_NAME}/{name}" for name in ("GetInfo", "GetSnapshot", "StreamEvents", "ExecuteControl", "GetControl")
]
GET_INFO = METHODS[0]
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"


@pytest.fixture
async def peer(agent: Agent) -> AsyncIterator[Http2Peer]:
    async with connected(agent.address) as peer:
        yield peer


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has to arrive within a fraction of a second."""
    monkeypatch.setattr("sprite_agent.face.intake.ARRIVAL_TIMEOUT", 0.2)


def refusal(answer: Answered) -> OpsError:
    """The error the agent sent."""
    text = answer.headers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(text + "=" * (-len(text) % 4)))
    return from_status(status, executed=answer.headers["x-ops-executed"])


@pytest.mark.parametrize(
    "body",
    [b"", b"\0\0\0", message(b"abc", length=100), message(b"", length=1)],
    ids=["none", "prefix", "cut", "short"],
)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.rpartition("/")[2])
async def test_a_call_that_ends_without_a_whole_request_is_refused(
    agent: Agent, repo: LoopFiles, peer: Http2Peer, method: str, body: bytes
) -> None:
    stream = peer.begin(method, agent.metadata)
    peer.data(stream, body, end=True)

    refused = refusal(await peer.answer(stream))

    assert isinstance(refused, RequestUndecodable)
    assert "ended without a whole request" in refused.message
    assert refused.executed is False
    assert executions(repo) == []


@pytest.mark.parametrize("body", [None, b"", b"\0\0\0", message(b"abc", length=100)])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.rpartition("/")[2])
async def test_a_request_that_does_not_come_in_time_is_refused(
    soon: None, agent: Agent, peer: Http2Peer, method: str, body: bytes | None
) -> None:
    stream = peer.begin(method, agent.metadata)
    if body is not None:
        peer.data(stream, body)

    refused = refusal(await peer.answer(stream))

    assert isinstance(refused, RequestUndecodable)
    assert "no whole request has come within" in refused.message


async def test_requests_that_are_late_are_refused_each_in_its_time_and_those_that_came_go_on(
    monkeypatch: pytest.MonkeyPatch, agent: Agent, repo: LoopFiles, peer: Http2Peer
) -> None:
    clock = LoopClock(monkeypatch)
    monkeypatch.setattr("sprite_agent.face.intake.ARRIVAL_TIMEOUT", 3600.0)
    waits: list[None] = []  # an entry for each request that is waited for
    of = _Arrivals.of

    async def noted(arrivals: _Arrivals, context: Any) -> Any:
        waits.append(None)
        return await of(arrivals, context)

    monkeypatch.setattr(_Arrivals, "of", noted)

    async def begun() -> int:
        """A call whose request is waited for; its number."""
        before = len(waits)
        stream = peer.begin(GET_INFO, agent.metadata)
        await eventually(lambda: len(waits) > before, "it is waited for")
        return stream

    following = peer.begin(f"/{SERVICE_NAME}/StreamEvents", agent.metadata)
    peer.data(following, message(pb.StreamEventsRequest(loop_id=LOOP, follow=True).SerializeToString()), end=True)
    await peer.until(lambda: bool(peer.answers[following].body))

    late = [await begun()]
    await clock.forward(1800)
    late.append(await begun())
    await clock.forward(1900)
    await peer.answer(late[0])
    assert not peer.is_over(late[1])
    await clock.forward(1800)
    await peer.answer(late[1])
    late.append(await begun())  # nobody has waited meanwhile
    await clock.forward(3700)
    await peer.answer(late[2])

    assert all("no whole request has come within" in refusal(peer.answers[each]).message for each in late)
    told = len(peer.answers[following].body)
    repo.append(line(event()))
    await peer.until(lambda: len(peer.answers[following].body) > told)


@pytest.mark.parametrize("is_late", [True, False])
async def test_a_call_that_is_to_end_while_its_request_is_waited_for_ends(soon: None, *, is_late: bool) -> None:
    class Call:
        """One whose request does not come."""

        async def read(self) -> None:
            """Waits for ever; what ends that ends more."""
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                if is_late:
                    waiting.cancel()

    waiting = asyncio.ensure_future(_Arrivals().of(Call()))
    if not is_late:
        await asyncio.sleep(0)
        waiting.cancel()
    await asyncio.wait({waiting})

    assert waiting.cancelled()


async def test_a_request_that_comes_byte_by_byte_is_answered(agent: Agent, repo: LoopFiles, peer: Http2Peer) -> None:
    repo.append(line(event()))
    stream = peer.begin(f"/{SERVICE_NAME}/GetSnapshot", agent.metadata)
    for byte in message(pb.GetSnapshotRequest(loop_id=LOOP).SerializeToString()):
        peer.data(stream, bytes([byte]))
        await peer.flushed()
    peer.data(stream, b"", end=True)

    answer = await peer.answer(stream)

    assert answer.status == 0
    assert pb.GetSnapshotResponse.FromString(answer.body[5:]).snapshot.source.loop_id == LOOP


async def test_bytes_that_are_no_message_are_refused_without_the_parsers_text(peer: Http2Peer) -> None:
    stream = peer.begin(CHECK)
    peer.data(stream, message(b"\xff no message"), end=True)

    answer = await peer.answer(stream)

    assert isinstance(refusal(answer), RequestUndecodable)
    assert "class" not in answer.headers["grpc-message"]


async def test_requests_that_are_no_message_cause_so_many_log_lines_a_minute(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health is asked for without a token, so anybody can send them."""
    now = [0.0]
    monkeypatch.setattr("sprite_agent.face.intake.Quota", lambda: Quota(lambda: now[0]))

    async def refused(peer: Http2Peer, times: int) -> None:
        for _ in range(times):
            stream = peer.begin(CHECK)
            peer.data(stream, message(b"\xff no message"), end=True)
            await peer.answer(stream)

    with structlog.testing.capture_logs() as log:
        async with running(config) as address, connected(address) as peer:
            await refused(peer, PER_MINUTE + 30)
            flood = [entry for entry in log if entry["event"] == "call"]
            now[0] = 60.0
            await refused(peer, 1)

    assert len(flood) == PER_MINUTE
    assert [entry["left_out_before"] for entry in log if "left_out_before" in entry] == [30]


async def test_a_watcher_of_the_health_is_told_at_once(peer: Http2Peer) -> None:
    stream = peer.begin(WATCH)
    peer.data(stream, message(health_pb2.HealthCheckRequest(service=SERVICE_NAME).SerializeToString()), end=True)

    await peer.until(lambda: bool(peer.answers[stream].body))

    told = health_pb2.HealthCheckResponse.FromString(peer.answers[stream].body[5:])
    assert told.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", [*METHODS, WATCH], ids=lambda method: method.rpartition("/")[2])
async def test_nothing_is_left_of_a_caller_that_goes_before_its_request_has_come(agent: Agent, method: str) -> None:
    loop = asyncio.get_running_loop()
    before = len(asyncio.all_tasks())
    with structlog.testing.capture_logs() as log:
        async with connected(agent.address) as leaver:
            leaver.reset(leaver.begin(method, agent.metadata))
            leaver.begin(method, agent.metadata)
            await asyncio.to_thread(until, lambda: len(asyncio.all_tasks(loop)) > before + 1, "a call has begun")
        await asyncio.to_thread(until, lambda: len(asyncio.all_tasks(loop)) <= before, "its calls have ended")

    assert {entry["log_level"] for entry in log} <= {"info"}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.rpartition("/")[2])
async def test_a_stranger_is_refused_before_its_request_has_come(peer: Http2Peer, method: str) -> None:
    stream = peer.begin(method)

    assert isinstance(refusal(await peer.answer(stream)), TokenMissing)
