"""Tells, line by line, whether an object over several lines is still open, closed or broken.

A JSON parser says only whether a whole text is JSON. Asking it anew with each further
line would cost the square of the record's size, so this follows the grammar once.
"""

from __future__ import annotations

import enum
import re

from sprite_agent.contract.json_text import MAX_DEPTH


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
_OPENING = (_Expect.START, _Expect.VALUE, _Expect.VALUE_OR_END)


class ObjectPrefix:
    """One object in the making. Feed it lines, newline included, until it is no longer open.

    CLOSED settles the grammar only; whether strings are valid is left to the parser.
    """

    def __init__(self) -> None:
        self._closers: list[bytes] = []
        self._expect = _Expect.START

    def feed(self, line: bytes) -> Verdict:
        """The verdict after one more line."""
        position = 0
        while True:
            token = _TOKEN.match(line, position)
            if token is None:
                return Verdict.BROKEN
            position = token.end()
            kind = token.lastgroup
            if kind == "end":
                return Verdict.CLOSED if self._expect is _Expect.NOTHING else Verdict.OPEN
            if not (self._take_mark(token["mark"]) if kind == "mark" else self._take_value(is_string=kind == "string")):
                return Verdict.BROKEN

    def _take_value(self, *, is_string: bool) -> bool:
        if is_string and self._expect in (_Expect.KEY, _Expect.KEY_OR_END):
            self._expect = _Expect.COLON
        elif self._expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self._expect = _Expect.COMMA_OR_END
        else:
            return False
        return True

    def _take_mark(self, mark: bytes) -> bool:
        expect = self._expect
        if mark in b"{[":
            if expect not in _OPENING or (expect is _Expect.START and mark == b"[") or len(self._closers) == MAX_DEPTH:
                return False
            self._closers.append(b"}" if mark == b"{" else b"]")
            self._expect = _Expect.KEY_OR_END if mark == b"{" else _Expect.VALUE_OR_END
        elif mark in b"}]":
            may_end = (_Expect.COMMA_OR_END, _Expect.KEY_OR_END if mark == b"}" else _Expect.VALUE_OR_END)
            if expect not in may_end or self._closers[-1] != mark:
                return False
            self._closers.pop()
            self._expect = _Expect.COMMA_OR_END if self._closers else _Expect.NOTHING
        elif mark == b":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif mark == b"," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._closers[-1] == b"}" else _Expect.VALUE
        else:
            return False
        return True
