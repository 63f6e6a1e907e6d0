"""What a subscription has received of a loop and no pass has handled yet."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.contract.streaming import EventBatch, SkippedRecord
    from sprite_agent.errors import OpsError


MOST_EVENTS = 200
"""So many events are kept; of more, the first and the last tell all that a pass wants to know."""
MOST_RECORDS = 20
"""So many malformed records are told one by one: sandbox code that writes more fills no memory, drives no alarm out."""


def fold(events: list[EventEnvelope]) -> tuple[list[EventEnvelope], int]:
    """The first and the last of many events, and how many were between them; all of them, where their order is wrong.

    A pass asks where events begin and end, whether they rise, and which is the last: for a
    million of them it needs no more memory than for a few.
    """
    if len(events) <= MOST_EVENTS:
        return events, 0
    values = [member(event.get("sequence"), "value") for event in events]
    rising = all(value is not None for value in values) and all(low < high for low, high in pairwise(values))
    return ([events[0], events[-1]], len(events) - 2) if rising else (events, 0)


class Malformed(NamedTuple):
    """A record that is no event, or many of them in a row that are told together."""

    first: SkippedRecord
    last_line: int
    record_count: int


def malformed(records: list[SkippedRecord]) -> list[Malformed]:
    """Each by itself."""
    return [Malformed(record, record.last_line, 1) for record in records]


def fold_malformed(found: list[Malformed]) -> list[Malformed]:
    """The first of them as they are, the rest as one."""
    rest = found[MOST_RECORDS:]
    if not rest:
        return found
    return [
        *found[:MOST_RECORDS],
        Malformed(rest[0].first, rest[-1].last_line, sum(each.record_count for each in rest)),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """What a pass works on. It stays in the feed until the pass says that it is handled."""

    events: list[EventEnvelope]
    folded: int
    """How many further events were between them."""
    malformed: list[Malformed]
    end: int
    """The line up to which it is everything."""
    log: int
    """Which of the logs that the feed has had it is of."""
    is_whole: bool
    """False: of its events some were folded together with others, and can't be told from them."""


class Feed:
    """The batches of one loop in the order in which they arrived. Belongs to one event loop.

    The stream puts batches in; a pass looks at a portion, writes what follows from it, and
    says so: a pass that fails or is cancelled loses nothing.
    """

    def __init__(self) -> None:
        self._batches: deque[EventBatch] = deque()
        self._malformed: list[Malformed] = []
        self._received = 0
        self._handled = 0
        self._log = 0
        self._kept = 0
        self._split = 0
        self._folded: list[tuple[int, int, int]] = []
        """Lines of the first and of the last event, and how many were left out between them, of each fold."""
        self._more = asyncio.Event()
        self.lost: OpsError | None = None
        """Why the stream began anew with the first line, until a pass has written that."""
        self.is_overtaken = False
        """Whether a pass has written that, and handled some of the new log, before the stream was told."""

    @property
    def received(self) -> int:
        """The line up to which everything has been put in."""
        return self._received

    def put(self, batch: EventBatch) -> None:
        """Adds what the stream has brought."""
        if batch.events:
            self._batches.append(batch)
            self._kept += len(batch.events)
            if self._kept > 2 * MOST_EVENTS:
                self._fold()
        self._malformed += malformed(batch.skipped)
        if len(self._malformed) > 3 * MOST_RECORDS:
            before = [each for each in self._malformed if each.last_line <= self._split]
            self._malformed = fold_malformed(before) + fold_malformed(self._malformed[len(before) :])
        self._received = batch.cursor["eventLineCount" if batch.caught_up else "eventLineOffset"]
        self._more.set()

    def start_over(self, error: OpsError) -> None:
        """The log is another one, as `error` says: what is not handled of the old one is gone, the new one follows."""
        self._batches.clear()
        self._kept, self._folded, self._malformed = 0, [], []
        self._received = self._handled = self._split = 0
        self._log += 1
        self.lost = error

    async def reaches(self, line: int, *, within: float) -> bool:
        """Whether everything up to `line` is in; waits for that, `within` seconds."""
        try:
            async with asyncio.timeout(within):
                while self._received < line:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            return False
        return True

    def split(self, line: int) -> None:
        """From now on no events up to `line` are folded together with later ones: a pass will ask for the former."""
        self._split = line

    def portion(self, end: int, *, after: int = 0) -> Portion:
        """What is not handled yet, from behind line `after` up to line `end`."""
        begin = max(after, self._handled)
        return Portion(
            events=[event for batch in self._batches for event in batch.events if begin < _line(event) <= end],
            folded=sum(count for _, last, count in self._folded if begin < last <= end),
            malformed=[each for each in self._malformed if begin < each.last_line <= end],
            end=end,
            log=self._log,
            is_whole=not any(first < line < last for first, last, _ in self._folded for line in (begin, end)),
        )

    def handled(self, portion: Portion, lost: OpsError | None = None) -> None:
        """Lets go of a portion, and of whatever else is up to its end.

        `lost`: why the log is another one than before, as the pass was told or has found.
        """
        if portion.log != self._log:
            return  # of a log that is gone: the new one has not been looked at
        if lost is not self.lost:
            self.is_overtaken = True
        self._handled, self.lost = portion.end, None
        self._folded = [(first, last, count) for first, last, count in self._folded if last > portion.end]
        self._malformed = [each for each in self._malformed if each.last_line > portion.end]
        while self._batches and _line(self._batches[0].events[-1]) <= portion.end:
            self._kept -= len(self._batches.popleft().events)

    def _fold(self) -> None:
        """Puts all batches into one, which has the first and the last of their events, on either side of the split."""
        events = [event for batch in self._batches for event in batch.events if _line(event) > self._handled]
        kept: list[EventEnvelope] = []
        for side in (
            [event for event in events if _line(event) <= self._split],
            [event for event in events if _line(event) > self._split],
        ):
            ends, count = fold(side)
            if count:
                self._folded.append((_line(ends[0]), _line(ends[-1]), count))
            kept += ends
        self._batches = deque([replace(self._batches[-1], events=kept, skipped=[])] if kept else [])
        self._kept = len(kept)


def _line(event: EventEnvelope) -> int:
    return event["cursor"]["eventLineOffset"]
