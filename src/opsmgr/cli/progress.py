"""How far a long replay has got: one line on stderr, while somebody looks, gone at its end."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from opsmgr.transport.base import Transport
    from sprite_agent.contract.streaming import EventBatch, EventQuery

_EVERY = 0.1
"""Seconds between two looks at the line, at least."""
_CLEARED = "\r\x1b[K"


class Progress:
    """One line on a terminal, written over and over; nothing where `shown` is false."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._began = self._last = time.monotonic()
        self._events = 0

    def advance(self, batch: EventBatch) -> None:
        """Counts a batch; with the last one of the replay the line goes."""
        self._events += len(batch.events)
        now = time.monotonic()
        if batch.caught_up:
            self.clear()
        if batch.caught_up or not self._shown or now - self._last < _EVERY:
            return
        self._last = now
        line, lines = batch.cursor["eventLineOffset"], batch.cursor["eventLineCount"]
        rate = self._events / (now - self._began)
        self._write(f"{_CLEARED}line {line} of {lines}, {rate:.0f} events/s")

    def clear(self) -> None:
        """Takes the line away."""
        if self._shown:
            self._write(_CLEARED)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # who has closed the terminal does not look any more
            sys.stderr.write(text)
            sys.stderr.flush()


@contextlib.contextmanager
def progress(*, prints: bool) -> Iterator[Progress]:
    """The line of a replay, taken away at its end, however it ends.

    Args:
        prints: whether the command prints as it goes; then there is no line on a terminal that shows the printing too.
    """
    can_clear = os.environ.get("TERM", "dumb") != "dumb"
    line = Progress(shown=can_clear and sys.stderr.isatty() and not (prints and sys.stdout.isatty()))
    try:
        yield line
    finally:
        line.clear()


def counted(transport: Transport, line: Progress) -> Transport:
    """The same transport, whose batches of events advance the line."""
    return cast("Transport", _Counted(transport, line))


class _Counted:
    def __init__(self, transport: Transport, line: Progress) -> None:
        self._transport = transport
        self._line = line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    async def events(self, query: EventQuery) -> AsyncGenerator[EventBatch]:
        async with contextlib.aclosing(self._transport.events(query)) as batches:
            async for batch in batches:
                self._line.advance(batch)
                yield batch
