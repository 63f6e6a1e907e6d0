"""What has just come into a log, checked and in portions that one response can carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.errors import ContractError
from sprite_agent.event_log.records import START, Position, value_of

if TYPE_CHECKING:
    from sprite_agent.contract.events import EventBuilder
    from sprite_agent.contract.streaming import RawEvent
    from sprite_agent.event_log.records import Record
    from sprite_agent.event_log.resume import Trail

MAX_BATCH_EVENTS = 200
MAX_BATCH_BYTES = 128 * 1024
"""Of raw records; one that is longer makes a portion of its own."""
_MAX_KEPT = 4 * 1024 * 1024
"""Bytes that nobody has taken yet, about. What comes faster is read from the file."""


class Portion(NamedTuple):
    """What stands between two places of a log, both between records."""

    start: int
    """The offset it begins at."""
    end: Position
    token: str
    """The resume token for its end."""
    events: list[RawEvent] | None
    """Checked: each makes an envelope. None: a record in it is malformed."""
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
    _events: list[RawEvent] | None

    def __init__(self, start: Position, builder: EventBuilder) -> None:
        self._builder = builder
        self._portions: list[Portion] = []
        self._kept = 0
        self._begin(start.offset)

    def add(self, record: Record, trail: Trail) -> None:
        """Checks and notes the next record."""
        size = len(record.text)
        if self._records and (self._records == MAX_BATCH_EVENTS or self._size + size > MAX_BATCH_BYTES):
            # Before this record, not after the last one: of that place the trail may know nothing any more.
            end = Position(record.first_line - 1, record.end - record.size_bytes)
            self.cut(end, str(trail.token(end)))
        self._records += 1
        self._size += size
        if self._events is None:
            return
        try:
            self._builder.check(value_of(record), record.last_line)
        except ContractError:
            self._events = None
        else:
            self._events.append((record.last_line, record.text.decode()))

    def cut(self, end: Position, token: str) -> None:
        """Ends a portion where the index has got to."""
        if end.offset == self._start:
            return
        self._kept += self._size
        if self._kept > _MAX_KEPT:
            self._portions.clear()
            self._kept = self._size
        self._portions.append(Portion(self._start, end, token, self._events, self._size))
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
