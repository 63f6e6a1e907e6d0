"""Tells, line by line, whether an object over several lines is still open, closed or broken.

A JSON parser says only whether a whole text is JSON. Asking it anew with each further
line would cost the square of the record's size, so this follows the grammar once.
"""

from __future__ import annotations

import enum
import re
from array import array
from typing import TYPE_CHECKING

from sprite_agent.contract import json_text
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from sprite_agent.event_log.pieces import Steps


class Verdict(enum.Enum):
    """What is known after a line."""

    OPEN = "a proper prefix of an object"
    CLOSED = "an object, and nothing after it"
    BROKEN = "no prefix of an object"


class _Expect(enum.Enum):
    """What may come next."""

    START = enum.auto()
    KEY_OR_END = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()
    COMMA_OR_END = enum.auto()
    NOTHING = enum.auto()


_TOKEN = re.compile(
    rb"""[ \t\r\n]*+(?:
        ("[^"\\\x00-\x1f\x80-\xff]*+")
      | ((?:0|[1-9][0-9]{0,14}+)(?![0-9.eE])|true|false|null)
      | ("[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")
      | (-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)
      | ([{}\[\]:,])
      | (\Z)
    )""",
    re.VERBOSE,
)
_STRING, _SCALAR, _OTHER_STRING, _OTHER_NUMBER, _MARK, _END = range(1, 7)
"""Of the others the parser decides: its rules for escapes, UTF-8 and numbers go beyond the grammar."""
SHORT = 8192
"""Bytes: some milliseconds' worth of tokens."""

_OPENING = (_Expect.START, _Expect.VALUE, _Expect.VALUE_OR_END)


class ObjectPrefix:
    """One object in the making. Feed it lines, newline included, until it is no longer open.

    It takes what the parser takes. An object nested too deep can't be a record, but one inside it
    may be: the outermost are let go until the depth fits, and `first` moves on. What was seen of
    the objects inside that begin a line is kept, so that nobody has to follow those lines again
    when the whole comes to nothing.
    """

    def __init__(self) -> None:
        self.first = 0
        """The line, counted from 0, that begins the outermost object which is still followed."""
        self.too_deep = False
        """Whether the nesting was what broke it."""
        self._line = 0
        self._closers: list[bytes] = []
        self._begun: list[int] = []
        """For each open container the line it begins, where it is an object and the line's first token; else -1."""
        self._expect = _Expect.START
        self._just_closed = -1
        """The line begun by the container that the last token closed; -1: none."""
        # Arrays, because there may be nearly as many as the text has bytes.
        self._span_firsts, self._span_lasts = array("L"), array("L")

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last line of each object inside that fills several lines and nothing else of them.

        In the order of the lines; those inside another are left out.
        """
        return list(zip(self._span_firsts, self._span_lasts, strict=True))

    def last_line_of(self, first: int, seen: int) -> tuple[int, int]:
        """The last line of the object inside that fills the lines from `first` on; `first` itself where there is none.

        Args:
            first: the line.
            seen: 0 at first, then the second value of the last answer; lines must rise.
        """
        while seen < len(self._span_firsts) and self._span_firsts[seen] < first:
            seen += 1
        is_there = seen < len(self._span_firsts) and self._span_firsts[seen] == first
        return (self._span_lasts[seen] if is_there else first), seen

    def forget(self, seen: int) -> int:
        """Drops the objects inside that were seen so far, once they are the larger part; what `seen` is then."""
        if 2 * seen < len(self._span_firsts):
            return seen
        del self._span_firsts[:seen], self._span_lasts[:seen]
        return 0

    def is_open(self, line: int) -> bool:
        """Whether an object that begins `line` is still open."""
        return line in self._begun

    def let_go(self) -> bool:
        """Follows the next object inside that begins a line and is still open; False: there is none."""
        for depth, line in enumerate(self._begun):
            if line > self.first:
                self._follow_from(depth, line)
                return True
        return False

    def feed(self, line: bytes) -> Verdict:
        """The verdict after one more line."""
        return self._feed(line, 0, len(line))[0]

    def steps(self, line: bytes) -> Steps[Verdict]:
        """The same in pieces, for a line that is not short."""
        position = 0
        while True:
            verdict, position = self._feed(line, position, position + SHORT)
            if position == len(line):
                return verdict
            yield

    def _feed(self, line: bytes, position: int, until: int) -> tuple[Verdict, int]:
        """Takes tokens from `position` to at least `until`; the verdict counts at the end of the line."""
        while True:
            token = _TOKEN.match(line, position)
            kind = token.lastindex if token else None
            if token is None or kind is None:
                return Verdict.BROKEN, len(line)
            if kind == _END:
                self._end_line()
                return (Verdict.CLOSED if self._expect is _Expect.NOTHING else Verdict.OPEN), len(line)
            self._just_closed = -1
            if kind == _MARK:
                accepted = self._take_mark(token[_MARK], begins=position == 0)
            else:
                accepted = self._take_value(is_string=kind in (_STRING, _OTHER_STRING))
                accepted = accepted and (kind <= _SCALAR or _is_valid(token[kind]))
            if not accepted:
                return Verdict.BROKEN, len(line)
            position = token.end()
            if position >= until and position < len(line):
                return Verdict.OPEN, position

    def _end_line(self) -> None:
        if 0 <= self._just_closed < self._line:
            while self._span_firsts and self._span_firsts[-1] > self._just_closed:
                self._span_firsts.pop()
                self._span_lasts.pop()
            self._span_firsts.append(self._just_closed)
            self._span_lasts.append(self._line)
        self._just_closed = -1
        self._line += 1

    def _take_value(self, *, is_string: bool) -> bool:
        if self._expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._expect = _Expect.COMMA_OR_END
        elif is_string and self._expect in (_Expect.KEY, _Expect.KEY_OR_END):
            self._expect = _Expect.COLON
        else:
            return False
        return True

    def _take_mark(self, mark: bytes, *, begins: bool) -> bool:
        expect = self._expect
        if mark in b"{[":
            return self._open(mark, self._line if begins and mark == b"{" else -1)
        if mark in b"}]":
            may_end = (_Expect.COMMA_OR_END, _Expect.KEY_OR_END if mark == b"}" else _Expect.VALUE_OR_END)
            if expect not in may_end or self._closers[-1] != mark:
                return False
            self._closers.pop()
            self._just_closed = self._begun.pop()
            self._expect = _Expect.COMMA_OR_END if self._closers else _Expect.NOTHING
        elif mark == b":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif mark == b"," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._closers[-1] == b"}" else _Expect.VALUE
        else:
            return False
        return True

    def _open(self, mark: bytes, begun: int) -> bool:
        if self._expect not in _OPENING or (self._expect is _Expect.START and mark == b"["):
            return False
        if len(self._closers) == json_text.MAX_DEPTH and not self.let_go():
            if begun < 0:
                self.too_deep = True
                return False
            self._follow_from(len(self._begun), begun)
        self._closers.append(b"}" if mark == b"{" else b"]")
        self._begun.append(begun)
        self._expect = _Expect.KEY_OR_END if mark == b"{" else _Expect.VALUE_OR_END
        return True

    def _follow_from(self, depth: int, line: int) -> None:
        del self._closers[:depth], self._begun[:depth]
        self.first = line


def _is_valid(token: bytes) -> bool:
    try:
        json_text.parse(token)
    except ContractError:
        return False
    return True
