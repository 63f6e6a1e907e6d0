"""Reads logs to the end, as the tests of records, index and readers need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprite_agent.event_log.pieces import Pace
from sprite_agent.event_log.record_reader import RecordReader
from sprite_agent.event_log.records import Run, judged
from support.repos import event, line

if TYPE_CHECKING:
    from sprite_agent.event_log.log import EventLog
    from sprite_agent.event_log.reader import LogReader
    from sprite_agent.event_log.records import Record


def fed(reader: RecordReader, data: bytes) -> list[Record]:
    """The records that `data` completes, judged."""
    return [record for found in reader.feed(data) for record in records_in(found)]


def records_in(found: Run | Record | None) -> list[Record]:
    """The records that were found together, judged."""
    records = [] if found is None else [judged(record) for record in found.records()]
    assert not isinstance(found, Run) or found.values in (None, [record.value for record in records])
    return records


def records_of(content: bytes) -> list[Record]:
    """The records of a whole log."""
    return fed(RecordReader(), content)


def numbered(count: int, first: int = 1, width: int = 0) -> bytes:
    """Lines with events as nearly all are, numbered."""
    return b"".join(line(event(data={"n": number, "text": "x" * width})) for number in range(first, first + count))


def taken(reader: LogReader, end: int) -> list[Record]:
    """The records up to byte `end` of the log."""
    found: list[Record] = []
    while not reader.at_end(end):
        pace = Pace()
        while (some := reader.take(end, pace)) is not None:
            found += records_in(some)
    return found


def rest(log: EventLog, reader: LogReader) -> list[Record]:
    """Everything from the reader's place to the end of the log; closes the reader."""
    with reader:
        return taken(reader, log.refresh().end)
