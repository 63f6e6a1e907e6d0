"""T18: what strangers and broken clients do to the agent before it knows who they are, and to what it takes in.

H10 (peers that say nothing, or never to the end), H11 (bodies), H12 (connections without use).
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hyperframe.frame import ContinuationFrame, HeadersFrame, PingFrame, SettingsFrame

from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.face.server import SERVICE_NAME
from support.figures import found
from support.http2 import FRAME, PREFACE, connected, message
from support.sockets import dial
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from conftest import AgentProgram
    from hyperframe.frame import Frame

    from support.http2 import Answered, Http2Peer

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
KNOWN = (("authorization", f"Bearer {TOKEN}"),)
STRANGER = ()
POLICY = RetryPolicy(attempts=20, budget=10.0, base=0.05, cap=0.2)

GOOD = 4.0
"""Seconds within which a good client is answered, whatever others do: one, and what a machine may stand still for."""
ROOM = 100
"""MiB that others may make the agent take."""
HANDSHAKE = 5.0
"""Seconds that a connection has to introduce itself."""

OK, CANCELLED, EXHAUSTED, UNAUTHENTICATED = 0, 1, 8, 16
REFUSED_STREAM = 7

GET_INFO = f"/{SERVICE_NAME}/GetInfo"
GET_SNAPSHOT = f"/{SERVICE_NAME}/GetSnapshot"


def who(metadata: tuple[Any, ...]) -> str:
    """Whether the agent can know who calls."""
    return "known" if metadata else "stranger"


BOTH = pytest.mark.parametrize("metadata", [STRANGER, KNOWN], ids=who)


class GoodClient:
    """A manager that asks all the time who answers."""

    def __init__(self, transport: SpriteServiceTransport) -> None:
        self._transport = transport
        self.asked = 0
        self.slowest = 0.0

    async def ask(self) -> None:
        """Asks until it is cancelled; tries again where a manager would."""
        while True:
            began = time.monotonic()
            await self._transport.info()
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.asked += 1
            await asyncio.sleep(0.01)  # as often as that

    def answered_on(self, times: int = 20) -> None:
        """Returns when it has been answered so many times more."""
        before = self.asked
        until(lambda: self.asked >= before + times, "a good client is answered")


class Process:
    """What the agent's process has taken, as the system counts it."""

    def __init__(self, pid: int) -> None:
        self._folder = Path("/proc") / str(pid)

    @property
    def peak(self) -> float:
        """The most memory it has ever had, in MiB."""
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    @property
    def threads(self) -> int:
        """How many it has now."""
        return len(list((self._folder / "task").iterdir()))

    @property
    def descriptors(self) -> int:
        """How many it has open now."""
        return len(list((self._folder / "fd").iterdir()))


class Scene:
    """An agent, a good client of it, and whoever else comes."""

    def __init__(self, address: str, process: Process, client: GoodClient) -> None:
        self.address = address
        self.process = process
        self.client = client

    async def suffers(self, attack: Coroutine[Any, Any, Any], name: str) -> Any:
        """What `attack` finds; fails unless the good client was served well meanwhile and nothing of it is left.

        It runs in a thread and event loop of its own, so that what it costs itself does not count.
        """
        memory, descriptors = self.process.peak, self.process.descriptors
        self.client.slowest = 0.0
        result = await asyncio.to_thread(asyncio.run, attack)
        await asyncio.to_thread(self.client.answered_on)
        await asyncio.to_thread(until, lambda: self.process.descriptors <= descriptors, "its connections are closed")
        grown = self.process.peak - memory
        found("T18", f"{name}: good client within {self.client.slowest * 1000:.0f} ms, memory +{grown:.0f} MiB")
        assert self.client.slowest < GOOD
        assert grown < ROOM
        return result


@pytest.fixture
async def scene(start_agent: Callable[..., AgentProgram]) -> AsyncIterator[Scene]:
    """The real program on TCP, asked by a good client all the time."""
    program = start_agent("--listen", "127.0.0.1:0")
    transport = SpriteServiceTransport(program.address(), token=TOKEN, policy=POLICY)
    client = GoodClient(transport)
    await transport.info()
    asking = asyncio.ensure_future(client.ask())
    await asyncio.to_thread(client.answered_on)
    yield Scene(program.address(), Process(program.process.pid), client)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await transport.close()


def statuses(*peers: Http2Peer) -> Counter[int | None]:
    """How the streams of these peers were answered; None: they were not."""
    return Counter(answer.status for peer in peers for answer in peer.answers.values())


# Connections and streams that lead nowhere.


@BOTH
async def test_requests_that_are_never_finished_hold_up_nobody(scene: Scene, metadata: tuple[Any, ...]) -> None:
    connections, each = 40, 50
    threads = scene.process.threads

    async def leave_unfinished() -> Counter[int | None]:
        async with contextlib.AsyncExitStack() as open_:
            peers = [await open_.enter_async_context(connected(scene.address)) for _ in range(connections)]
            for peer in peers:
                for _ in range(each):
                    peer.begin(GET_INFO, metadata)
                await asyncio.to_thread(scene.client.answered_on, 1)
                if metadata is STRANGER:
                    await peer.until(lambda: None not in statuses(peer))  # noqa: B023  # waited for here
            await asyncio.to_thread(scene.client.answered_on)
            assert scene.process.threads <= threads + 2
            return statuses(*peers)

    answers = await scene.suffers(
        leave_unfinished(), f"{connections * each:,} requests left unfinished, {who(metadata)}"
    )

    # Under such a load gRPC itself turns some away, as calls that were cancelled.
    assert answers.keys() <= ({UNAUTHENTICATED, CANCELLED} if metadata is STRANGER else {None, CANCELLED})
    assert answers[CANCELLED] < connections * each / 2


@pytest.mark.parametrize("request_", [b"", message(b"")], ids=["only the head", "the whole request"])
@BOTH
async def test_calls_that_are_taken_back_at_once_hold_up_nobody(
    scene: Scene, metadata: tuple[Any, ...], request_: bytes
) -> None:
    calls = 5_000

    async def take_back() -> None:
        async with connected(scene.address) as peer:
            for number in range(calls):
                stream = peer.begin(GET_INFO, metadata)
                if request_:
                    peer.data(stream, request_, end=True)
                peer.reset(stream)
                if number % 50 == 0:
                    await peer.flushed()
            await peer.heard_out()
            assert not peer.closed

    what = "whole requests" if request_ else "heads"
    await scene.suffers(take_back(), f"{calls:,} {what} taken back at once, {who(metadata)}")


async def test_connections_that_do_not_introduce_themselves_are_closed(scene: Scene) -> None:
    count = 400

    async def say_nothing() -> float:
        began = time.monotonic()
        sockets = [await dial(scene.address) for _ in range(count)]
        for _, writer in sockets[::2]:
            writer.write(PREFACE[:10])
        await asyncio.gather(*[asyncio.wait_for(_read_to_end(reader), DEADLINE) for reader, _ in sockets])
        for _, writer in sockets:
            writer.transport.abort()
        return time.monotonic() - began

    seconds = await scene.suffers(say_nothing(), f"{count} silent connections")

    assert seconds <= HANDSHAKE + GOOD
    found("T18", f"{count} silent connections: all closed within {seconds:.1f} s")


@pytest.mark.parametrize(
    "text",
    [b"POST /control HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n{}", b"\x16\x03\x01" + bytes(200), b"\0" * 5000],
    ids=["HTTP/1.1", "TLS", "zeros"],
)
async def test_a_connection_that_speaks_something_else_is_closed_at_once(scene: Scene, text: bytes) -> None:
    async def speak() -> None:
        reader, writer = await dial(scene.address)
        writer.write(text)
        await asyncio.wait_for(_read_to_end(reader), GOOD)
        writer.transport.abort()

    await scene.suffers(speak(), "another protocol")


async def _read_to_end(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(FRAME):
            pass


async def test_a_connection_has_only_so_many_streams(scene: Scene) -> None:
    async def open_many() -> Http2Peer:
        async with connected(scene.address) as peer:
            for _ in range(500):
                peer.begin(GET_INFO, KNOWN)
            most = peer.settings[SettingsFrame.MAX_CONCURRENT_STREAMS]
            await peer.until(lambda: sum(answer.ended for answer in peer.answers.values()) == 500 - most)
            await asyncio.to_thread(scene.client.answered_on)
            return peer

    peer = await scene.suffers(open_many(), "500 streams on one connection")

    resets = Counter(answer.reset for answer in peer.answers.values())
    assert resets.keys() == {REFUSED_STREAM, None}
    assert resets[None] <= 192


# Requests that are too much.


@pytest.mark.parametrize("how", ["as allowed", "regardless of the window"])
@BOTH
async def test_a_huge_request_is_refused_before_it_has_come(scene: Scene, metadata: tuple[Any, ...], how: str) -> None:
    size = 300_000_000

    async def upload() -> tuple[int, Answered, bool]:
        async with connected(scene.address) as peer:
            stream = peer.begin(GET_SNAPSHOT, metadata)
            peer.data(stream, message(b"", length=size))
            sent = await peer.upload(stream, size, obedient=how == "as allowed")
            return sent, await peer.answer(stream), peer.closed

    sent, answer, closed = await scene.suffers(upload(), f"300 MB request, {who(metadata)}, {how}")

    # What was still on its way may have had the connection reset before the answer was read.
    assert closed or answer.status == (EXHAUSTED if metadata else UNAUTHENTICATED)
    assert sent < size / 2


@BOTH
async def test_a_request_that_unpacks_to_a_huge_one_is_refused(scene: Scene, metadata: tuple[Any, ...]) -> None:
    bomb = gzip.compress(bytes(30_000_000))

    async def explode() -> Answered:
        async with connected(scene.address) as peer:
            stream = peer.begin(GET_SNAPSHOT, (*metadata, ("grpc-encoding", "gzip")))
            peer.data(stream, message(bomb, compressed=True), end=True)
            return await peer.answer(stream)

    answer = await scene.suffers(explode(), f"30 MB out of {len(bomb) // 1000} KB, {who(metadata)}")

    assert answer.status == (EXHAUSTED if metadata else UNAUTHENTICATED)


async def test_metadata_over_the_limit_is_refused(scene: Scene) -> None:
    async def ask() -> Answered:
        async with connected(scene.address) as peer:
            stream = peer.begin(GET_INFO, (*KNOWN, ("x-big", "x" * 20_000)))
            peer.data(stream, message(b""), end=True)
            return await peer.answer(stream)

    answer = await scene.suffers(ask(), "20 KB of metadata")

    assert answer.status == EXHAUSTED


def _endless_head(number: int) -> Frame:
    # A literal header that is not indexed, :path or so, of 200 bytes.
    block = b"\0\x07x-%05d\x7f\x49" % number + b"y" * 200
    return ContinuationFrame(1, block) if number else HeadersFrame(1, block)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("pieces of a head without end", _endless_head),
        ("pings", lambda _: PingFrame(opaque_data=b"12345678")),
        ("settings", lambda number: SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 65_535 + number % 2})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_flood_of_frames_holds_up_nobody(scene: Scene, name: str, make: Callable[[int], Frame]) -> None:
    frames = 20_000

    async def flood() -> None:
        async with connected(scene.address) as peer:
            for number in range(frames):
                peer.send(make(number))
                if number % 50 == 0:
                    await peer.flushed()
            await peer.heard_out()

    await scene.suffers(flood(), f"{frames:,} {name}")
