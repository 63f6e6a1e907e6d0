"""Requests and answers of the agent's RPCs as messages, where the mirror of the contract does not do it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprite_agent.contract import control_mirror, mirror
from sprite_agent.contract.events import EventBuilder
from sprite_agent.contract.streaming import EventBatch, RawEvents, SkippedRecord
from sprite_agent.contract.validation import validate
from sprite_agent.v1 import service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.contract.envelopes import ControlResult, EventEnvelope
    from sprite_agent.contract.streaming import EventQuery


def stream_request(query: EventQuery) -> pb.StreamEventsRequest:
    """What asks for `query`."""
    request = pb.StreamEventsRequest(
        loop_id=query.loop_id,
        max_events=min(query.max_events, 2**63 - 1),
        follow=query.follow,
        skip_malformed=query.skip_malformed,
        trace_id=query.trace_id,
        raw_events=True,
    )
    if query.resume_token is None:
        request.event_line_offset = query.after_line
    else:
        request.resume_token = query.resume_token
    request.heartbeat_interval.FromNanoseconds(int(query.heartbeat_interval * 1e9))
    return request


def batch_from(message: pb.StreamEventsResponse, trace_id: str | None = None) -> EventBatch:
    """The batch in a response to a request with this trace id, be its events raw or not.

    Raises:
        ContractError: an event in it is none.
    """
    events = [mirror.event_from_message(event) for event in message.events]
    for event in events:
        validate("loop_run_event", event)
    if message.raw_events:
        events += _built(message, trace_id)
    return EventBatch(
        events=events,
        cursor={
            "eventLineOffset": message.cursor.event_line_offset,
            "eventLineCount": message.cursor.event_line_count,
        },
        resume_token=message.resume_token,
        caught_up=message.caught_up,
        skipped=[
            SkippedRecord(
                first_line=record.first_line,
                last_line=record.last_line,
                reason=record.reason,
                excerpt=record.excerpt,
                size_bytes=record.size_bytes,
                sha256=record.sha256,
            )
            for record in message.skipped
        ],
        emitted_at=message.emitted_at,
    )


def _built(message: pb.StreamEventsResponse, trace_id: str | None) -> Iterator[EventEnvelope]:
    """The events that follow from raw ones."""
    builder = EventBuilder(
        source={"repoPath": message.source.repo_path, "loopId": message.source.loop_id},
        trace_id=trace_id,
        emitted_at=message.emitted_at,
        line_count=message.cursor.event_line_count,
    )
    for raw in message.raw_events:
        yield from builder.whole(RawEvents(raw.line, raw.json, raw.record_count))


def result_from(message: Any) -> ControlResult:
    """The control result in a response.

    Raises:
        ContractError: it is none.
    """
    result = control_mirror.result_from_message(message)
    validate("control_result", result)
    return result
