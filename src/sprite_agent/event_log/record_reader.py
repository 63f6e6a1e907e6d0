"""Cuts the bytes of an event log into records: one JSON object on a line, or over several.

Only a complete line is looked at: a torn last line is not yet one. Blank lines count as
lines and are no records. A line that is a proper prefix of an object opens a record over
several lines; if a later line breaks it, only the opening line is malformed and reading
goes on at the next. A record that is not closed yet is not yet a record.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import sys
from typing import TYPE_CHECKING

import msgspec

from sprite_agent.contract import json_text
from sprite_agent.contract.events import usual_lines
from sprite_agent.event_log.json_prefix import SHORT, ObjectPrefix, Verdict
from sprite_agent.event_log.records import EXCERPT_BYTES, MAX_RECORD_BYTES, START, Position, Record, Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_NOT_CONTINUED = "the beginning of an object that the next lines do not go on with"
_INTERRUPTED = "an object that an overlong line interrupts"
_SPACE = ord(" ")
_LINES_AT_ONCE = 512
"""Some milliseconds' worth of lines that end no record."""

RUN_BYTES = 64 * 1024
"""Of a run at most: its values can be thirty times as large, and take some milliseconds to make. Less than
`MAX_RECORD_BYTES`, so that no line of a run is overlong."""
_RUN_LINES = 256
ANY = (sys.maxsize, RUN_BYTES)
"""As many records and bytes as a run can have."""

_is_json = msgspec.json.Decoder(msgspec.Raw).decode


class RecordReader:
    """Reads one log from a position on. Feed it the bytes that follow, in pieces of any size.

    Holds at most one unfinished line and one unfinished record, about 2 MiB: records are made one
    at a time or one run at a time, and each line is looked at four times at most, however openings end.
    """

    def __init__(self, start: Position = START) -> None:
        self.most = ANY
        """How many records, and bytes, the next run may have."""
        self._judges = self._makes_values = False
        self.lines = start.line
        """Complete lines seen, from the beginning of the log."""
        self._boundary: tuple[int, int] = start
        self._offset = start.offset
        self._torn = bytearray()
        self._overlong: _Overlong | None = None
        self._opening: _Opening | None = None

    def judge(self, *, wanted: bool, values: bool = False) -> None:
        """Whether from now on runs come judged: of objects only, known to be events or, all if `values`, with these."""
        self._judges, self._makes_values = wanted, values

    def feed(self, data: bytes) -> Iterator[Run | Record | None]:
        """The records that `data` completes. To be taken to the last before more is fed.

        None stands where it takes long until the next: whoever likes may leave it at that for a while.
        """
        end = data.find(b"\n")
        if end < 0:
            self._keep_torn(data)
        else:
            if self._overlong:
                self._overlong.add(data[: end + 1])
                yield from self._finish_overlong(self._overlong)
                data = data[end + 1 :]
                self._overlong = None
            elif self._torn:
                data = bytes(self._torn) + data
                self._torn.clear()
            yield from self._feed_lines(data)
        if self._overlong and self._opening:
            # Nothing can close the record any more; not put off, so that nothing old has to be kept.
            yield from self._give_up(self._opening, _INTERRUPTED)

    @property
    def boundary(self) -> Position:
        """After the last record given out or blank line passed: where another reader may start."""
        return Position(*self._boundary)

    @property
    def earliest(self) -> int:
        """No record to come ends before this offset."""
        torn = self._overlong.size if self._overlong else len(self._torn)
        return self._boundary[1] if self._opening else self._offset + torn

    def _feed_lines(self, data: bytes) -> Iterator[Run | Record | None]:
        at = done = 0
        lines: list[bytes] = []  # some of what comes, cut up once; those before number `done` are behind
        while (end := data.find(b"\n", at)) >= 0:
            if self._opening is None:
                if data[at] <= _SPACE and (blank := _blank_lines(MAX_RECORD_BYTES).match(data, at)):
                    self._pass(blank[0])
                    self._boundary = (self.lines, self._offset)
                    at, done = blank.end(), done + blank[0].count(b"\n")
                    continue
                most, size = self.most
                if done >= len(lines):
                    last = data.rfind(b"\n", at, at + max(0, min(size, RUN_BYTES)) + 1)
                    lines, done = io.BytesIO(data[at : last + 1]).readlines(), 0
                if run := self._run(lines[done : done + min(most, _RUN_LINES)]):
                    at, done = at + len(run.text) + 1, done + run.record_count
                    found = [run]
                    del run  # its values are not kept while whoever has it waits
                    yield found.pop()
                    continue
            yield from self._take(data[at:end])
            at, done = end + 1, done + 1
        self._keep_torn(data[at:])

    def _run(self, lines: list[bytes]) -> Run | None:
        """The run that the first of these lines are, up to one that is to be looked at by itself."""
        values, are_events = None, False
        if not self._judges:
            count = _json_lines(lines)
        elif not self._makes_values and (count := usual_lines(lines)):
            are_events = True
        else:
            values = json_text.objects_in(lines)
            count = len(values)
        if not count:
            return None
        text = b"".join(lines[:count])[:-1]
        self.lines += count
        self._offset += len(text) + 1
        self._boundary = (self.lines, self._offset)
        return Run(self.lines, self._offset, text, count, values, are_events)

    def _keep_torn(self, data: bytes) -> None:
        if self._overlong:
            self._overlong.add(data)
            return
        self._torn += data
        if len(self._torn) > MAX_RECORD_BYTES:
            self._overlong = _Overlong(bytes(self._torn))
            self._torn.clear()

    def _take(self, line: bytes) -> Iterable[Record | None]:
        """Handles one complete line, given without its newline."""
        if len(line) >= MAX_RECORD_BYTES:
            return self._finish_overlong(_Overlong(line + b"\n"))
        if self._opening:
            return self._continue(self._opening, line)
        self.lines += 1
        self._offset += len(line) + 1
        if not line or line.isspace():
            self._boundary = (self.lines, self._offset)
            return ()
        fault = _fault_of(line)
        if fault is not None and line.lstrip().startswith(b"{"):
            return self._begin(line, fault)
        return (self._finished(line, fault),)

    def _begin(self, line: bytes, fault: str) -> Iterator[Record | None]:
        """Handles a line that is no JSON, and perhaps the beginning of an object."""
        prefix = ObjectPrefix()
        if (yield from prefix.steps(line + b"\n")) is Verdict.OPEN:
            self._opening = _Opening(prefix, line)
        else:
            yield self._finished(line, json_text.TOO_DEEP if prefix.too_deep else fault)

    def _continue(self, opening: _Opening, line: bytes) -> Iterator[Record | None]:
        """Handles a line while a record is open."""
        while len(opening.text) + len(line) + 1 > MAX_RECORD_BYTES:
            if not opening.prefix.let_go():
                yield from self._give_up(opening, _too_long())
                yield from self._take(line)
                return
            yield from self._read_again(opening, opening.prefix.first, _too_long())
        prefix = opening.prefix
        verdict = prefix.feed(line + b"\n") if len(line) < SHORT else (yield from prefix.steps(line + b"\n"))
        if verdict is Verdict.BROKEN:
            yield from self._give_up(opening, json_text.TOO_DEEP if opening.prefix.too_deep else _NOT_CONTINUED)
            yield from self._take(line)
            return
        opening.text += line + b"\n"
        self._pass(line + b"\n")
        if opening.first < opening.prefix.first:
            yield from self._read_again(opening, opening.prefix.first, json_text.TOO_DEEP)
        if verdict is Verdict.CLOSED:
            self._opening = None
            text = bytes(opening.text[:-1])
            yield self._finished(text, _fault_of(text))
        elif self.lines % _LINES_AT_ONCE == 0:
            yield None

    def _give_up(self, opening: _Opening, fault: str) -> Iterator[Record | None]:
        """Nothing can close the open record any more, nor any object in it that is still open."""
        self._opening = None
        yield from self._read_again(opening, None, fault)

    def _read_again(self, opening: _Opening, before: int | None, fault: str) -> Iterator[Record | None]:
        """The first of the lines is malformed; the others, up to line `before`, are records or not.

        The prefix has seen on the way which: reading them as if for the first time would cost the square of
        their number.
        """
        reached = self.lines, self._offset
        self.lines, self._offset = self._boundary
        text, at, number, seen = opening.text, 0, opening.first, opening.seen
        while at < len(text) and number != before:
            last, seen = opening.prefix.last_line_of(number, seen) if at else (number, seen)
            end = at
            for _ in range(number, last + 1):
                end = text.index(b"\n", end) + 1
            part = bytes(text[at : end - 1])
            self._pass(part + b"\n")
            if at == 0:
                yield self._finished(part, fault)
            elif not part or part.isspace():
                self._boundary = (self.lines, self._offset)
                if number % _LINES_AT_ONCE == 0:
                    yield None
            else:
                yield from self._take_alone(part, opening.prefix, number, fault)
            at, number = end, last + 1
        del text[:at]
        opening.first, opening.seen = number, opening.prefix.forget(seen)
        self.lines, self._offset = reached

    def _take_alone(self, text: bytes, around: ObjectPrefix, number: int, fault: str) -> Iterator[Record | None]:
        """Handles what began with line `number` of an open record, and is known not to go on beyond `text`."""
        why = _fault_of(text)
        if why is not None and text.lstrip().startswith(b"{"):
            verdict = yield from ObjectPrefix().steps(text + b"\n")
            if verdict is Verdict.OPEN:
                why = fault if around.is_open(number) else _NOT_CONTINUED
        yield self._finished(text, why)

    def _finish_overlong(self, line: _Overlong) -> Iterator[Record | None]:
        if self._opening:
            yield from self._give_up(self._opening, _INTERRUPTED)
        self.lines += 1
        self._offset += line.size
        fault = f"a line of {line.size} bytes, longer than {MAX_RECORD_BYTES}"
        record = self._finished(line.beginning, fault)
        yield record._replace(overlong=(line.size, line.digest.hexdigest()))

    def _finished(self, text: bytes, fault: str | None) -> Record:
        record = Record(self._boundary[0] + 1, self.lines, self._offset, text, None, fault)
        self._boundary = (self.lines, self._offset)
        return record

    def _pass(self, text: bytes) -> None:
        self.lines += text.count(b"\n")
        self._offset += len(text)


@functools.cache
def _blank_lines(longest: int) -> re.Pattern[bytes]:
    """Blank lines, none of which is longer, newline included."""
    return re.compile(rb"(?:[ \t\r\x0b\x0c]{0,%d}+\n)++" % (longest - 1))


def _json_lines(lines: list[bytes]) -> int:
    """How many of the lines are JSON, up to the first that is not. Makes no values: they can be large."""
    count = 0
    try:
        for line in lines:
            _is_json(line)
            count += 1
    except (msgspec.DecodeError, RecursionError):
        pass
    return count


def _fault_of(text: bytes) -> str | None:
    """Why `text` is no JSON; None: it is, as far as its grammar goes. Makes no values: they can be large."""
    try:
        _is_json(text)
    except msgspec.DecodeError as error:
        return f"not JSON ({error})"
    except RecursionError:
        return json_text.TOO_DEEP
    return None


def _too_long() -> str:
    return f"an object over several lines, longer than {MAX_RECORD_BYTES} bytes"


class _Opening:
    """The lines of an object that is not closed yet, newlines included."""

    def __init__(self, prefix: ObjectPrefix, line: bytes) -> None:
        self.prefix = prefix
        self.text = bytearray(line + b"\n")
        self.first = 0
        """The number that the prefix gives to the first of the lines."""
        self.seen = 0
        """See `ObjectPrefix.last_line_of`."""


class _Overlong:
    """A line too long to be kept: its size, digest and beginning."""

    def __init__(self, data: bytes) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self.beginning = b""
        self.add(data)

    def add(self, data: bytes) -> None:
        self.beginning += data[: EXCERPT_BYTES - len(self.beginning)]
        self.size += len(data)
        self.digest.update(data)
