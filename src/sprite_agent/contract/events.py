"""The event envelope that follows from a record of the log: a pure rule, applied on both sides of the wire."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sprite_agent.contract import json_text
from sprite_agent.contract.json_text import member, open_object
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import EventEnvelope, Json, Source

SEQUENCE_SOURCE = "cursor_event_line_offset"

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class EventContext:
    """What all events of one batch share."""

    source: Source
    trace_id: str | None
    emitted_at: str
    line_count: int


def build_event(value: Json, text: str, line: int, context: EventContext) -> EventEnvelope:
    """The envelope of the record whose last line has the number `line`; `value` is what its `text` holds.

    Raises:
        ContractError: it is no event that the schema accepts.
    """
    payload = value.get("data")
    if type(payload) is dict:
        payload = open_object(payload, text, "data")
    return _checked(value, open_object(value, text), payload, line, context)


def check_event(value: Json, line: int, context: EventContext) -> None:
    """Returns if `build_event` makes an envelope of this record.

    Raises:
        ContractError: it does not.
    """
    _checked(value, value, value.get("data"), line, context)


def _checked(value: Json, raw: Json, payload: Any, line: int, context: EventContext) -> EventEnvelope:
    # Written out, with a call only where a value is not as it nearly always is: this runs twice for every event.
    find = value.get
    iteration, name = find("iteration"), find("event")
    role, status, message = find("role"), find("status"), find("message")
    envelope: Any = {
        "schemaVersion": "v1",
        "envelopeType": "loop_run_event",
        "emittedAt": context.emitted_at,
        "traceId": context.trace_id,
        "source": context.source,
        "sequence": {"source": SEQUENCE_SOURCE, "value": line},
        "cursor": {"eventLineOffset": line, "eventLineCount": context.line_count},
        "run": {
            "runId": find("run_id") or "unknown",
            "iteration": iteration if type(iteration) is int else whole_number(iteration),
        },
        "event": {
            "timestamp": find("timestamp"),
            "name": find("type") if name is None else name,
            "role": None if role == "" else role,
            "status": None if status == "" else status,
            "message": None if message == "" else message,
            "payload": payload,
            "raw": raw,
        },
    }
    validate("loop_run_event", envelope)
    return envelope  # type: ignore[no-any-return]  # the schema has decided


def event_name(record: Json | None) -> Any:
    """The name in a record: its event, else (in older logs) its type."""
    name = member(record, "event")
    return member(record, "type") if name is None else name


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
