"""What has come last into a followed log, checked and in portions: each follower takes from it at its own pace."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.contract import clock
from sprite_agent.contract.streaming import EventBatch
from sprite_agent.event_log.newest import MAX_BATCH_BYTES, MAX_BATCH_EVENTS, MAX_PORTIONS

if TYPE_CHECKING:
    from sprite_agent.event_log.newest import Portion
    from sprite_agent.event_log.records import Position

_MAX_KEPT = 4 * 1024 * 1024
"""Bytes of records, about."""
_MAX_AGE = 2.0
"""Seconds, to twice as many. Whoever is that far behind reads for themselves, and all that is kept of many logs for
nobody would have the interpreter look through it for cycles.
"""


class News(NamedTuple):
    """What stands in the window from one portion on, as much of it as a batch may have."""

    next_number: int
    """Number of the portion after it; that of the first itself where there is none yet."""
    end: Position | None
    token: str
    """The resume token for its end; of no meaning where there is none yet."""
    at_end: bool
    """Whether it reaches to the end of the log."""
    batch: EventBatch | None
    """Of raw events, for all who are at the same place; None: there are none in it."""


class Window:
    """The last portions of one log, numbered from the first that there was. Belongs to one event loop."""

    def __init__(self) -> None:
        self._portions: deque[Portion] = deque()
        self._first = 0
        """Number of the first portion that is kept."""
        self._places: dict[int, int] = {}
        """Numbers of the portions by the offset they begin at, that of the next one included."""
        self._kept = 0
        self._old, self._noted_at = 0, 0.0
        """Before this number everything is as old as the moment at least; it goes with the next that is noted."""
        self._lines = 0
        self._is_all = True
        self._made: dict[int, News] = {}
        """Since it was told of the log last, by the number of the first portion."""

    def begin_anew(self, offset: int) -> None:
        """Forgets everything; the next portion begins at this offset."""
        self._first += len(self._portions) + 1  # no number is used twice
        self._portions.clear()
        self._places = {offset: self._first}
        self._kept = 0

    def append(self, portion: Portion) -> None:
        """Adds what comes next; where it does not go on from the last one, nothing older is kept."""
        if portion.start not in self._places:
            self.begin_anew(portion.start)
        self._portions.append(portion)
        self._places[portion.end.offset] = self._next_number
        self._kept += portion.size
        while len(self._portions) > 1 and (self._kept > _MAX_KEPT or len(self._portions) > MAX_PORTIONS):
            self._drop()

    def tell(self, *, lines: int, is_all: bool) -> None:
        """Notes how many lines the log had, and whether all of them are in; after every change."""
        self._lines, self._is_all = lines, is_all
        self._made.clear()
        if (now := time.monotonic()) - self._noted_at >= _MAX_AGE:
            while self._first < self._old and self._portions:
                self._drop()
            self._old, self._noted_at = self._next_number, now

    def number_at(self, offset: int) -> int | None:
        """The number of the portion that begins at an offset; None: there is none."""
        return self._places.get(offset)

    def news(self, number: int) -> News | None:
        """What there is from the portion of that number on; None: it is gone, or can't be sent as it is.

        Whoever asks for the same gets the same, for as long as it is true.
        """
        if number < self._first:
            return None
        made = self._made.get(number)
        if made is None or (made.batch is not None and made.batch.emitted_at != clock.now()):
            portions = self._from(number)
            if portions is None:
                return None
            made = self._made[number] = self._news(number, portions)
        return made

    def _drop(self) -> None:
        gone = self._portions.popleft()
        del self._places[gone.start]
        self._first += 1
        self._kept -= gone.size

    @property
    def _next_number(self) -> int:
        return self._first + len(self._portions)

    def _from(self, number: int) -> list[Portion] | None:
        """As many portions as a batch may have, and one at least if there is one."""
        found: list[Portion] = []
        events, size = 0, 0
        for at in range(number - self._first, len(self._portions)):
            portion = self._portions[at]
            if portion.events is None:
                return found or None
            events += portion.record_count
            size += portion.size
            if found and (events > MAX_BATCH_EVENTS or size > MAX_BATCH_BYTES):
                break
            found.append(portion)
        return found

    def _news(self, number: int, portions: list[Portion]) -> News:
        following = number + len(portions)
        at_end = self._is_all and following == self._next_number
        if not portions:
            return News(following, None, "", at_end, None)
        end, token = portions[-1].end, portions[-1].token
        raw_events = [event for portion in portions for event in portion.events or ()]
        batch = None
        if raw_events:
            batch = EventBatch(
                events=[],
                raw_events=raw_events,
                cursor={"eventLineOffset": raw_events[-1].last_line, "eventLineCount": self._lines},
                resume_token=token,
                caught_up=at_end,
                skipped=[],
                emitted_at=clock.now(),
            )
        return News(following, end, token, at_end, batch)
