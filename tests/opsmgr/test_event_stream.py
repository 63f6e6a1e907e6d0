"""What a stream of events gives, and where it then stands, whatever its reader does meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.cursors import Position
from opsmgr.event_stream import EventStream
from opsmgr.transport.base import Attempts
from sprite_agent.contract.streaming import EventBatch, EventQuery
from support.repos import MOMENT
from support.waiting import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def batch(first: int, last: int, *, of: int) -> EventBatch:
    """The events of these lines, of a log that has so many."""
    cursors: list[Any] = [{"eventLineOffset": line, "eventLineCount": of} for line in range(first, last + 1)]
    return EventBatch(
        events=[{"cursor": cursor} for cursor in cursors],  # type: ignore[typeddict-item]  # what is looked at of one
        cursor=cursors[-1],
        resume_token=f"after {last}",
        caught_up=last == of,
        skipped=[],
        emitted_at=MOMENT,
    )


class Written:
    """A way to a log that gets these batches when it is told to, and no more."""

    def __init__(self, *batches: EventBatch) -> None:
        self.attempts = Attempts()
        self.written = asyncio.Event()
        self._batches = batches

    async def events(self, query: EventQuery) -> AsyncGenerator[EventBatch]:
        """See `Transport`."""
        if not query.max_events:
            await self.written.wait()
            for each in self._batches:
                yield each
        await asyncio.Event().wait()

    def read(self, start: Position) -> EventStream:
        """The events after this."""
        query = EventQuery(loop_id="a", follow=True, resume_token=start.resume_token)
        return EventStream(self, query, start=start)  # type: ignore[arg-type]  # no more is called


START = Position(resume_token="after 0")  # noqa: S106  # no secret


async def lines_of(stream: EventStream, count: int) -> list[int]:
    """The lines of the next so many events."""
    async with asyncio.timeout(DEADLINE):
        return [(await anext(stream))["cursor"]["eventLineOffset"] for _ in range(count)]


@pytest.mark.parametrize("rounds", range(8))
async def test_one_that_is_closed_just_as_an_event_comes_ends_also_if_its_reader_does_not_come_back(
    rounds: int,
) -> None:
    way = Written(batch(1, 1, of=1))
    stream = way.read(START)
    reader = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    way.written.set()
    for _ in range(rounds):  # of the event loop, until the event is with the reader
        await asyncio.sleep(0)

    async with asyncio.timeout(DEADLINE):
        await stream.aclose()
        await reader


async def test_a_reader_that_gives_up_waiting_loses_nothing() -> None:
    way = Written(batch(1, 2, of=2), batch(3, 3, of=3))
    stream = way.read(START)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(stream)
    way.written.set()

    assert await lines_of(stream, 3) == [1, 2, 3]
    await stream.aclose()


async def test_one_that_begins_within_a_batch_never_goes_back() -> None:
    way = Written(batch(3, 4, of=7))
    stream = way.read(Position(line=5, line_count=7, resume_token="after 2"))  # noqa: S106  # no secret
    way.written.set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await anext(stream)
    assert stream.position == Position(line=5, line_count=7, resume_token="after 4")  # noqa: S106  # no secret
    await stream.aclose()

    way = Written(batch(5, 7, of=7))
    stream = way.read(stream.position)
    way.written.set()
    assert await lines_of(stream, 2) == [6, 7]
    assert stream.position == Position(line=7, line_count=7, resume_token="after 7")  # noqa: S106  # no secret
    await stream.aclose()


async def test_one_that_is_dropped_while_it_waits_leaves_nothing_that_waits() -> None:
    stream = Written().read(START)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(stream)
    del stream

    await eventually(lambda: len(asyncio.all_tasks()) == 1, "only this test is left")
