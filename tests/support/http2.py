"""A peer that writes its HTTP/2 frames itself, so that it can send what no gRPC client would."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from support.sockets import dial
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME = 16_384
"""Bytes of a frame, unless more was agreed."""
WINDOW = 65_535
"""Bytes that may be sent before the receiver says more, unless otherwise agreed."""
PLENTY = 2**30
CANCEL = 8


@dataclass(kw_only=True, slots=True)
class Answered:
    """What came back on one stream so far."""

    headers: dict[str, str] = field(default_factory=dict)
    """Of the response and its trailers."""
    body: bytes = b""
    reset: int | None = None
    ended: bool = False
    """Nothing more will come."""

    @property
    def status(self) -> int | None:
        """The gRPC status; None: the stream had none."""
        return int(self.headers["grpc-status"]) if "grpc-status" in self.headers else None


class Http2Peer:
    """One connection, in whatever way it is used. Make one with `connected`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._next_stream = 1
        self._fragments = b""
        self._echoed = False
        self._news = asyncio.Event()
        self._windows: dict[int, int] = {0: WINDOW}
        self._initial_window = WINDOW
        self.settings: dict[int, int] = {}
        """What the server has announced."""
        self.answers: dict[int, Answered] = {}
        self.goaway: int | None = None
        self.closed = False
        """The server has closed the connection."""

    def send(self, *frames: Frame | bytes) -> None:
        """Sends frames as they are, right or wrong; into a closed connection nothing."""
        if not self.closed:
            self._writer.write(b"".join(frame if isinstance(frame, bytes) else frame.serialize() for frame in frames))

    async def flushed(self) -> None:
        """Returns when the system has taken what was sent; what has come meanwhile was taken in."""
        with contextlib.suppress(OSError):
            await self._writer.drain()
        await asyncio.sleep(0)

    def begin(
        self,
        method: str | bytes,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        *,
        timeout: str = "60S",
        end: bool = False,
    ) -> int:
        """Opens a stream with the headers of a gRPC call; its number. The message is up to the caller."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.answers[stream] = Answered()
        self._windows[stream] = self._initial_window
        block = self._encoder.encode(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", method),
                (":authority", "localhost"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("grpc-timeout", timeout),
                *metadata,
            ]
        )
        parts = [block[at : at + FRAME] for at in range(0, len(block), FRAME)]
        first = HeadersFrame(stream, parts[0], flags=["END_STREAM"] if end else [])
        frames: list[HeadersFrame | ContinuationFrame] = [
            first,
            *(ContinuationFrame(stream, more) for more in parts[1:]),
        ]
        frames[-1].flags.add("END_HEADERS")
        self.send(*frames)
        return stream

    def data(self, stream: int, content: bytes, *, end: bool = False) -> None:
        """Sends content on a stream, whatever the window says."""
        parts = [content[at : at + FRAME] for at in range(0, len(content), FRAME)] or [b""]
        frames = [DataFrame(stream, part) for part in parts]
        if end:
            frames[-1].flags.add("END_STREAM")
        self.send(*frames)

    def reset(self, stream: int) -> None:
        """Takes a stream back."""
        self.send(RstStreamFrame(stream, CANCEL))

    async def heard_out(self) -> None:
        """Returns when the server has taken in all that was sent, or has closed the connection."""
        self._echoed = False
        self.send(PingFrame(opaque_data=b"and now?"))
        await self.until(lambda: self._echoed or self.closed)

    async def upload(self, stream: int, size: int, *, obedient: bool = True) -> int:
        """Sends so many bytes, unless the server ends the stream before; how many it sent.

        `obedient`: no more than the server's window allows.
        """
        sent = 0
        while sent < size and not self.is_over(stream):
            room = min(FRAME, size - sent)
            if obedient:
                await self.until(lambda: self._room(stream) > 0 or self.is_over(stream))
                room = min(room, self._room(stream))
            self.data(stream, bytes(room))
            self._windows[0] -= room
            self._windows[stream] -= room
            sent += room
            await self.flushed()
        return sent

    def _room(self, stream: int) -> int:
        return max(0, min(self._windows[0], self._windows[stream]))

    def is_over(self, stream: int) -> bool:
        """Whether nothing more will come on a stream."""
        return self.closed or self.answers[stream].ended

    async def answer(self, stream: int) -> Answered:
        """What came back on a stream, once nothing more will."""
        await self.until(lambda: self.is_over(stream))
        return self.answers[stream]

    async def until(self, fact: Callable[[], bool], deadline: float = DEADLINE) -> None:
        """Returns when `fact`, looked at whenever something was received, is true."""

        async def wait() -> None:
            while not fact():
                self._news.clear()
                await self._news.wait()

        await asyncio.wait_for(wait(), deadline)

    async def receive(self) -> None:
        """Takes in what the server sends, and answers what must be answered, until the connection ends."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame, length = Frame.parse_frame_header(memoryview(await self._reader.readexactly(9)))
                frame.parse_body(memoryview(await self._reader.readexactly(length)))
                self._take(frame)
                self._news.set()
        self.closed = True
        self._news.set()

    def _take(self, frame: Frame) -> None:
        answered = self.answers.get(frame.stream_id, Answered())
        match frame:
            case SettingsFrame() if "ACK" not in frame.flags:
                self._agree(frame.settings)
                self.send(SettingsFrame(flags=["ACK"]))
            case PingFrame() if "ACK" not in frame.flags:
                self.send(PingFrame(opaque_data=frame.opaque_data, flags=["ACK"]))
            case PingFrame():
                self._echoed = True
            case WindowUpdateFrame():
                self._windows[frame.stream_id] = self._windows.get(frame.stream_id, 0) + frame.window_increment
            case HeadersFrame() | ContinuationFrame():
                answered.headers.update(self._decoded(frame))
            case DataFrame():
                answered.body += frame.data
            case RstStreamFrame():
                answered.reset = frame.error_code
                answered.ended = True
            case GoAwayFrame():
                self.goaway = frame.error_code
        if "END_STREAM" in frame.flags:
            answered.ended = True

    def _agree(self, settings: dict[int, int]) -> None:
        self.settings.update(settings)
        window = settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, self._initial_window)
        for stream in self._windows.keys() - {0}:
            self._windows[stream] += window - self._initial_window
        self._initial_window = window

    def _decoded(self, frame: HeadersFrame | ContinuationFrame) -> dict[str, str]:
        """The headers that are complete with this frame."""
        self._fragments += frame.data
        if "END_HEADERS" not in frame.flags:
            return {}
        block, self._fragments = self._fragments, b""
        return {name.decode(): value.decode(errors="replace") for name, value in self._decoder.decode(block, raw=True)}


def message(content: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """Content with the prefix of a gRPC message, which may lie about its length."""
    return struct.pack(">BI", compressed, len(content) if length is None else length) + content


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Http2Peer]:
    """A peer that has introduced itself; its connection is closed at the end."""
    reader, writer = await dial(address)
    peer = Http2Peer(reader, writer)
    # All that the server may ever want to send is allowed at once.
    peer.send(
        PREFACE,
        SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: PLENTY}),
        WindowUpdateFrame(0, window_increment=PLENTY),
    )
    receiving = asyncio.ensure_future(peer.receive())
    try:
        await peer.until(lambda: bool(peer.settings) or peer.closed)
        yield peer
    finally:
        receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await receiving
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
