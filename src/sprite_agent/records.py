"""Cuts the bytes of an event log into records: one JSON object on a line, or over several.

Only a complete line is looked at: a torn last line is not yet one. Blank lines count as
lines and are no records. A line that is a proper prefix of an object opens a record over
several lines; if a later line breaks it, only the opening line is malformed and reading
goes on at the next. A record that is not closed yet is not yet a record.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any, NamedTuple

from sprite_agent.contract import json_text
from sprite_agent.errors import ContractError
from sprite_agent.json_prefix import ObjectPrefix, Verdict

MAX_RECORD_BYTES = 1024 * 1024
"""A longer record is malformed. Of a longer line only size, digest and beginning are kept."""

_EXCERPT_BYTES = 200


class Position(NamedTuple):
    """A place between two lines of a log."""

    line: int
    """Lines before it."""
    offset: int
    """Bytes before it."""


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
        return self.text[:_EXCERPT_BYTES].decode(errors="backslashreplace")


class RecordReader:
    """Reads one log from a position on. Feed it the bytes that follow, in pieces of any size.

    Holds at most one unfinished line and one unfinished record, so about 2 MiB.
    """

    def __init__(self, start: Position = Position(0, 0)) -> None:  # noqa: B008  # a tuple, never changed
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
        complete, newline, rest = data.rpartition(b"\n")
        if not newline:
            self._keep_torn(data)
            return []
        pending: deque[bytes | _Overlong] = deque(complete.split(b"\n"))
        if self._overlong:
            self._overlong.add(pending.popleft() + b"\n")  # type: ignore[operator]  # only bytes were split
            pending.appendleft(self._overlong)
        elif self._torn:
            self._torn.append(pending.popleft())  # type: ignore[arg-type]  # likewise
            pending.appendleft(b"".join(self._torn))
        self._torn, self._torn_bytes, self._overlong = [], 0, None
        self._keep_torn(rest)
        records = []
        while pending:
            record = self._take(pending.popleft(), pending)
            if record is not None:
                records.append(record)
        return records

    def _keep_torn(self, data: bytes) -> None:
        self._torn_bytes += len(data)
        if self._overlong:
            self._overlong.add(data)
        elif self._torn_bytes > MAX_RECORD_BYTES:
            self._overlong = _Overlong(b"".join([*self._torn, data]))
            self._torn = []
        elif data:
            self._torn.append(data)

    def _take(self, line: bytes | _Overlong, pending: deque[bytes | _Overlong]) -> Record | None:
        """Handles one complete line, given without its newline; may put lines back before `pending`."""
        if isinstance(line, bytes) and len(line) >= MAX_RECORD_BYTES:
            line = _Overlong(line + b"\n")
        if isinstance(line, _Overlong):
            if self._opening:
                pending.appendleft(line)
                return self._give_up_opening(pending, "an object that an overlong line interrupts")
            return self._overlong_record(line)
        self.lines += 1
        self._offset += len(line) + 1
        return self._continue(line, pending) if self._opening else self._begin(line)

    def _begin(self, line: bytes) -> Record | None:
        if not line or line.isspace():
            self.boundary = Position(self.lines, self._offset)
            return None
        try:
            value = json_text.parse(line)
        except ContractError as error:
            prefix = ObjectPrefix()
            if prefix.feed(line + b"\n") is not Verdict.OPEN:
                return self._finished(line, None, error.message)
            self._prefix, self._opening, self._open_bytes = prefix, [line], len(line) + 1
            return None
        if isinstance(value, dict):
            return self._finished(line, value, None)
        return self._finished(line, None, "JSON, but no object")

    def _continue(self, line: bytes, pending: deque[bytes | _Overlong]) -> Record | None:
        self._opening.append(line)
        self._open_bytes += len(line) + 1
        if self._open_bytes > MAX_RECORD_BYTES:
            return self._give_up_opening(pending, f"an object over several lines, longer than {MAX_RECORD_BYTES} bytes")
        verdict = self._prefix.feed(line + b"\n")
        if verdict is Verdict.OPEN:
            return None
        if verdict is Verdict.BROKEN:
            return self._give_up_opening(pending, "the beginning of an object that the next lines do not go on with")
        text = b"\n".join(self._opening)
        try:
            value = json_text.parse(text)
        except ContractError as error:
            return self._give_up_opening(pending, error.message)
        self._opening = []
        return self._finished(text, value, None)

    def _give_up_opening(self, pending: deque[bytes | _Overlong], fault: str) -> Record:
        """Only the opening line is malformed; the lines after it are read again."""
        opening, *others = self._opening
        pending.extendleft(reversed(others))
        self._opening = []
        self.lines = self.boundary.line + 1
        self._offset = self.boundary.offset + len(opening) + 1
        return self._finished(opening, None, fault)

    def _finished(self, text: bytes, value: dict[str, Any] | None, fault: str | None) -> Record:
        record = Record(self.boundary.line + 1, self.lines, self._offset, text, value, fault)
        self.boundary = Position(self.lines, self._offset)
        return record

    def _overlong_record(self, line: _Overlong) -> Record:
        self.lines += 1
        self._offset += line.size
        fault = f"a line of {line.size} bytes, longer than {MAX_RECORD_BYTES}"
        return self._finished(line.beginning, None, fault)._replace(overlong=(line.size, line.digest.hexdigest()))


class _Overlong:
    """A line too long to be kept: its size, digest and beginning."""

    def __init__(self, data: bytes) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self.beginning = data[:_EXCERPT_BYTES]
        self.add(data)

    def add(self, data: bytes) -> None:
        self.size += len(data)
        self.digest.update(data)
