"""T17: clients that read slowly, or not at all, cost little, and hold up nobody."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from opsmgr.transport.sprite_service import CHANNEL_OPTIONS, SpriteServiceTransport
from sprite_agent.face.server import SERVICE_NAME
from sprite_agent.v1 import service_pb2 as pb
from support.figures import found, scaled
from support.repos import LOOP, event, line
from support.runtime import SKIPS
from support.runtime import request as asked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import AgentProgram

    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
METADATA = (("authorization", f"Bearer {TOKEN}"),)

pytestmark = pytest.mark.alone

STREAMS = scaled(40, 100)
RATE = 20_000
"""Bytes a second that one half of them reads; the other half reads nothing."""
ROOM = 8.0
"""MiB that each may make the agent take."""
CONTROLS = scaled(60, 1_000)
PROMPT = 0.25
"""Seconds within which 99 of 100 controls are answered."""

HOSTILE = {
    "events of 10 KB": line(event(text="x" * 10_000)) * 2_000,
    "events of 700 KB that are many times as large when parsed": (
        b'{"timestamp":"t","event":"x","data":{"a":[' + b"{}," * 230_000 + b"1]}}\n"
    )
    * 8,
    "malformed lines of two bytes": b"x\n" * 1_000_000,
    "an opening that takes long to follow": (b'{"a":\n' * 250 + b"[\n" + b"1,\n" * 340_000 + b"x\n") * 2,
}


def memory_of(program: AgentProgram) -> float:
    """What the agent holds in memory, in MiB."""
    status = Path(f"/proc/{program.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextlib.asynccontextmanager
async def slow_reader(address: str, *, reads: bool) -> AsyncIterator[None]:
    """A client on a connection of its own that follows the log, as slowly as that."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        method: Any = channel.unary_stream(
            f"/{SERVICE_NAME}/StreamEvents", request_serializer=pb.StreamEventsRequest.SerializeToString
        )
        call = method(pb.StreamEventsRequest(loop_id=LOOP, follow=True, skip_malformed=True), metadata=METADATA)

        async def read() -> None:
            async for message in call:
                await asyncio.sleep(len(message) / RATE if reads else 3600)

        reading = asyncio.create_task(read())
        yield
        assert not reading.done() or not reading.exception()
        reading.cancel()


async def seconds_of_controls(transport: SpriteServiceTransport, name: str, loop_id: str) -> list[float]:
    """How long each of many controls took that have nothing to run, shortest first."""
    took = []
    for number in range(CONTROLS):
        began = time.monotonic()
        await transport.execute(
            asked("cancel", loopId=loop_id, idempotencyKey=f"{name}-{number}", confirmation=SKIPS)  # type: ignore[arg-type]  # a request
        )
        took.append(time.monotonic() - began)
        await asyncio.sleep(0.02)  # a rate that a caller may have
    return sorted(took)


@pytest.mark.timeout(scaled(240, 600))
@pytest.mark.parametrize("log", HOSTILE.values(), ids=HOSTILE)
async def test_slow_readers_cost_little_memory_and_hold_up_no_control(
    start_agent: Callable[..., AgentProgram],
    repo: LoopFiles,
    tmp_path: Path,
    log: bytes,
    request: pytest.FixtureRequest,
) -> None:
    """T17. The controls are of another loop. What the disk alone takes is measured first."""
    repo.append(log)
    (repo.folder.parent / "other").mkdir()
    (repo.folder.parent / "other" / "events.jsonl").write_bytes(line(event()))
    agent = start_agent("--listen", f"unix:{tmp_path}/agent.sock", "--max-streams-per-caller", str(STREAMS + 1))
    transport = SpriteServiceTransport(agent.address(), token=TOKEN)
    alone = await seconds_of_controls(transport, "before", "other")
    before = memory_of(agent)

    async with contextlib.AsyncExitStack() as stack:
        for number in range(STREAMS):
            await stack.enter_async_context(slow_reader(agent.address(), reads=number % 2 == 0))
        meanwhile = await seconds_of_controls(transport, "meanwhile", "other")
        growth = memory_of(agent) - before
    await transport.close()

    slowest, slowest_alone = (took[len(took) * 99 // 100 - 1] for took in (meanwhile, alone))
    assert growth < ROOM * STREAMS
    assert slowest < max(PROMPT, 5 * slowest_alone)
    found(
        "T17",
        f"{STREAMS} slow readers of {request.node.callspec.id}: {growth / STREAMS:.1f} MiB each, "
        f"99 of 100 controls meanwhile within {slowest * 1000:.0f} ms (alone {slowest_alone * 1000:.0f} ms)",
    )
