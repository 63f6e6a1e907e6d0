"""Tells, line by line, whether an object over several lines is still open, closed or broken.

A JSON parser says only whether a whole text is JSON. Asking it anew with each further
line would cost the square of the record's size, so this follows the grammar once.
"""

from __future__ import annotations

import enum
import re

from sprite_agent.contract import json_text
from sprite_agent.errors import ContractError


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
    rb"""[ \t\r\n]*(?:
        (?P<string>"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*")
      | (?P<scalar>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null)
      | (?P<mark>[{}\[\]:,])
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_SURE_BYTES = 15
_OPENING = (_Expect.START, _Expect.VALUE, _Expect.VALUE_OR_END)


class ObjectPrefix:
    """One object in the making. Feed it lines, newline included, until it is no longer open.

    It takes what the parser takes, but for the depth of nesting, which is left to the parser. What it saw of
    the objects inside that begin a line is kept, so that nobody has to read those lines again when the whole comes to
    nothing.
    """

    def __init__(self) -> None:
        self._closers: list[bytes] = []
        self._begun_in: list[int] = []
        """For each open container the line it begins, where it is an object and the line's first token; else -1."""
        self._heights: list[int] = []
        """For each open container how deep it is nested inside."""
        self._expect = _Expect.START
        self._lines = 0
        self.ended: dict[int, int] = {}
        """For each object that begins one line (counted from 0) and is closed at the end of another: that one.

        Objects nested too deep for the parser are not here.
        """
        self.too_deep: set[int] = set()
        """The lines that begin such objects."""
        self._just_closed: tuple[int, int] | None = None
        """Of the last container closed, if nothing came after it on its line: the line it begins, and its height."""

    @property
    def still_open(self) -> list[int]:
        """The lines, counted from 0, that begin an object which is still open."""
        return [line for line in self._begun_in if line >= 0]

    def feed(self, line: bytes) -> Verdict:
        """The verdict after one more line."""
        position = 0
        while True:
            token = _TOKEN.match(line, position)
            if token is None:
                return Verdict.BROKEN
            if token.lastgroup == "end":
                self._note_ended()
                self._lines += 1
                return Verdict.CLOSED if self._expect is _Expect.NOTHING else Verdict.OPEN
            self._just_closed = None
            is_first, position = position == 0, token.end()
            if token.lastgroup == "mark":
                accepted = self._take_mark(token["mark"], is_first=is_first)
            else:
                accepted = self._take_value(is_string=token.lastgroup == "string")
            if not accepted or not _is_valid(token):
                return Verdict.BROKEN

    def begin_at(self, line: int) -> None:
        """Forgets what is around the still open object that begins `line`: it is the one in the making now."""
        depth = self._begun_in.index(line)
        del self._closers[:depth], self._heights[:depth]
        self._begun_in = [begun - line if begun >= 0 else -1 for begun in self._begun_in[depth:]]
        self.ended = {begun - line: end - line for begun, end in self.ended.items() if begun > line}
        self.too_deep = {begun - line for begun in self.too_deep if begun > line}
        self._lines -= line

    def _note_ended(self) -> None:
        if self._just_closed is not None and self._just_closed[0] >= 0:
            begun, height = self._just_closed
            if height > json_text.MAX_DEPTH:
                self.too_deep.add(begun)
            else:
                self.ended[begun] = self._lines
        self._just_closed = None

    def _take_value(self, *, is_string: bool) -> bool:
        if is_string and self._expect in (_Expect.KEY, _Expect.KEY_OR_END):
            self._expect = _Expect.COLON
        elif self._expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._expect = _Expect.COMMA_OR_END
        else:
            return False
        return True

    def _take_mark(self, mark: bytes, *, is_first: bool) -> bool:
        expect = self._expect
        if mark in b"{[":
            if expect not in _OPENING or (expect is _Expect.START and mark == b"["):
                return False
            self._closers.append(b"}" if mark == b"{" else b"]")
            self._begun_in.append(self._lines if is_first and mark == b"{" else -1)
            self._heights.append(0)
            self._expect = _Expect.KEY_OR_END if mark == b"{" else _Expect.VALUE_OR_END
        elif mark in b"}]":
            may_end = (_Expect.COMMA_OR_END, _Expect.KEY_OR_END if mark == b"}" else _Expect.VALUE_OR_END)
            if expect not in may_end or self._closers[-1] != mark:
                return False
            self._closers.pop()
            height, begun = self._heights.pop() + 1, self._begun_in.pop()
            self._just_closed = (begun, height)
            if self._heights:
                self._heights[-1] = max(self._heights[-1], height)
            self._expect = _Expect.COMMA_OR_END if self._closers else _Expect.NOTHING
        elif mark == b":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif mark == b"," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._closers[-1] == b"}" else _Expect.VALUE
        else:
            return False
        return True


def _is_valid(token: re.Match[bytes]) -> bool:
    """Whether the parser takes the token too: its rules for escapes, UTF-8 and numbers go beyond the grammar."""
    text = token["string"] or token["scalar"]
    if text is None or (text.isascii() and b"\\" not in text and len(text) < _SURE_BYTES and b"e" not in text.lower()):
        return True
    try:
        json_text.parse(text)
    except ContractError:
        return False
    return True
