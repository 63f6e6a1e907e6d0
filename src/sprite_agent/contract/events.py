"""The event envelope that follows from a record of the log: a pure rule, applied on both sides of the wire."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from sprite_agent.contract import json_text
from sprite_agent.contract.json_text import member, open_object
from sprite_agent.contract.validation import members_check, validate
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import EventEnvelope, Json, Source

SEQUENCE_SOURCE = "cursor_event_line_offset"

_KIND = "loop_run_event"
_SOME_MEMBERS: Json = {
    "run": {"runId": "-", "iteration": 0},
    "event": {"timestamp": "-", "name": "-", "role": None, "status": None, "message": None, "payload": None, "raw": {}},
}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


class EventBuilder:
    """Applies the rule to the records of one batch. Lives as long as it is made.

    What all events of a batch share is validated once, and of each event the rest: so the
    schema has accepted every envelope as a whole, in two thirds of the time.
    """

    def __init__(self, *, source: Source, trace_id: str | None, emitted_at: str, line_count: int) -> None:
        """Takes what all events share.

        Raises:
            ContractError: no event that the schema accepts can have that.
        """
        self._accepts = members_check(_KIND, "run", "event")
        self._line_count = line_count
        self._shared: Any = {
            "schemaVersion": "v1",
            "envelopeType": _KIND,
            "emittedAt": emitted_at,
            "traceId": trace_id,
            "source": source,
        }
        validate(_KIND, self._envelope(0, _SOME_MEMBERS))

    def build(self, value: Json, text: str, line: int) -> EventEnvelope:
        """The envelope of the record whose last line has the number `line`; `value` is what its `text` holds.

        Raises:
            ContractError: it is no event that the schema accepts.
        """
        payload = value.get("data")
        if type(payload) is dict:
            payload = open_object(payload, text, "data")
        own = self._own(value, open_object(value, text), payload, line)
        return self._envelope(line, own)  # type: ignore[no-any-return]  # the schema has decided

    def check(self, value: Json, line: int) -> None:
        """Returns if `build` makes an envelope of this record.

        Raises:
            ContractError: it does not.
        """
        self._own(value, value, value.get("data"), line)

    def _own(self, value: Json, raw: Json, payload: Any, line: int) -> Json:
        """What an event does not share with the others: its run and itself."""
        # Written out, with a call only where a value is not as it nearly always is: this runs twice for every event.
        find = value.get
        iteration, name = find("iteration"), find("event")
        role, status, message = find("role"), find("status"), find("message")
        own = {
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
        try:
            if line >= 0 and self._accepts(own):
                return own
        except ValueError:
            pass  # no JSON value
        validate(_KIND, self._envelope(line, own))  # it says where
        return own

    def _envelope(self, line: int, own: Json) -> Any:
        return {
            **self._shared,
            "sequence": {"source": SEQUENCE_SOURCE, "value": line},
            "cursor": {"eventLineOffset": line, "eventLineCount": self._line_count},
            **own,
        }


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
