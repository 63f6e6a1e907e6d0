"""The floors: the least that the same gRPC does for a call and for a line. Runs in workers, server and client apart."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import orjson

from opsmgr.transport.sprite_service import CHANNEL_OPTIONS
from sprite_agent.face.server import OPTIONS, THREADS
from tools.bench.processes import Server, Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

SERVICE = "bench.Floor"
NOOP = f"/{SERVICE}/Noop"
RELAY = f"/{SERVICE}/Relay"
BEAT = f"/{SERVICE}/Beat"
BATCH_LINES = 200
BATCH_BYTES = 128 * 1024
"""A batch of the relay ends with whichever comes first, as the agent's do."""

_PASSES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Relayed:
    """What a client of the relay has got."""

    size: int
    """Bytes."""
    seconds: float


_serving: list[grpc.aio.Server] = []
"""Keeps the server of this process alive."""


@contextlib.contextmanager
def floor() -> Iterator[Server]:
    """A bare server in a process of its own, with the agent's options and no checks."""
    with Worker() as worker:
        port = worker.call(_serve)
        yield Server(address=f"127.0.0.1:{port}", token="unchecked")  # noqa: S106  # sent as an agent's is


async def _serve() -> int:
    server = grpc.aio.server(migration_thread_pool=ThreadPoolExecutor(THREADS), options=OPTIONS)
    handlers: dict[str, Any] = {
        "Noop": grpc.unary_unary_rpc_method_handler(_noop),
        "Relay": grpc.unary_stream_rpc_method_handler(_relay),
        "Beat": grpc.unary_stream_rpc_method_handler(_beat),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _serving.append(server)
    return port


def _noop(_request: bytes, _context: grpc.ServicerContext) -> bytes:
    """Plain, as the agent's unary methods are: what reads files must not run in the event loop."""
    return b""


async def _relay(request: bytes, _context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    """The lines of the log at the path that was sent, as they are, in batches as large as the agent's."""
    batch: list[bytes] = []
    size = 0
    with Path(request.decode()).open("rb") as log:  # noqa: ASYNC230  # a floor has no threads
        for line in log:
            batch.append(line)
            size += len(line)
            if len(batch) == BATCH_LINES or size >= BATCH_BYTES:
                yield b"".join(batch)
                batch.clear()
                size = 0
    yield b"".join(batch)


async def _beat(request: bytes, _context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    """At once and then each second a message as large as one event, with the time at which it was made."""
    phase = float(request)
    while True:
        yield b"%-360d" % time.monotonic_ns()
        await asyncio.sleep(phase or 1.0)
        phase = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Beats:
    """Many bare streams, each over a channel of its own."""

    opened: float
    """Seconds until each had its first message."""
    delays: list[float]
    """Milliseconds that each later message took."""


async def beats(servers: Sequence[Server], streams: int, seconds: int) -> Beats:
    """Holds so many streams, spread over the servers, for so long. Runs in a worker."""
    delays: list[float] = []
    began, first = time.perf_counter(), []

    async def hold(number: int) -> None:
        target = servers[number % len(servers)]
        async with grpc.aio.insecure_channel(target.address, options=CHANNEL_OPTIONS) as channel:
            beat: Any = channel.unary_stream(BEAT)
            call = beat(b"%f" % (1 + number / streams), metadata=target.metadata)
            await call.read()
            first.append(time.perf_counter() - began)
            for _ in range(seconds):
                made = int(await call.read())
                delays.append((time.monotonic_ns() - made) / 1e6)
            call.cancel()

    await asyncio.gather(*(hold(number) for number in range(streams)))
    return Beats(opened=max(first), delays=delays)


async def relay_once(server: Server, log: Path) -> Relayed:
    """Takes a whole log from the relay. Runs in a worker."""
    began = time.perf_counter()
    async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        relay: Any = channel.unary_stream(RELAY)
        call = relay(str(log).encode(), metadata=server.metadata)
        size = 0
        while (batch := await call.read()) is not grpc.aio.EOF:
            size += len(batch)
    return Relayed(size=size, seconds=time.perf_counter() - began)


def parse_all(log: Path) -> float:
    """CPU seconds that orjson.loads takes for all lines of a log: the median of some passes, as one is short."""
    lines = log.read_bytes().splitlines()
    times = []
    for _ in range(_PASSES):
        began = time.process_time()
        for line in lines:
            orjson.loads(line)
        times.append(time.process_time() - began)
    return statistics.median(times)
