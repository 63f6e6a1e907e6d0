"""Followers of growing logs, each by a subscription over a transport of its own. Runs in workers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsmgr.fleet.slots import Slots
from opsmgr.subscription import subscribe
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery
from tools.bench.readers import Tally, tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from opsmgr.fleet.slots import Slot
    from sprite_agent.contract.streaming import EventBatch
    from tools.bench.processes import Server

_LOOK = 0.02
"""Seconds between two looks at whether everything has come."""
_LOST_AFTER = 20.0
"""Seconds without a line on a stream that should have more: they will not come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A loop, and from where to follow it."""

    server: Server
    loop: str
    after: int
    """Lines not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deliveries:
    """What followers have got."""

    delays: list[float]
    """Milliseconds from just before an event was written until it was here, validated; in the order of writing."""
    tally: Tally


class Followers:
    """Streams that follow, each over a transport of its own."""

    def __init__(self, places: Sequence[Place], slots: int) -> None:
        self._slots = Slots(slots) if slots else None
        self._behind = len(places)
        self._caught_up = asyncio.Event()
        self.each = [_Follower(place, self._count) for place in places]
        self._tasks = [asyncio.create_task(follower.run(self._slots)) for follower in self.each]

    async def caught_up(self) -> None:
        """Returns once all of them have come to the end of their log."""
        await _unless_failed(self._tasks, self._caught_up.wait())

    async def received(self, lines: int) -> None:
        """Returns once each has got so many events, or nothing has come for so long that what is missing is lost."""

        async def all_here() -> None:
            for follower in self.each:
                seen, since = -1, 0.0
                while len(follower.numbers) < lines:
                    if len(follower.numbers) != seen:
                        seen, since = len(follower.numbers), time.monotonic()
                    elif time.monotonic() - since > _LOST_AFTER:
                        break
                    await asyncio.sleep(_LOOK)

        await _unless_failed(self._tasks, all_here())

    def _count(self) -> None:
        """One more has caught up. Counted, as something to wait for in each would be measured with the streams."""
        self._behind -= 1
        if not self._behind:
            self._caught_up.set()

    async def close(self) -> None:
        """Ends them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


async def _unless_failed(tasks: Sequence[asyncio.Task[None]], work: object) -> None:
    """Waits for `work`, but no longer than until one of the tasks fails."""
    waiting = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine or a future
    await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            waiting.cancel()
            task.result()
            raise RuntimeError("a stream that follows has ended")


@dataclass(slots=True)
class _Follower:
    """One stream, and what came by it."""

    place: Place
    on_caught_up: Callable[[], None]
    """Called once."""
    has_caught_up: bool = False
    numbers: array[int] = field(default_factory=lambda: array("q"))
    """Lines that came. No list: its integers, thousands for each stream, would pass for memory of the manager."""
    written: array[int] = field(default_factory=lambda: array("q"))
    """When each stamped event was written; nanoseconds of the monotonic clock, as the next."""
    here: array[int] = field(default_factory=lambda: array("q"))

    async def run(self, slots: Slots | None) -> None:
        server = self.place.server
        transport = SpriteServiceTransport(server.address, token=server.token)
        query = EventQuery(loop_id=self.place.loop, after_line=self.place.after, follow=True)
        try:
            async with contextlib.aclosing(subscribe(transport, query)) as batches:
                await self._take(batches, slots)
        finally:
            await transport.close()

    async def _take(self, batches: AsyncIterator[EventBatch], slots: Slots | None) -> None:
        slot: Slot | None = None
        async for batch in batches:
            now = time.monotonic_ns()
            self.numbers.extend([event["cursor"]["eventLineOffset"] for event in batch.events])
            written = [found["at"] for event in batch.events if "at" in (found := event["event"]["payload"] or {})]
            self.written.extend(written)
            self.here.extend([now] * len(written))
            if (caught_up := batch.caught_up) and not self.has_caught_up:
                self.has_caught_up = True
                self.on_caught_up()
            del batch
            if slots is not None:
                slot = await _metered(slots, slot, caught_up=caught_up)


async def _metered(slots: Slots, slot: Slot | None, *, caught_up: bool) -> Slot | None:
    """As the supervisor of a fleet does it: whoever has not caught up needs a slot to go on."""
    if caught_up:
        if slot is not None:
            slot.release()
        return None
    if slot is None or slot.is_over:
        return await slots.take()
    slot.progress()
    return slot


_followers: list[Followers] = []
"""Of this process; one at a time."""


async def warm_up(place: Place) -> None:
    """Has this process load and allocate what the first stream needs."""
    await follow([place])
    await unfollow()


async def follow(places: Sequence[Place], slots: int = 0) -> float:
    """Opens streams; seconds until all have caught up. `slots`: how many may catch up at once, 0: all."""
    began = time.perf_counter()
    followers = Followers(places, slots)
    _followers.append(followers)
    await followers.caught_up()
    return time.perf_counter() - began


async def collect(lines: int) -> Deliveries:
    """What came, once each stream has got so many lines or gets no more; the streams are closed then."""
    followers = _followers[-1]
    await followers.received(lines)
    await asyncio.sleep(_LOOK)  # for what comes doubled
    await unfollow()
    total = Tally()
    stamps: list[tuple[int, int]] = []
    for follower in followers.each:
        total += tally(follower.numbers, follower.place.after + 1, follower.place.after + lines)
        stamps += zip(follower.written, follower.here, strict=True)
    stamps.sort()
    return Deliveries(delays=[(here - written) / 1e6 for written, here in stamps], tally=total)


async def unfollow() -> None:
    """Closes the streams and, at once, their connections.

    gRPC's calls are in cycles that hold the connection of a closed channel until they are looked for; in the rounds to
    come agents would send pings to all who have ever followed.
    """
    await _followers.pop().close()
    gc.collect()
