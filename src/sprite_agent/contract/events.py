"""The event envelope that follows from a record of the log: a pure rule, applied on both sides of the wire."""

from __future__ import annotations

import functools
import io
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from sprite_agent.contract import json_text
from sprite_agent.contract.json_text import OpenObject, member
from sprite_agent.contract.validation import is_valid, members_check, validate
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sprite_agent.contract.envelopes import EventEnvelope, Json, Source
    from sprite_agent.contract.streaming import RawEvents

SEQUENCE_SOURCE = "cursor_event_line_offset"

_KIND = "loop_run_event"
PLAIN = {
    "run_id": "run/properties/runId",
    "iteration": "run/properties/iteration",
    "timestamp": "event/properties/timestamp",
    "event": "event/properties/name",
    "role": "event/properties/role",
    "status": "event/properties/status",
    "message": "event/properties/message",
    "data": "event/properties/payload",
}
"""Where in an envelope the members of a record come to stand. Provided that those of `NEEDED` are there, the rule
changes none but into what it has for one that is absent: so a record whose members are accepted makes an envelope that
is."""
NEEDED = ("timestamp", "event")
_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


class UsualRecord(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """A record as nearly all are, of members that the schema accepts where they come to stand, and no others.

    Others would have to be looked at, for what is no JSON value.
    """

    timestamp: _Text
    event: _Text
    loop_id: str = ""
    run_id: _Text = ""
    iteration: _Count = 0
    role: str | None = None
    status: str | None = None
    message: str | None = None
    data: dict[str, Any] | None = None


_decode_usual = msgspec.json.Decoder(UsualRecord).decode


def usual_lines(lines: Sequence[bytes]) -> int:
    """How many of these, up to the first that is otherwise, are usual records: `EventBuilder.check` accepts them.

    Half of the time that it takes to make objects of them and ask the schema.
    """
    count, depth = 0, json_text.MAX_DEPTH
    try:
        for line in lines:
            if len(line) > 2 * depth and json_text.is_deeper(line, depth):
                break
            _decode_usual(line)
            count += 1
    except (UnicodeError, msgspec.DecodeError):
        pass
    return count


class EventBuilder:
    """Applies the rule to the records of one batch. Lives as long as it is made.

    The first and the last envelope are validated as a whole, and with them what all share, and the numbers that rise
    from one to the other; of those between what their records bring: so the schema has accepted every one of them. It
    is asked about all at once, and only where it refuses about each: so what is done for every event is as little as
    can be.
    """

    def __init__(self, *, source: Source, trace_id: str | None, emitted_at: str, line_count: int) -> None:
        """Takes what all events share."""
        self._are_plain = _plain_check()
        self._source = source
        self._trace_id = trace_id
        self._emitted_at = emitted_at
        self._line_count = line_count

    def build(self, values: Sequence[Json], texts: Sequence[bytes], line: int) -> list[EventEnvelope]:
        """The envelopes of records, each of which has a line; `values` are what their `texts` hold, line ends or not.

        `line`: number of the first; of a record over several lines, which is always alone, that of its last line.

        Raises:
            ContractError: one is no event that the schema accepts.
        """
        envelopes = self._envelopes(values, texts, line)
        first, last = envelopes[0], envelopes[-1]
        if not (is_valid(_KIND, first) and (first is last or (is_valid(_KIND, last) and self._are_plain(values)))):
            _validate(envelopes)
        return envelopes

    def whole(self, raw: RawEvents) -> list[EventEnvelope]:
        """The envelopes of raw events.

        Raises:
            ContractError: they are not what they are said to be, or one is no event that the schema accepts.
        """
        text = raw.text.encode("utf-8", "surrogatepass")
        texts = [text] if raw.record_count == 1 else io.BytesIO(text).readlines()  # a third of what split() takes
        if not 0 < raw.record_count == len(texts):
            raise ContractError(f"{raw.record_count} raw events are {len(texts)} lines of text")
        values = json_text.objects_in(texts)
        values += map(json_text.object_in, texts[len(values) :])
        return self.build(values, texts, raw.line)

    def check(self, values: Sequence[Json], line: int) -> None:
        """Returns if `build` makes envelopes of these records, the first of which has this line: 1 or a later one.

        Raises:
            ContractError: it does not.
        """
        if not self._are_plain(values):
            _validate(self._envelopes(values, [None] * len(values), line))

    def _envelopes(self, values: Sequence[Json], texts: Sequence[bytes | None], line: int) -> list[Any]:
        """What follows from records, each with its own text where that is given."""
        # In one loop, with a call only where a value is not as it nearly always is, open objects made on the spot, and
        # a copy of what all have: a seventh less for every event than a call for each that writes all of it.
        shared: dict[str, Any] = {
            "schemaVersion": "v1",
            "envelopeType": _KIND,
            "emittedAt": self._emitted_at,
            "traceId": self._trace_id,
            "source": self._source,
            "sequence": None,
            "cursor": None,
            "run": None,
            "event": None,
        }
        envelopes, line_count = [], self._line_count
        for value, text in zip(values, texts, strict=True):
            find = value.get
            iteration, name, payload, raw = find("iteration"), find("event"), find("data"), value
            role, status, message = find("role"), find("status"), find("message")
            if text is not None:
                raw = OpenObject(value)
                raw.within, raw.name = text, None
                if type(payload) is dict:
                    payload = OpenObject(payload)
                    payload.within, payload.name = text, "data"
            envelope = shared.copy()
            envelope["sequence"] = {"source": SEQUENCE_SOURCE, "value": line}
            envelope["cursor"] = {"eventLineOffset": line, "eventLineCount": line_count}
            envelope["run"] = {
                "runId": find("run_id") or "unknown",
                "iteration": iteration if type(iteration) is int else whole_number(iteration),
            }
            envelope["event"] = {
                "timestamp": find("timestamp"),
                "name": find("type") if name is None else name,
                "role": None if role == "" else role,
                "status": None if status == "" else status,
                "message": None if message == "" else message,
                "payload": payload,
                "raw": raw,
            }
            envelopes.append(envelope)
            line += 1
        return envelopes


@functools.cache
def _plain_check() -> Callable[[Any], bool]:
    """What tells whether records make envelopes that the schema accepts."""
    return members_check(_KIND, PLAIN, required=NEEDED)


def _validate(envelopes: list[Any]) -> None:
    """Returns if the schema accepts each; else it says where it does not."""
    for envelope in envelopes:
        validate(_KIND, envelope)


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
