"""What one batch takes of what a reader finds: records that make events, some to skip, one that ends the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sprite_agent.contract.streaming import SkippedRecord
from sprite_agent.errors import ContractError, EventMalformed, OpsError
from sprite_agent.event_log.newest import MAX_BATCH_BYTES, MAX_BATCH_EVENTS, raw_events
from sprite_agent.event_log.pieces import Pace
from sprite_agent.event_log.records import Run, values_of

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.contract.events import EventBuilder
    from sprite_agent.contract.streaming import RawEvents
    from sprite_agent.event_log.reader import LogReader
    from sprite_agent.event_log.records import Record


@dataclass(slots=True)
class Gathered:
    """What a batch is made of."""

    events: list[EventEnvelope] = field(default_factory=list)
    raw_events: list[RawEvents] = field(default_factory=list)
    """Instead of events, where those are wanted."""
    skipped: list[SkippedRecord] = field(default_factory=list)
    last_line: int = 0
    """Where the last event stands; 0: there is none."""
    fault: EventMalformed | None = None
    """The malformed record that comes next, and is not to be skipped."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was taken."""
        return not (self.events or self.raw_events or self.skipped)


def gather(
    reader: LogReader, end: int, builder: EventBuilder, *, most: int | None, raw: bool, skip_malformed: bool
) -> Gathered:
    """Takes from a reader what one batch may have, and a short time allows; nothing past byte `end` is read.

    `most`: so many records are enough; None: as many as a batch may have.

    Raises:
        LogReplaced, LogTruncated, HistoryRewritten: the log was changed where the reader has already been, and nothing
            was taken yet.
    """
    reader.judge(values=not raw)
    gathered = Gathered()
    pace = Pace()
    records_left, bytes_left = MAX_BATCH_EVENTS if most is None else min(most, MAX_BATCH_EVENTS), MAX_BATCH_BYTES
    while records_left:
        found = _next(reader, end, pace, (records_left, bytes_left), is_first=gathered.is_empty)
        if found is None:
            break
        try:
            if raw:
                gathered.raw_events.append(raw_events(found, builder))
            else:
                gathered.events += _whole_events(found, builder)
        except ContractError as error:
            if isinstance(found, Run):
                reader.put_back(found)  # to look at each of its records
                continue
            if not skip_malformed:
                reader.put_back(found)
                gathered.fault = _malformed(found, error)
                break
            gathered.skipped.append(_skipped(found, error))
        else:
            gathered.last_line = found.last_line
        records_left -= found.record_count
        bytes_left -= len(found.text)
    return gathered


def _next(reader: LogReader, end: int, pace: Pace, room: tuple[int, int], *, is_first: bool) -> Run | Record | None:
    """What comes next, if the batch has room for it; there is always room for the first."""
    try:
        found = reader.take(end, pace, room)
    except OpsError:
        if is_first:
            raise
        return None  # first goes what was taken: the reader does not give it again
    if found is not None and len(found.text) > room[1] and not is_first:
        reader.put_back(found)
        return None
    return found


def _whole_events(found: Run | Record, builder: EventBuilder) -> list[EventEnvelope]:
    texts = found.lines if isinstance(found, Run) else [found.text]
    return builder.build(values_of(found), texts, found.event_line)


def _malformed(record: Record, error: ContractError) -> EventMalformed:
    where = f"line {record.first_line}"
    if record.last_line > record.first_line:
        where = f"lines {record.first_line} to {record.last_line}"
    return EventMalformed(
        f"{where} of the event log is malformed: {error}",
        details={"line": record.first_line, "lastLine": record.last_line},
    )


def _skipped(record: Record, error: ContractError) -> SkippedRecord:
    return SkippedRecord(
        first_line=record.first_line,
        last_line=record.last_line,
        reason=error.message,
        excerpt=record.excerpt,
        size_bytes=record.size_bytes,
        sha256=record.sha256,
    )
