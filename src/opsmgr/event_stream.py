"""One event after another, with a position to go on from after each."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opsmgr.subscription import subscribe
from sprite_agent.errors import LogTruncated

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from opsmgr.cursors import Position
    from opsmgr.transport.base import Transport
    from opsmgr.transport.retry import RetryPolicy
    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.contract.streaming import EventBatch, EventQuery, SkippedRecord
    from sprite_agent.errors import OpsError


class EventStream:
    """The events of a loop, to be iterated once. Made by `Client.events`; ends with `aclose`, or with its client."""

    def __init__(
        self,
        transport: Transport,
        query: EventQuery,
        *,
        start: Position,
        policy: RetryPolicy | None = None,
        on_malformed: Callable[[SkippedRecord], None] = lambda _: None,
        on_retry: Callable[[OpsError, float], None] | None = None,
    ) -> None:
        self.position = start
        """Just past the event that was given last. Store it once that is handled, and go on there another day."""
        self._on_malformed = on_malformed
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._events = self._read(_subscribed(transport, query, policy=policy, on_retry=on_retry))

    def __aiter__(self) -> AsyncIterator[EventEnvelope]:
        return self

    async def __anext__(self) -> EventEnvelope:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Ends it, also for another task that waits for its next event; `position` stays."""
        self._closing.set()
        try:
            await self._events.aclose()
        except RuntimeError:  # that other task is in it
            await self._ended.wait()

    async def _read(self, batches: AsyncGenerator[EventBatch]) -> AsyncGenerator[EventEnvelope]:
        begun_within = self.position.line  # of a batch, maybe: its token is that of the batch before
        try:
            async with contextlib.aclosing(batches):
                while (batch := await self._next(batches)) is not None:
                    for record in batch.skipped:
                        self._on_malformed(record)
                    if batch.caught_up and batch.cursor["eventLineCount"] < begun_within:
                        raise LogTruncated(
                            f"the log has {batch.cursor['eventLineCount']} lines, of which {begun_within} were read"
                        )
                    for event, position in _steps(batch, self.position):
                        if position.line > begun_within:
                            self.position = position
                            yield event
                    self.position = self.position.after(batch)
        finally:
            self._ended.set()

    async def _next(self, batches: AsyncGenerator[EventBatch]) -> EventBatch | None:
        """The next batch; None: there is none, or this is to end."""
        reading: asyncio.Future[Any] = asyncio.ensure_future(anext(batches, None))
        closing: asyncio.Future[Any] = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({reading, closing}, return_when=asyncio.FIRST_COMPLETED)
            # Who closes waits for the end: an event that came meanwhile would be given to one who may not come back.
            return None if self._closing.is_set() else reading.result()
        finally:
            closing.cancel()
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})


async def _subscribed(transport: Transport, query: EventQuery, **options: Any) -> AsyncGenerator[EventBatch]:
    """The batches of `query`; the first event comes alone: without its token a position would not say of which log."""
    if query.resume_token is None:
        async with contextlib.aclosing(subscribe(transport, replace(query, max_events=1), **options)) as batches:
            async for batch in batches:
                query = replace(query, resume_token=batch.resume_token)
                yield batch
    async with contextlib.aclosing(subscribe(transport, query, **options)) as batches:
        async for batch in batches:
            yield batch


def _steps(batch: EventBatch, before: Position) -> Iterator[tuple[EventEnvelope, Position]]:
    """Each event, and the position just past it."""
    for event in batch.events[:-1]:
        cursor = event["cursor"]
        yield event, replace(before, line=cursor["eventLineOffset"], line_count=cursor["eventLineCount"])
    if batch.events:
        yield batch.events[-1], before.after(batch)
