"""Turns one record of the log into an event envelope, or says why it is none."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sprite_agent.contract import json_text
from sprite_agent.contract.json_text import OpenObject
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError
from sprite_agent.lifecycle import event_name

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import EventEnvelope, Source
    from sprite_agent.event_log.records import Record

SEQUENCE_SOURCE = "cursor_event_line_offset"

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_decode_data = json_text.member_decoder("data").decode


@dataclass(frozen=True, kw_only=True, slots=True)
class EventContext:
    """What all events of one batch share."""

    source: Source
    trace_id: str | None
    emitted_at: str
    line_count: int


def build_event(record: Record, context: EventContext) -> EventEnvelope:
    """The envelope of a record.

    Raises:
        ContractError: the record is no JSON object, or no event that the schema accepts.
    """
    line = record.value
    if line is None:
        raise ContractError(record.fault or "malformed")
    payload = line.get("data")
    if type(payload) is dict:
        payload = OpenObject(payload, bytes(_decode_data(record.text).data).decode())
    envelope: EventEnvelope = {
        "schemaVersion": "v1",
        "envelopeType": "loop_run_event",
        "emittedAt": context.emitted_at,
        "traceId": context.trace_id,
        "source": context.source,
        "sequence": {"source": SEQUENCE_SOURCE, "value": record.last_line},
        "cursor": {"eventLineOffset": record.last_line, "eventLineCount": context.line_count},
        "run": {"runId": line.get("run_id") or "unknown", "iteration": whole_number(line.get("iteration"))},
        "event": {
            "timestamp": line.get("timestamp"),  # type: ignore[typeddict-item]  # the schema decides below
            "name": event_name(line),
            "role": absent_if_empty(line.get("role")),
            "status": absent_if_empty(line.get("status")),
            "message": absent_if_empty(line.get("message")),
            "payload": payload,
            "raw": OpenObject(line, record.text.decode()),
        },
    }
    validate("loop_run_event", envelope)
    return envelope


def whole_number(value: Any) -> Any:
    """An iteration as the contract counts it: numeric strings count, what is no number is 0.

    A number that is not a whole one comes back as it is, for the schema to refuse.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        try:
            value = json_text.parse(value)
        except ContractError:
            return value  # beyond what a number can be
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


def absent_if_empty(value: Any) -> Any:
    """`value`, but None for an empty string."""
    return None if value == "" else value
