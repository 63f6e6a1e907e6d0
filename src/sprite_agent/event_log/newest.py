"""The records that have just come into a log, in portions that one response can carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.event_log.records import Position

if TYPE_CHECKING:
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
    records: list[Record]
    """Not yet judged."""


class Newest:
    """Keeps what the index of a log passes, for who follows the log: so it is read once for all of them.

    Lives while somebody follows. For one thread at a time: the log's lock guards it.
    """

    def __init__(self, start: Position) -> None:
        self._start = start.offset
        self._records: list[Record] = []
        self._size = 0
        self._portions: list[Portion] = []
        self._kept = 0

    def add(self, record: Record, trail: Trail) -> None:
        """Notes the next record."""
        size = len(record.text)
        if self._records and (len(self._records) == MAX_BATCH_EVENTS or self._size + size > MAX_BATCH_BYTES):
            # Before this record, not after the last one: of that place the trail may know nothing any more.
            end = Position(record.first_line - 1, record.end - record.size_bytes)
            self.cut(end, str(trail.token(end)))
        self._records.append(record)
        self._size += size

    def cut(self, end: Position, token: str) -> None:
        """Ends a portion where the index has got to."""
        if end.offset == self._start:
            return
        self._kept += self._size
        if self._kept > _MAX_KEPT:
            self._portions.clear()
            self._kept = self._size
        self._portions.append(Portion(self._start, end, token, self._records))
        self._start, self._records, self._size = end.offset, [], 0

    def take(self) -> list[Portion]:
        """The portions since the last call; where some are left out, the first does not begin where the last ended."""
        taken, self._portions, self._kept = self._portions, [], 0
        return taken
