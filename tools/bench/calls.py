"""Single calls, timed: raw stubs over one channel each, alike for the agent and for the floor. Runs in workers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import grpc

from opsmgr.transport.messages import stream_request
from opsmgr.transport.sprite_service import CHANNEL_OPTIONS
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.v1 import service_pb2 as pb
from sprite_agent.v1 import service_pb2_grpc
from tools.bench.floors import NOOP

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tools.bench.processes import Server

_TIMEOUT = 30.0


async def noops(floor: Server, gaps: Sequence[float]) -> list[float]:
    """Milliseconds of no-op calls, after a pause each."""
    times: list[float] = []
    async with _channel(floor) as channel:
        call = channel.unary_unary(NOOP)
        await call(b"", metadata=floor.metadata, timeout=_TIMEOUT)
        for gap in gaps:
            await asyncio.sleep(gap)
            began = time.perf_counter()
            await call(b"", metadata=floor.metadata, timeout=_TIMEOUT)
            times.append((time.perf_counter() - began) * 1e3)
    return times


async def info(agent: Server) -> None:
    """Returns once an agent has answered."""
    async with _channel(agent) as channel:
        stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
        await stub.GetInfo(pb.GetInfoRequest(), metadata=agent.metadata, timeout=_TIMEOUT)


async def token_after(agent: Server, loop: str, line: int) -> str:
    """The token by which to resume after `line` of a loop; waits until the agent has read that far."""
    async with _channel(agent) as channel:
        stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
        request = pb.StreamEventsRequest(loop_id=loop, event_line_offset=line - 1, max_events=1)
        found = [batch.resume_token async for batch in stub.StreamEvents(request, metadata=agent.metadata)]
        return str(found[-1])


async def reads(
    agent: Server, floor: Server, loops: tuple[str, str], resume: tuple[int, str], order: Sequence[str]
) -> dict[str, list[float]]:
    """Milliseconds of each call, by its name, taken in this order.

    Args:
        agent: whom to ask.
        floor: the server of no-op calls.
        loops: one with a short log, and one with a long one.
        resume: where to resume in the long one: after a line, and by a token.
        order: names of the calls.
    """
    short, long = loops
    line, token = resume
    async with _channel(agent) as channel, _channel(floor) as floor_channel:
        stub: Any = service_pb2_grpc.SpriteAgentServiceStub(channel)
        noop: Any = floor_channel.unary_unary(NOOP)
        by_line = stream_request(EventQuery(loop_id=long, after_line=line))
        by_token = stream_request(EventQuery(loop_id=long, resume_token=token))

        async def snapshot(loop: str) -> None:
            await stub.GetSnapshot(pb.GetSnapshotRequest(loop_id=loop), metadata=agent.metadata, timeout=_TIMEOUT)

        async def no_op() -> None:
            await noop(b"", metadata=floor.metadata, timeout=_TIMEOUT)

        async def first_event(request: pb.StreamEventsRequest) -> None:
            stream = stub.StreamEvents(request, metadata=agent.metadata, timeout=_TIMEOUT)
            batch = await stream.read()
            if len(batch.events) + len(batch.raw_events) != 1:
                raise RuntimeError("the stream did not begin with the last event")
            stream.cancel()

        named: dict[str, Callable[[], Awaitable[None]]] = {
            "short": lambda: snapshot(short),
            "short again": lambda: snapshot(short),
            "long": lambda: snapshot(long),
            "noop": no_op,
            "noop again": no_op,
            "by line": lambda: first_event(by_line),
            "by token": lambda: first_event(by_token),
        }
        for call in named.values():
            await call()
        times: dict[str, list[float]] = {name: [] for name in named}
        for name in order:
            began = time.perf_counter()
            await named[name]()
            times[name].append((time.perf_counter() - began) * 1e3)
        return times


@contextlib.asynccontextmanager
async def _channel(server: Server) -> Any:
    async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield channel
