"""What a subscription asks for and what it gets, on either transport."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.contract.loop_ids import check_loop_id
from sprite_agent.errors import CursorInvalid, RequestInvalid, ResumeTokenInvalid

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import Cursor, EventEnvelope

DEFAULT_HEARTBEAT = 10.0
"""How long a following stream may be silent, in seconds."""
HEARTBEAT_RANGE = (0.1, 60.0)
MAX_TRACE_BYTES = 8 * 1024
"""Of a stream's trace id: each of the events of a batch may bear it, and all of them have to fit a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventQuery:
    """Which events of a loop, and whether to wait for more."""

    loop_id: str
    after_line: int = 0
    """Start after this line; 0: at the first. Not looked at where there is a token."""
    resume_token: str | None = None
    """Start after what this token covers."""
    max_events: int = 0
    """End after this many; 0: no limit."""
    follow: bool = False
    """Go on at the end of the log."""
    skip_malformed: bool = False
    """Report malformed records and go on, instead of failing."""
    heartbeat_interval: float = DEFAULT_HEARTBEAT
    """Longest silence of a following stream, in seconds."""
    trace_id: str | None = None


def check_texts(**texts: str | None) -> None:
    """Returns if each text has a form on the wire.

    Raises:
        RequestInvalid: one has a lone surrogate.
    """
    for name, text in texts.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            fault = f"a lone surrogate at character {error.start}"
            raise RequestInvalid(f"{name}: {fault}", violations=[(name, fault)]) from error


def check_query(query: EventQuery) -> None:
    """Returns if `query` can be asked; both sides check alike.

    Raises:
        LoopIdInvalid, CursorInvalid, ResumeTokenInvalid, RequestInvalid: by the field at fault.
    """
    check_loop_id(query.loop_id)
    check_texts(trace_id=query.trace_id)
    if not 0 <= query.after_line < 2**63:
        raise CursorInvalid(
            f"cursor {query.after_line} is no line; 0 starts from the first",
            violations=[("event_line_offset", "not within 0 to 2^63-1")],
        )
    if query.resume_token is not None and not query.resume_token.isascii():
        raise ResumeTokenInvalid(
            f"{query.resume_token[:80]!a} is not a resume token; leave it out to start from the first line",
            violations=[("resume_token", "not a token that an agent made")],
        )
    if len((query.trace_id or "").encode()) > MAX_TRACE_BYTES:
        raise RequestInvalid(
            f"the trace id of a stream may have {MAX_TRACE_BYTES} bytes; every event bears it",
            violations=[("trace_id", f"longer than {MAX_TRACE_BYTES} bytes")],
        )
    if query.max_events < 0:
        raise RequestInvalid(
            f"max_events {query.max_events} is negative; 0 means no limit", violations=[("max_events", "< 0")]
        )
    low, high = HEARTBEAT_RANGE
    if not low <= query.heartbeat_interval <= high:
        raise RequestInvalid(
            f"heartbeat interval {query.heartbeat_interval} s is not within {low} to {high} s",
            violations=[("heartbeat_interval", f"not within {low} to {high} s")],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRecord:
    """A record of the log that is not an event."""

    first_line: int
    last_line: int
    reason: str
    excerpt: str
    size_bytes: int
    sha256: str


class RawEvents(NamedTuple):
    """Events as the records they follow from (see `events.EventBuilder`): one, or several from consecutive lines."""

    line: int
    """Number of the first; of a record over several lines, which is always alone, that of its last line."""
    text: str
    """The records, verbatim, one a line."""
    record_count: int = 1
    """How many there are; 1: the text as a whole is the record."""

    @property
    def last_line(self) -> int:
        """Number of the last."""
        return self.line + self.record_count - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EventBatch:
    """Events in the order of the log, and where the stream stands after them."""

    events: list[EventEnvelope]
    cursor: Cursor
    """The line of the last event sent so far, and the log's end when this was read."""
    resume_token: str
    """Where to resume after everything sent so far. To be kept as a whole."""
    caught_up: bool
    """Everything the log held has been sent."""
    skipped: list[SkippedRecord]
    emitted_at: str
    raw_events: list[RawEvents] = field(default_factory=list)
    """Instead of events, where those were asked for: for whoever sends them on."""

    @property
    def event_count(self) -> int:
        """How many events there are, raw or not."""
        return len(self.events) + sum(raw.record_count for raw in self.raw_events)
