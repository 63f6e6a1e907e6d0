"""Line by line, an object in the making is open, closed or broken."""

from __future__ import annotations

import pytest

from sprite_agent.contract.json_text import MAX_DEPTH
from sprite_agent.event_log.json_prefix import ObjectPrefix, Verdict
from sprite_agent.event_log.pieces import goes_on

OPEN, CLOSED, BROKEN = Verdict.OPEN, Verdict.CLOSED, Verdict.BROKEN

Steps = list[tuple[bytes, Verdict]]

CASES: dict[str, Steps] = {
    "an object on one line": [(b'{"a": 1}\n', CLOSED)],
    "an empty object": [(b"{}\n", CLOSED)],
    "an empty object over two lines": [(b"{\n", OPEN), (b"}\n", CLOSED)],
    "a member a line": [(b"{\n", OPEN), (b'  "a": 1,\n', OPEN), (b'  "b": 2\n', OPEN), (b"}\n", CLOSED)],
    "every token on its own line": [
        (token + b"\n", CLOSED if step == 12 else OPEN)
        for step, token in enumerate(
            [b"{", b'"a"', b":", b"[", b"1", b",", b"true", b"]", b",", b'"b"', b":", b"null", b"}"]
        )
    ],
    "blank lines between tokens": [(b"{\n", OPEN), (b"\n", OPEN), (b" \t\r\n", OPEN), (b"}\n", CLOSED)],
    "white space around": [(b" \t{\r\n", OPEN), (b' "a" : 1 \r\n', OPEN), (b" } \r\n", CLOSED)],
    "nothing yet": [(b"\n", OPEN), (b"   \n", OPEN), (b"{}\n", CLOSED)],
    "brackets in strings": [(b'{"}": "]{[",\n', OPEN), (b'"a": "\\"}"\n', OPEN), (b"}\n", CLOSED)],
    "nested objects and arrays": [(b'{"a": [{\n', OPEN), (b'"b": [[], {}]\n', OPEN), (b"}]}\n", CLOSED)],
    "an empty array over two lines": [(b'{"a": [\n', OPEN), (b"]}\n", CLOSED)],
    "numbers of every form": [(b'{"a": [0, -0, 1.5, -2e3, 1E+2, 10.25e-7,\n', OPEN), (b"7]}\n", CLOSED)],
    "a lone surrogate": [(b'{"a": "\\ud800"}\n', BROKEN)],
    "an escape that JSON does not have": [(b'{"a": "\\q"}\n', BROKEN)],
    "invalid UTF-8": [(b'{"a": "\xff"}\n', BROKEN)],
    "a number beyond a double": [(b'{"a": 1e400}\n', BROKEN)],
    "an array": [(b"[\n", BROKEN)],
    "a string": [(b'"a"\n', BROKEN)],
    "a number": [(b"1\n", BROKEN)],
    "a word": [(b"loop started\n", BROKEN)],
    "a closing brace first": [(b"}\n", BROKEN)],
    "two objects on a line": [(b"{} {}\n", BROKEN)],
    "something after the end": [(b'{"a": 1} x\n', BROKEN)],
    "a comma after the end": [(b"{},\n", BROKEN)],
    "a key without quotes": [(b"{a: 1}\n", BROKEN)],
    "a key that is a number": [(b"{1: 1}\n", BROKEN)],
    "a second key": [(b'{"a" "b"\n', BROKEN)],
    "a value without a key": [(b'{"a": 1,\n', OPEN), (b'{"b": 2}\n', BROKEN)],
    "a comma before the first key": [(b"{,\n", BROKEN)],
    "a comma before the end of an object": [(b'{"a": 1,\n', OPEN), (b"}\n", BROKEN)],
    "a comma before the end of an array": [(b'{"a": [1,\n', OPEN), (b"]}\n", BROKEN)],
    "a comma first in an array": [(b'{"a": [,\n', BROKEN)],
    "two commas": [(b'{"a": 1,,\n', BROKEN)],
    "two values": [(b'{"a": 1\n', OPEN), (b"2}\n", BROKEN)],
    "two values with no space between": [(b'{"a": 01}\n', BROKEN)],
    "a colon in an array": [(b'{"a": ["b": 1]}\n', BROKEN)],
    "no value": [(b'{"a":\n', OPEN), (b"}\n", BROKEN)],
    "an object closed as an array": [(b"{]\n", BROKEN)],
    "an array closed as an object": [(b'{"a": [}\n', BROKEN)],
    "the inner one left open": [(b'{"a": {"b": 1]\n', BROKEN)],
    "a string over two lines": [(b'{"a": "b\n', BROKEN)],
    "a tab in a string": [(b'{"a": "b\tc"}\n', BROKEN)],
    "a control character in a string": [(b'{"a": "\x01"}\n', BROKEN)],
    "a backslash at the end of the line": [(b'{"a": "\\\n', BROKEN)],
    "a number cut at its point": [(b'{"a": 1.\n', BROKEN)],
    "a number cut at its exponent": [(b'{"a": 1e\n', BROKEN)],
    "a number with a plus": [(b'{"a": +1}\n', BROKEN)],
    "a lone minus": [(b'{"a": -\n', BROKEN)],
    "NaN": [(b'{"a": NaN}\n', BROKEN)],
    "Infinity": [(b'{"a": -Infinity}\n', BROKEN)],
    "a word that begins like a literal": [(b'{"a": nullify}\n', BROKEN)],
    "a literal over two lines": [(b'{"a": tr\n', BROKEN)],
    "single quotes": [(b"{'a': 1}\n", BROKEN)],
    "a byte order mark": [(b"\xef\xbb\xbf{}\n", BROKEN)],
    "a form feed between tokens": [(b"{\x0c}\n", BROKEN)],
    "a NUL": [(b"{\x00\n", BROKEN)],
}


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys())
def test_each_line_gets_the_verdict_of_the_grammar(steps: Steps) -> None:
    prefix = ObjectPrefix()

    assert [prefix.feed(line) for line, _ in steps] == [verdict for _, verdict in steps]


def test_nesting_is_followed_as_deep_as_the_parser_goes() -> None:
    prefix = ObjectPrefix()

    assert {prefix.feed(b'{"a":\n') for _ in range(MAX_DEPTH)} == {OPEN}
    assert prefix.feed(b"1\n") is OPEN
    assert prefix.feed(b"}" * MAX_DEPTH + b"\n") is CLOSED


def test_an_object_nested_too_deep_is_let_go_and_the_next_inside_that_begins_a_line_is_followed() -> None:
    prefix = ObjectPrefix()
    verdicts = [prefix.feed(line) for line in (b'{"a":\n', b'{"b":\n', b'{"c":' + b"[" * (MAX_DEPTH - 2) + b"\n")]

    assert (verdicts, prefix.first) == ([OPEN] * 3, 1)
    assert prefix.feed(b"]" * (MAX_DEPTH - 2) + b"}}\n") is CLOSED
    assert prefix.first == 1


def test_what_is_nested_too_deep_and_has_no_other_object_inside_is_broken() -> None:
    prefix = ObjectPrefix()
    prefix.feed(b'{"a":\n')

    assert prefix.feed(b"[" * MAX_DEPTH + b"\n") is BROKEN
    assert prefix.too_deep


def test_objects_inside_that_fill_whole_lines_are_remembered_and_those_inside_them_are_not() -> None:
    prefix = ObjectPrefix()
    for line in (b'{"a": [\n', b"{}\n", b",\n", b"{\n", b'"b":\n', b"{\n", b"}\n", b"}\n", b",{\n", b"},\n"):
        assert prefix.feed(line) is OPEN

    assert prefix.spans == [(3, 7)]
    assert prefix.last_line_of(1, 0) == (1, 0)
    assert prefix.last_line_of(3, 0) == (7, 0)
    assert prefix.last_line_of(8, 0) == (8, 1)
    assert [line for line in range(10) if prefix.is_open(line)] == [0]


def test_a_line_of_many_tokens_is_followed_in_pieces() -> None:
    steps = ObjectPrefix().steps(b'{"a": [' + b"1," * 100_000 + b"\n")

    pieces = 0
    while goes_on(steps):
        pieces += 1

    assert pieces > 10
