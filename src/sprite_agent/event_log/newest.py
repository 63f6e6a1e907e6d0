"""What has just come into a log, checked and in portions that one response can carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.contract.streaming import RawEvents
from sprite_agent.errors import ContractError
from sprite_agent.event_log.records import START, Run, values_of

if TYPE_CHECKING:
    from sprite_agent.contract.events import EventBuilder
    from sprite_agent.event_log.records import Position, Record
    from sprite_agent.event_log.resume import Trail

MAX_BATCH_EVENTS = 400
MAX_BATCH_BYTES = 128 * 1024
"""Of raw records; one that is longer makes a portion of its own."""
MAX_PORTIONS = 4096
_MAX_KEPT = 4 * 1024 * 1024
"""Portions, and bytes of them, that nobody has taken yet, about. What comes faster is read from the file."""


class Portion(NamedTuple):
    """What stands between two places of a log, both between records."""

    start: int
    """The offset it begins at."""
    end: Position
    token: str
    """The resume token for its end."""
    events: list[RawEvents] | None
    """Checked: each makes an envelope. None: a record in it is malformed."""
    record_count: int
    size: int
    """Bytes of its records."""


class Newest:
    """Keeps what the index of a log passes, for who follows the log: so it is read, and parsed, once for all of them.

    Lives while somebody follows. For one thread at a time: the log's lock guards it.
    """

    _start: int
    """The portion that is not cut yet: the offset it begins at; how many records and bytes it has; its events."""
    _records: int
    _size: int
    _events: list[RawEvents] | None

    def __init__(self, start: Position, builder: EventBuilder) -> None:
        self._builder = builder
        self._portions: list[Portion] = []
        self._kept = 0
        self._begin(start.offset)

    def room(self) -> tuple[int, int]:
        """How many records, and bytes, the next run may have."""
        if self._records == MAX_BATCH_EVENTS:
            return MAX_BATCH_EVENTS, MAX_BATCH_BYTES
        return MAX_BATCH_EVENTS - self._records, MAX_BATCH_BYTES - self._size

    def add(self, found: Run | Record, trail: Trail) -> None:
        """Checks and notes what comes next."""
        count, text = found.record_count, found.text
        if self._records and (self._records + count > MAX_BATCH_EVENTS or self._size + len(text) > MAX_BATCH_BYTES):
            # Before this, not after the last one: of that place the trail may know nothing any more.
            self.cut(found.start, str(trail.token(found.start)))
        self._records += count
        self._size += len(text)
        if self._events is None:
            return
        try:
            self._events.append(raw_events(found, self._builder))
        except ContractError:
            self._events = None

    def cut(self, end: Position, token: str) -> None:
        """Ends a portion where the index has got to."""
        if end.offset == self._start:
            return
        self._kept += self._size
        if self._kept > _MAX_KEPT or len(self._portions) == MAX_PORTIONS:
            self._portions.clear()
            self._kept = self._size
        self._portions.append(Portion(self._start, end, token, self._events, self._records, self._size))
        self._begin(end.offset)

    def take(self) -> list[Portion]:
        """The portions since the last call; where some are left out, the first does not begin where the last ended."""
        taken, self._portions, self._kept = self._portions, [], 0
        return taken

    def begin_anew(self) -> None:
        """Forgets everything: the log is another one, and read from its beginning."""
        self.take()
        self._begin(START.offset)

    def _begin(self, start: int) -> None:
        self._start = start
        self._records, self._size, self._events = 0, 0, []


def raw_events(found: Run | Record, builder: EventBuilder) -> RawEvents:
    """What was found as raw events.

    Raises:
        ContractError: a record in it is no event.
    """
    if not (isinstance(found, Run) and found.are_events):
        builder.check(values_of(found), found.event_line)
    return RawEvents(found.event_line, found.text.decode(), found.record_count)
