"""A proxy that does to connections what networks do: delays, slices, throttles, cuts, and silence."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from support.sockets import dial

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_CHUNK = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends RST, and what was not sent yet is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weather:
    """What one connection goes through. Bytes are counted on the way from the server to the client."""

    latency: float = 0.0
    """Seconds that each chunk takes at most; a random part of it."""
    slices: int | None = None
    """Chunks of at most so many bytes, of random size."""
    bandwidth: float | None = None
    """Bytes per second."""
    cut_after: int | None = None
    """Reset (RST) both ways after so many bytes."""
    end_after: int | None = None
    """Close (FIN) after so many bytes."""
    slow_close: float = 0.0
    """Seconds between the end of one side and the news of it to the other."""


FAIR = Weather()


class ChaosProxy:
    """Stands before a server, on TCP or a Unix socket as that does, for as long as its `async with` lasts.

    The ways of a connection can be silenced at any time: what is sent that way, its end included,
    is taken and goes nowhere, as if the other side had vanished from the network.
    """

    def __init__(self, target: str, weather: Callable[[], Weather] = lambda: FAIR, *, seed: int = 1) -> None:
        """`target` is a gRPC address; `weather` is asked for each connection in turn."""
        self._target = target
        self._weather = weather
        self._chance = random.Random(seed)  # noqa: S311  # the same slices each time
        self._open: set[asyncio.Task[None]] = set()
        self.silent_up = False
        """What clients send goes nowhere."""
        self.silent_down = False
        """What the server sends goes nowhere."""
        self.connections = 0
        self.cuts = 0
        """Connections that the weather has ended."""

    @property
    def address(self) -> str:
        """Where clients connect to."""
        if self._target.startswith("unix:"):
            return f"{self._target}.chaos"
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        if self._target.startswith("unix:"):
            self._server = await asyncio.start_unix_server(self._connected, self.address.removeprefix("unix:"))
        else:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connected(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            from_server, to_server = await dial(self._target)
        except OSError:
            _reset(to_client)
            return
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        weather = self._weather()
        up = asyncio.ensure_future(self._carry_up(from_client, to_server, weather))
        try:
            await self._carry_down(from_server, to_client, weather)
            await up
        except asyncio.CancelledError:
            pass  # the proxy ends
        except _Cut:
            self.cuts += 1
            _reset(to_client)
            _reset(to_server)
        finally:
            up.cancel()
            to_client.transport.abort()
            to_server.transport.abort()
            await asyncio.wait([up])
            self._open.discard(task)

    async def _carry_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, weather: Weather) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if not self.silent_up:
                    writer.write(chunk)
                    await writer.drain()
        if not self.silent_up:
            await _end(writer, weather)

    async def _carry_down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, weather: Weather) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while chunk := await reader.read(self._slice(weather, carried)):
                await asyncio.sleep(self._delay(weather, len(chunk)))
                if not self.silent_down:
                    writer.write(chunk)
                    await writer.drain()
                carried += len(chunk)
                if weather.cut_after is not None and carried >= weather.cut_after:
                    raise _Cut
                if weather.end_after is not None and carried >= weather.end_after:
                    self.cuts += 1
                    break
        if not self.silent_down:
            await _end(writer, weather)

    def _slice(self, weather: Weather, carried: int) -> int:
        most = self._chance.randint(1, weather.slices) if weather.slices else _CHUNK
        for limit in (weather.cut_after, weather.end_after):
            if limit is not None:
                most = min(most, max(1, limit - carried))
        return most

    def _delay(self, weather: Weather, size: int) -> float:
        throttled = size / weather.bandwidth if weather.bandwidth else 0.0
        return throttled + self._chance.uniform(0, weather.latency)


class _Cut(Exception):
    """The weather has ended a connection."""


async def _end(writer: asyncio.StreamWriter, weather: Weather) -> None:
    await asyncio.sleep(weather.slow_close)
    with contextlib.suppress(OSError):
        writer.close()
        await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST; on a Unix socket, which has none, it is just closed."""
    with contextlib.suppress(OSError):
        if (connection := writer.get_extra_info("socket")).family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
