"""What a subscription asks for and what it gets, on either transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import Cursor, EventEnvelope

DEFAULT_HEARTBEAT = 10.0
"""How long a following stream may be silent, in seconds."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRecord:
    """A record of the log that is not an event."""

    first_line: int
    last_line: int
    reason: str
    excerpt: str
    size_bytes: int
    sha256: str


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
