"""A stream of events that is closed ends at once, whatever it was just about to give."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.cursors import Position
from opsmgr.event_stream import EventStream
from opsmgr.transport.base import Attempts
from sprite_agent.contract.streaming import EventBatch, EventQuery
from support.repos import MOMENT
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class OneEvent:
    """A way to a log that gets one event."""

    def __init__(self) -> None:
        self.attempts = Attempts()
        self.written = asyncio.Event()

    async def events(self, query: EventQuery) -> AsyncGenerator[EventBatch]:
        """See `Transport`."""
        del query
        await self.written.wait()
        cursor: Any = {"eventLineOffset": 1, "eventLineCount": 1}
        yield EventBatch(
            events=[{"cursor": cursor}],  # type: ignore[typeddict-item]  # what is looked at of one
            cursor=cursor,
            resume_token="t",  # noqa: S106  # no secret
            caught_up=True,
            skipped=[],
            emitted_at=MOMENT,
        )
        await asyncio.Event().wait()


@pytest.mark.parametrize("rounds", range(8))
async def test_a_stream_that_is_closed_just_as_an_event_comes_ends_also_if_its_reader_does_not_come_back(
    rounds: int,
) -> None:
    way = OneEvent()
    stream = EventStream(way, EventQuery(loop_id="a", follow=True), start=Position())  # type: ignore[arg-type]  # enough
    reader = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    way.written.set()
    for _ in range(rounds):  # of the event loop, until the event is with the reader
        await asyncio.sleep(0)

    async with asyncio.timeout(DEADLINE):
        await stream.aclose()
        await reader
