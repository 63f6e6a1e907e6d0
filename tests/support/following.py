"""Reads a subscription with a deadline, so that a batch that never comes fails the test."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Self

from sprite_agent.contract.streaming import EventQuery
from support.repos import LOOP
from support.waiting import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from sprite_agent.contract.streaming import EventBatch
    from sprite_agent.repo import Repo


async def come_to_rest(repo: Repo) -> None:
    """Returns once it is known for certain what the log holds, as that was read after it had last changed."""

    def is_known() -> bool:
        repo.read_loop(LOOP)
        return repo._log(LOOP).known() is not None  # noqa: SLF001  # nothing else tells

    await eventually(is_known, "the log is known")


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
        # No wait_for(): Python 3.11's forgets that it was cancelled where the batch comes in the same moment.
        async with asyncio.timeout(DEADLINE):
            batch = await anext(self._batches)
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


def subscribe(repo: Repo, **query: Any) -> Follower:
    """A subscription to the loop; one that follows beats every minute unless told otherwise."""
    return Follower(repo.stream_events(EventQuery(**{"loop_id": LOOP, "heartbeat_interval": 60.0, **query})))


async def replay(repo: Repo, **query: Any) -> list[EventBatch]:
    """Every batch of a subscription that ends by itself."""
    async with subscribe(repo, **query) as follower:
        return await follower.to_end()


def lines_of(batches: list[EventBatch]) -> list[int]:
    """The line numbers of the events in batches."""
    return [found["cursor"]["eventLineOffset"] for batch in batches for found in batch.events]
