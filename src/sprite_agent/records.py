"""Cuts the bytes of an event log into records: one JSON object on a line, or over several.

Only a complete line is looked at: a torn last line is not yet one. Blank lines count as
lines and are no records. A line that is a proper prefix of an object opens a record over
several lines; if a later line breaks it, only the opening line is malformed and reading
goes on at the next. A record that is not closed yet is not yet a record.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from sprite_agent.contract import json_text
from sprite_agent.errors import ContractError
from sprite_agent.json_prefix import ObjectPrefix, Verdict

MAX_RECORD_BYTES = 1024 * 1024
"""A longer record is malformed. Of a longer line only size, digest and beginning are kept."""

_EXCERPT_CHARACTERS = 200
_EXCERPT_BYTES = 4 * _EXCERPT_CHARACTERS
_NOT_CONTINUED = "the beginning of an object that the next lines do not go on with"
_INTERRUPTED = "an object that an overlong line interrupts"


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
    value: dict[str, Any] | None
    """The object; None: malformed."""
    fault: str | None = None
    """What is wrong, in one sentence; None: nothing."""
    overlong: tuple[int, str] | None = None
    """Size in bytes and SHA-256 of an overlong line, newline included."""

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
        return self.text[:_EXCERPT_BYTES].decode(errors="backslashreplace")[:_EXCERPT_CHARACTERS]


class RecordReader:
    """Reads one log from a position on. Feed it the bytes that follow, in pieces of any size.

    Holds at most one unfinished line and one unfinished record, so about 2 MiB.
    """

    def __init__(self, start: Position = START) -> None:
        self.lines = start.line
        """Complete lines seen, from the beginning of the log."""
        self.boundary = start
        """After the last finished record or blank line: where another reader may start."""
        self._offset = start.offset
        self._torn: list[bytes] = []
        self._torn_bytes = 0
        self._overlong: _Overlong | None = None
        self._opening: list[bytes] = []
        self._prefix = ObjectPrefix()
        self._open_bytes = 0

    def feed(self, data: bytes) -> list[Record]:
        """The records that `data` completes."""
        records: list[Record] = []
        complete, newline, rest = data.rpartition(b"\n")
        if newline:
            first, *others = complete.split(b"\n")
            if not (first or self._torn or self._overlong or self._opening or others.count(b"") < len(others)):
                # Nothing but blank lines: there may be very many.
                self.lines += 1 + len(others)
                self._offset += 1 + len(others)
                self.boundary = Position(self.lines, self._offset)
                others = []
            elif self._overlong:
                self._overlong.add(first + b"\n")
                self._finish_overlong(self._overlong, records)
            else:
                self._take(b"".join([*self._torn, first]), records)
            self._torn, self._torn_bytes, self._overlong = [], 0, None
            for line in others:
                self._take(line, records)
        self._keep_torn(rest)
        if self._overlong and self._opening:
            # Nothing can close the record any more; not put off, so that nothing old has to be kept.
            self._give_up_opening(_INTERRUPTED, records)
        return records

    @property
    def earliest(self) -> int:
        """No record to come ends before this offset."""
        return self.boundary.offset if self._opening else self._offset + self._torn_bytes

    def _keep_torn(self, data: bytes) -> None:
        self._torn_bytes += len(data)
        if self._overlong:
            self._overlong.add(data)
        elif self._torn_bytes > MAX_RECORD_BYTES:
            self._overlong = _Overlong(b"".join([*self._torn, data]))
            self._torn = []
        elif data:
            self._torn.append(data)

    def _take(self, line: bytes, records: list[Record]) -> None:
        """Handles one complete line, given without its newline."""
        if len(line) >= MAX_RECORD_BYTES:
            self._finish_overlong(_Overlong(line + b"\n"), records)
        elif self._opening:
            self._pass(line)
            self._continue(line, records)
        else:
            self._pass(line)
            self._begin(line, records)

    def _pass(self, line: bytes) -> None:
        self.lines += 1
        self._offset += len(line) + 1

    def _begin(self, line: bytes, records: list[Record]) -> None:
        """Handles a line while no record is open."""
        if not line or line.isspace():
            self.boundary = Position(self.lines, self._offset)
            return
        try:
            value = json_text.parse(line)
        except ContractError as error:
            prefix = ObjectPrefix()
            if prefix.feed(line + b"\n") is Verdict.OPEN:
                self._prefix, self._opening, self._open_bytes = prefix, [line], len(line) + 1
            else:
                records.append(self._finished(line, None, error.message))
            return
        self._finish_value(line, value, records)

    def _finish_value(self, text: bytes, value: Any, records: list[Record]) -> None:
        if isinstance(value, dict):
            records.append(self._finished(text, value, None))
        else:
            records.append(self._finished(text, None, "JSON, but no object"))

    def _continue(self, line: bytes, records: list[Record]) -> None:
        """Handles a line while a record is open."""
        self._opening.append(line)
        self._open_bytes += len(line) + 1
        verdict = self._prefix.feed(line + b"\n")
        if verdict is Verdict.BROKEN:
            self._opening.pop()
            self._move_to(self.lines - 1, self._offset - len(line) - 1)
            self._give_up_opening(_NOT_CONTINUED, records)
            self._take(line, records)
        elif verdict is Verdict.CLOSED and self._open_bytes <= MAX_RECORD_BYTES:
            lines, self._opening = self._opening, []
            self._end_opening(lines, records)
        else:
            while self._opening and self._open_bytes > MAX_RECORD_BYTES:
                self._give_up_outermost(records)

    def _end_opening(self, lines: list[bytes], records: list[Record]) -> None:
        """Handles the lines of an object that is closed."""
        text = b"\n".join(lines)
        try:
            value = json_text.parse(text)
        except ContractError as error:
            self._read_again(lines, error.message, records)
        else:
            records.append(self._finished(text, value, None))

    def _give_up_opening(self, fault: str, records: list[Record]) -> None:
        """No line can close the open record, nor any object in it that is still open."""
        lines, self._opening = self._opening, []
        self._read_again(lines, fault, records)

    def _give_up_outermost(self, records: list[Record]) -> None:
        """The open record is too long; the next object in it that begins a line and is still open may not be."""
        lines = self._opening
        inner = next((begun for begun in self._prefix.still_open if begun > 0), len(lines))
        self._opening = []
        self._read_again(lines[:inner], _too_long(), records)
        if inner < len(lines):
            self._prefix.begin_at(inner)
            self._opening = lines[inner:]
            self._open_bytes -= sum(len(line) + 1 for line in lines[:inner])
            self._move_to(self.lines + len(self._opening), self._offset + self._open_bytes)

    def _read_again(self, lines: list[bytes], fault: str, records: list[Record]) -> None:
        """The first of the lines is malformed; the others are records or not, as the prefix has seen on the way.

        Reading them as if for the first time would cost the square of their number.
        """
        self._move_to(*self.boundary)
        self._pass(lines[0])
        records.append(self._finished(lines[0], None, fault))
        number = 1
        while number < len(lines):
            after = self._prefix.ended.get(number, number) + 1
            too_long = sum(len(line) + 1 for line in lines[number:after]) > MAX_RECORD_BYTES
            if too_long:
                after = number + 1
            for line in lines[number:after]:
                self._pass(line)
            if too_long:
                records.append(self._finished(lines[number], None, _too_long()))
            else:
                self._finish_alone(b"\n".join(lines[number:after]), number, fault, records)
            number = after

    def _finish_alone(self, text: bytes, number: int, fault: str, records: list[Record]) -> None:
        """Handles what began with line `number` of an open record, and is known not to go on beyond `text`."""
        try:
            self._finish_value(text, json_text.parse(text), records)
        except ContractError as error:
            if text.isspace() or not text:
                self.boundary = Position(self.lines, self._offset)
            elif ObjectPrefix().feed(text + b"\n") is not Verdict.OPEN:
                records.append(self._finished(text, None, error.message))
            elif number in self._prefix.too_deep:
                records.append(self._finished(text, None, json_text.TOO_DEEP))
            else:
                why = fault if number in self._prefix.still_open else _NOT_CONTINUED
                records.append(self._finished(text, None, why))

    def _move_to(self, line: int, offset: int) -> None:
        self.lines, self._offset = line, offset

    def _finish_overlong(self, line: _Overlong, records: list[Record]) -> None:
        if self._opening:
            self._give_up_opening(_INTERRUPTED, records)
        self.lines += 1
        self._offset += line.size
        fault = f"a line of {line.size} bytes, longer than {MAX_RECORD_BYTES}"
        record = self._finished(line.beginning, None, fault)
        records.append(record._replace(overlong=(line.size, line.digest.hexdigest())))

    def _finished(self, text: bytes, value: dict[str, Any] | None, fault: str | None) -> Record:
        record = Record(self.boundary.line + 1, self.lines, self._offset, text, value, fault)
        self.boundary = Position(self.lines, self._offset)
        return record


def _too_long() -> str:
    return f"an object over several lines, longer than {MAX_RECORD_BYTES} bytes"


class _Overlong:
    """A line too long to be kept: its size, digest and beginning."""

    def __init__(self, data: bytes) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self.beginning = b""
        self.add(data)

    def add(self, data: bytes) -> None:
        self.beginning += data[: _EXCERPT_BYTES - len(self.beginning)]
        self.size += len(data)
        self.digest.update(data)
