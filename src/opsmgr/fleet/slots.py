"""A bound on how many do something at once, which nobody can exhaust by standing still."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

PATIENCE = 2.0
"""Seconds without progress after which a slot is given back, whatever goes on."""


class Slots:
    """So many may do it at once. Lives as long as the daemon; belongs to one event loop."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    async def take(self) -> Slot:
        """Waits for a slot; release it, or enter it and leave."""
        await self._free.acquire()
        return Slot(self._free)


class Slot:
    """One's turn: over when it is released, or when nothing has moved for `PATIENCE`.

    A target that has frozen would otherwise keep the others waiting.
    """

    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free = free
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.TimerHandle | None = self._loop.call_later(PATIENCE, self.release)

    def progress(self) -> None:
        """Something has moved."""
        if self._end is not None:
            self._end.cancel()
            self._end = self._loop.call_later(PATIENCE, self.release)

    @property
    def is_over(self) -> bool:
        """Whether it is somebody else's by now."""
        return self._end is None

    def release(self) -> None:
        """Gives it back; once is enough."""
        if self._end is not None:
            self._end.cancel()
            self._end = None
            self._free.release()

    def __enter__(self) -> None:
        """It is taken already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
