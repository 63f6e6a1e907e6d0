"""What an event log is made of: records, each a JSON object, and the places between them."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from sprite_agent.contract import json_text
from sprite_agent.errors import ContractError

MAX_RECORD_BYTES = 1024 * 1024
"""A longer record is malformed. Of a longer line only size, digest and beginning are kept."""
EXCERPT_CHARACTERS = 200
EXCERPT_BYTES = 4 * EXCERPT_CHARACTERS


class Position(NamedTuple):
    """A place between two lines of a log."""

    line: int
    """Lines before it."""
    offset: int
    """Bytes before it."""


START = Position(0, 0)


class Record(NamedTuple):
    """One record of a log: an object, or what is wrong with it."""

    first_line: int
    last_line: int
    end: int
    """Offset of the byte after its newline."""
    text: bytes
    """Its bytes without the last newline; of an overlong line only the beginning."""
    value: dict[str, Any] | None = None
    """The object; None: malformed, or not yet judged."""
    fault: str | None = None
    """What is wrong, in one sentence; None: nothing, or not yet judged."""
    overlong: tuple[int, str] | None = None
    """Size in bytes and SHA-256 of an overlong line, newline included."""

    @property
    def record_count(self) -> int:
        """How many records it is."""
        return 1

    @property
    def event_line(self) -> int:
        """Number of the line that its event is known by: its last."""
        return self.last_line

    @property
    def start(self) -> Position:
        """Before it."""
        return Position(self.first_line - 1, self.end - self.size_bytes)

    def records(self) -> list[Record]:
        """Itself; as of a `Run`."""
        return [self]

    @property
    def size_bytes(self) -> int:
        """Its size, newline included."""
        return self.overlong[0] if self.overlong else len(self.text) + 1

    @property
    def sha256(self) -> str:
        """SHA-256 of its bytes, newline included, lower-case hex."""
        return self.overlong[1] if self.overlong else hashlib.sha256(self.text + b"\n").hexdigest()

    @property
    def excerpt(self) -> str:
        """Its beginning, for people; bytes that are not UTF-8 are escaped."""
        return self.text[:EXCERPT_BYTES].decode(errors="backslashreplace")[:EXCERPT_CHARACTERS]


class Run(NamedTuple):
    """Records on consecutive lines, one on each, which are taken together."""

    last_line: int
    end: int
    """Offset of the byte after the newline of the last."""
    text: bytes
    """Its bytes without the last newline."""
    record_count: int
    """How many records it has: one at least."""
    values: list[dict[str, Any]] | None = None
    """Their objects; None: not yet judged, or known to be events without."""
    are_events: bool = False
    """Whether each is known to make one."""

    @property
    def lines(self) -> list[bytes]:
        """Its text, line by line."""
        return self.text.split(b"\n")

    @property
    def event_line(self) -> int:
        """Number of its first line."""
        return self.last_line - self.record_count + 1

    @property
    def start(self) -> Position:
        """Before the first."""
        return Position(self.last_line - self.record_count, self.end - len(self.text) - 1)

    @property
    def last(self) -> Record:
        """The last one, not yet judged."""
        return Record(self.last_line, self.last_line, self.end, self.text[self.text.rfind(b"\n") + 1 :])

    def records(self) -> list[Record]:
        """Each by itself, not yet judged."""
        line, offset = self.start
        found = []
        for text in self.lines:
            line, offset = line + 1, offset + len(text) + 1
            found.append(Record(line, line, offset, text))
        return found


def judged(record: Record) -> Record:
    """The record with its value, or what is wrong with it. Parsed, it can be many times as large."""
    if record.value is not None or record.fault is not None:
        return record
    value, fault = _judgement(record.text)
    return record._replace(value=value, fault=fault)


def values_of(found: Run | Record) -> list[dict[str, Any]]:
    """The objects of a run or a record, judged or not.

    Raises:
        ContractError: one is none; what is wrong with it.
    """
    if isinstance(found, Run):
        return [json_text.object_in(line) for line in found.lines] if found.values is None else found.values
    value, fault = found.value, found.fault
    if value is None and fault is None:
        value, fault = _judgement(found.text)
    if value is None:
        raise ContractError(fault or "malformed")
    return [value]


def _judgement(text: bytes) -> tuple[dict[str, Any] | None, str | None]:
    value, fault = json_text.attempt(text)
    if fault is None and not isinstance(value, dict):
        return None, "JSON, but no object"
    return value, fault
