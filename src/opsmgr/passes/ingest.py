"""What one pass takes in: a snapshot, and the events after the cursor up to where it was taken."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opsmgr.cursors import Position
from opsmgr.errors import NoAnswer
from opsmgr.passes.feed import fold, fold_malformed, malformed
from opsmgr.passes.thresholds import BALANCED
from opsmgr.subscription import subscribe
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import ContractError, HistoryRewritten, LogReplaced, LogTruncated

if TYPE_CHECKING:
    from opsmgr.agent_memory import AgentMemory, Escalation
    from opsmgr.passes.feed import Feed, Malformed, Portion
    from opsmgr.passes.thresholds import Thresholds
    from opsmgr.transport.base import Snapshot, Transport
    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.errors import OpsError

FEED_PATIENCE = 2.0
"""Seconds to wait for a feed to get to where a snapshot was taken; then the events are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconcileOptions:
    """What one reconcile was asked for."""

    loop_id: str
    trace_id: str | None = None
    run_id: str | None = None
    from_start: bool = False
    """Start at the first line, whatever the cursor says."""
    max_events: int = 0
    """Handle no more events than this; 0: all. With a feed: all that are in it."""
    thresholds: Thresholds = BALANCED
    skip_malformed: bool = False
    """Escalate malformed records and go on, instead of failing. With a feed: always."""


@dataclass(kw_only=True, slots=True)
class Pass:
    """What one reconcile has found so far."""

    started_at: str
    began: float
    """When it began, on the monotonic clock."""
    before: Position = field(default_factory=Position)
    after: Position = field(default_factory=Position)
    stage: str = "reconcile_failed"
    """What it means if it fails now."""
    snapshot: Snapshot | None = None
    events: list[EventEnvelope] = field(default_factory=list)
    """Of many, the first and the last."""
    folded: int = 0
    """How many further events were between them."""
    retries: int = 0
    """What the transport had tried again before, and waited for that, in seconds."""
    waited_seconds: float = 0.0
    malformed: list[Malformed] = field(default_factory=list)
    """Records that were passed over; of many, all but the first together."""
    portion: Portion | None = None
    """What of the feed is handled once this is written."""
    previous: dict[str, Any] | None = None
    """The state before."""
    sequence: dict[str, Any] | None = None
    """The ordering checks' memory, of where the cursor is."""
    state: dict[str, Any] | None = None
    """The state after, unless it failed."""
    lost: OpsError | None = None
    """Why the cursor no longer fitted the log, where it did not."""
    memory: AgentMemory | None = None
    """What is remembered of the agent, after this pass."""
    agent: list[Escalation] = field(default_factory=list)
    """What the memory finds wrong with what the agent says now."""
    failure: OpsError | None = None
    is_kept: bool = False
    """Whether state and cursor are on the disk."""


async def ingest(transport: Transport, options: ReconcileOptions, done: Pass, feed: Feed | None) -> None:
    """Takes the snapshot, and the events after the cursor up to where the snapshot was taken.

    Later events wait for the next reconcile: held against an older snapshot they would look like a contradiction.

    Raises:
        OpsError: it could not; `done.stage` says at what.
    """
    received = 0 if feed is None else feed.received
    done.stage = "snapshot_unavailable"
    done.snapshot = await transport.snapshot(options.loop_id, trace_id=options.trace_id, run_id=options.run_id)
    if done.memory is not None:
        done.agent = [*done.memory.look_at(transport.journal), *done.memory.look_into(done.snapshot.findings)]
    done.stage = "events_unavailable"
    if feed is not None and await _take(feed, done, done.snapshot, received):
        return
    skip = options.skip_malformed or feed is not None
    try:
        await _read_events(transport, options, done, done.snapshot, skip_malformed=skip)
    except (LogReplaced, LogTruncated, HistoryRewritten) as error:
        done.lost = error
        done.events, done.folded = [], 0
        done.malformed.clear()
        done.after = Position()
        await _read_events(transport, options, done, done.snapshot, skip_malformed=skip)


def failure_code(transport_name: str, stage: str, failure: OpsError) -> str:
    """The code of a pass that failed at a stage."""
    if stage.endswith("_unavailable") and transport_name == "sprite_service":
        if isinstance(failure, ContractError):
            return "service_response_invalid"
        if isinstance(failure, NoAnswer):
            return "service_request_failed"
    return stage


async def _take(feed: Feed, done: Pass, snapshot: Snapshot, received: int) -> bool:
    """Takes the events from the feed; whether it has them all.

    It has not where the stream lags behind, or where the log got shorter than what the
    stream has seen of it, and the stream has not noticed yet; or where the stream was so far
    ahead that events from both sides of the snapshot were folded together.
    """
    end = snapshot.envelope["cursor"]["eventLineCount"]
    feed.split(end)
    if feed.lost is not None:
        done.lost, done.after = feed.lost, Position()
    whole = not feed.is_overtaken and received <= end and await feed.reaches(end, within=FEED_PATIENCE)
    done.portion = feed.portion(end, after=done.after.line)
    if not (whole and done.portion.is_whole):
        return False
    done.events += done.portion.events
    done.folded += done.portion.folded
    done.malformed = fold_malformed(done.malformed + done.portion.malformed)
    done.after = _at_snapshot(done, snapshot, end)
    return True


async def _read_events(
    transport: Transport, options: ReconcileOptions, done: Pass, snapshot: Snapshot, *, skip_malformed: bool
) -> None:
    query = EventQuery(
        loop_id=options.loop_id,
        after_line=done.after.line,
        resume_token=done.after.resume_token,
        max_events=options.max_events,
        skip_malformed=skip_malformed,
        trace_id=options.trace_id,
    )
    end = snapshot.envelope["cursor"]["eventLineCount"]
    async with contextlib.aclosing(subscribe(transport, query)) as batches:
        async for batch in batches:
            within = [event for event in batch.events if event["cursor"]["eventLineOffset"] <= end]
            done.events, folded = fold(done.events + within)
            done.folded += folded
            records = [record for record in batch.skipped if record.last_line <= end]
            done.malformed = fold_malformed(done.malformed + malformed(records))
            if len(within) < len(batch.events) or any(record.last_line > end for record in batch.skipped):
                done.after = _at_snapshot(done, snapshot, end)
                return
            done.after = done.after.after(batch)


def _at_snapshot(done: Pass, snapshot: Snapshot, end: int) -> Position:
    line = done.events[-1]["cursor"]["eventLineOffset"] if done.events else done.after.line
    return Position(line=line, line_count=end, resume_token=snapshot.resume_token)
