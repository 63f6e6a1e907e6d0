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
        self._batches = _subscribed(transport, query, policy=policy, on_retry=on_retry)
        self._steps: Iterator[tuple[EventEnvelope | None, Position]] = iter(())
        """What is left of the last batch."""
        self._reading: asyncio.Future[Any] | None = None
        """The next batch. Who is cancelled while waiting leaves it to who asks next: a time limit loses nothing."""
        self._is_closed = False

    def __aiter__(self) -> AsyncIterator[EventEnvelope]:
        return self

    async def __anext__(self) -> EventEnvelope:
        while not self._is_closed:
            for event, position in self._steps:
                self.position = position
                if event is not None:
                    return event
            if (batch := await self._next()) is None:
                break
            if batch.caught_up and batch.cursor["eventLineCount"] < self.position.line:
                raise LogTruncated(
                    f"the log has {batch.cursor['eventLineCount']} lines, of which {self.position.line} were read"
                )
            self._steps = _steps(batch, self.position)
            for record in batch.skipped:
                self._on_malformed(record)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Ends it, also for another task that waits for its next event; `position` stays."""
        self._is_closed = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        await self._batches.aclose()

    def __del__(self) -> None:
        """Who drops it while a batch is on its way leaves nothing behind that waits for it."""
        if self._reading is not None:
            self._reading.cancel()

    async def _next(self) -> EventBatch | None:
        """The next batch; None: there is none, or this is closed."""
        reading = self._reading = self._reading or asyncio.ensure_future(anext(self._batches, None))
        await asyncio.wait({reading})
        if self._reading is reading:
            self._reading = None
        return None if self._is_closed else reading.result()


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


def _steps(batch: EventBatch, before: Position) -> Iterator[tuple[EventEnvelope | None, Position]]:
    """Each event that was not given yet, and the position just past it; at the end None, and that past the batch."""
    position = after = replace(before, line_count=batch.cursor["eventLineCount"], resume_token=batch.resume_token)
    for event in batch.events:
        if (line := event["cursor"]["eventLineOffset"]) > before.line:  # else it began within this batch
            position = replace(after, line=line)
            is_last = event is batch.events[-1]
            yield event, position if is_last else replace(position, resume_token=before.resume_token)
    yield None, position
