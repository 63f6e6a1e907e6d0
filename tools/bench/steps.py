"""The steps of an event from the log to the manager, as the project's own functions take them.

When the hot path changes, this is what changes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import orjson

from sprite_agent.contract import mirror
from sprite_agent.contract.events import EventBuilder
from sprite_agent.contract.json_text import objects_in
from sprite_agent.contract.validation import validate
from sprite_agent.event_log.newest import raw_events
from sprite_agent.event_log.record_reader import RUN_BYTES, RecordReader
from sprite_agent.v1 import service_pb2 as pb
from tools.bench.floors import BATCH_LINES
from tools.bench.logs import LOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.contract.streaming import RawEvents

_T = TypeVar("_T")


class Steps:
    """The steps over one log, each by itself: what one needs of those before it was made beforehand."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._lines = text.splitlines()
        self._builder = EventBuilder(
            source={"repoPath": "/repo", "loopId": LOOP},
            trace_id=None,
            emitted_at="2026-01-02T03:04:05Z",
            line_count=len(self._lines),
        )
        self._raw = self._records()
        self._envelopes = self._build()
        self._messages = self._to_messages()
        self._mirrors = self._mirror()
        self._sent = self._serialize()

    def by_name(self) -> dict[str, Callable[[], object]]:
        """Every step, in the order that an event takes them."""
        return {
            "floor: orjson.loads": lambda: [orjson.loads(line) for line in self._lines],
            "floor: split lines": self._text.splitlines,
            "agent: records, checked": self._records,
            "agent: raw to message": self._to_messages,
            "agent: serialize": self._serialize,
            "manager: parse": lambda: [pb.StreamEventsResponse.FromString(data) for data in self._sent],
            "manager: build and validate": self._build,
            "of that, JSON": lambda: [objects_in(raw.text.split("\n")) for raw in self._raw],
            "of that, validation": self._validate,
            "not raw: mirror to message": self._mirror,
            "not raw: mirror back": self._mirror_back,
        }

    def _records(self) -> list[RawEvents]:
        reader = RecordReader()
        reader.judge(wanted=True)
        reader.most = (BATCH_LINES, RUN_BYTES)
        return [raw_events(found, self._builder) for found in reader.feed(self._text) if found is not None]

    def _to_messages(self) -> list[pb.StreamEventsResponse]:
        messages = []
        for raw in self._raw:
            messages.append(message := pb.StreamEventsResponse())
            message.raw_events.add(line=raw.line, json=raw.text, record_count=raw.record_count)
        return messages

    def _serialize(self) -> list[bytes]:
        return [message.SerializeToString() for message in self._messages]

    def _build(self) -> list[EventEnvelope]:
        return [envelope for raw in self._raw for envelope in self._builder.whole(raw)]

    def _validate(self) -> None:
        for envelope in self._envelopes:
            validate("loop_run_event", envelope)

    def _mirror(self) -> list[pb.StreamEventsResponse]:
        messages = []
        for batch in _batched(self._envelopes):
            messages.append(message := pb.StreamEventsResponse())
            for envelope in batch:
                mirror.event_to_message(envelope, message.events.add())
        return messages

    def _mirror_back(self) -> list[EventEnvelope]:
        return [mirror.event_from_message(event) for message in self._mirrors for event in message.events]


def _batched(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The items, as many at a time as a message has."""
    for start in range(0, len(items), BATCH_LINES):
        yield items[start : start + BATCH_LINES]
