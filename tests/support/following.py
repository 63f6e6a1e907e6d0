"""Reads a subscription with a deadline, so that a batch that never comes fails the test."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from sprite_agent.contract.streaming import EventBatch


class Follower:
    """One subscription and everything it has brought. Use it in an `async with`."""

    def __init__(self, batches: AsyncIterator[EventBatch]) -> None:
        self._batches = batches
        self.seen: list[EventBatch] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the subscription from the reader's side."""
        await contextlib.aclosing(self._batches).__aexit__()  # type: ignore[type-var]  # an async generator

    async def next(self) -> EventBatch:
        """The next batch."""
        batch = await asyncio.wait_for(anext(self._batches), DEADLINE)
        self.seen.append(batch)
        return batch

    async def until_lines(self, count: int) -> list[int]:
        """The line numbers of all events so far, once there are `count`."""
        while len(self.lines) < count:
            await self.next()
        return self.lines

    async def to_end(self) -> list[EventBatch]:
        """All batches, once the subscription has ended."""
        with contextlib.suppress(StopAsyncIteration):
            while True:
                await self.next()
        return self.seen

    @property
    def lines(self) -> list[int]:
        """The line numbers of all events so far."""
        return [event["cursor"]["eventLineOffset"] for batch in self.seen for event in batch.events]
