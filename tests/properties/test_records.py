"""The records of a log are the same however its bytes arrive and wherever at a boundary reading starts."""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprite_agent.contract.json_text import MAX_DEPTH
from sprite_agent.event_log import record_reader
from sprite_agent.event_log.json_prefix import ObjectPrefix, Verdict
from sprite_agent.event_log.record_reader import RecordReader
from sprite_agent.event_log.records import Position
from support.logs import fed, records_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.event_log.records import Record

LIMIT = 300
"""Longest record here, so that overlong ones stay small."""

PIECES = [
    b'{"event":"tick"}\n',
    b'{"n":2}\n',
    b'{\n  "event": "usage_check",\n  "data": {\n    "n": 1\n  }\n}\n',
    b'{\n\n"a": [1,\n2]}\n',
    b'{"open":\n',
    b'{"open": [\n',
    b"{\n",
    b"1,\n",
    b"}\n",
    b"]}\n",
    b"\n",
    b" \t\r\n",
    b" " * (LIMIT - 1) + b"\n",
    b" " * LIMIT + b"\n",
    b"not json\n",
    b"[1]\n",
    b'{"a": NaN}\n',
    b'{"a": "\xff"}\n',
    b'{\n"a": "\\ud800"\n}\n',
    b'{"a": "' + b"x" * LIMIT + b'"}\n',
    b'"a": "' + b"x" * LIMIT + b'",\n',
    b'{"a": "' + b"y" * (LIMIT // 2) + b'",\n"b": "' + b"y" * (LIMIT // 2) + b'"}\n',
]
TORN = [b"", b'{"event":"ti', b"x" * (LIMIT + 1), b" "]

logs = st.builds(
    lambda pieces, torn: b"".join(pieces) + torn,
    st.lists(st.sampled_from(PIECES) | st.binary(max_size=5).map(lambda line: line + b"\n"), max_size=15),
    st.sampled_from(TORN),
)


deep_logs = st.lists(
    st.sampled_from(
        [
            b"{}\n",
            b"1\n",
            b",\n",
            b"}\n",
            b"{\n",
            b'{"a":\n',
            b'{"a":' + b"[" * 100 + b"\n",
            b'"a":' + b"[" * 200 + b"\n",
            b"[" * 150 + b"\n",
            b"]" * 100 + b"}\n",
            b"]" * 150 + b"\n",
            b'{"a":' + b"[" * 255 + b"]" * 255 + b"}\n",
            b'{"a":' + b"[" * 256 + b"]" * 256 + b"}\n",
        ]
    ),
    max_size=12,
).map(b"".join)


@pytest.fixture(autouse=True)
def _small_records() -> Iterator[None]:
    with (
        patch.object(record_reader, "MAX_RECORD_BYTES", LIMIT),
        patch.object(record_reader, "RUN_BYTES", LIMIT - 1),
    ):
        yield


def outline(found: list[Record]) -> list[tuple[int, int, bool]]:
    """First line, last line and whether it is an object, for each record."""
    return [(record.first_line, record.last_line, record.value is not None) for record in found]


def by_the_book(log: bytes, longest: int = LIMIT) -> list[tuple[int, int, bool]]:
    """The outline of a log's records, by the contract's words and without regard to cost."""
    *lines, torn = log.split(b"\n")
    found = []
    at = 0
    while at < len(lines):
        last = last_line_of_object(lines, torn, at, longest)
        if last is None:
            break
        if lines[at].strip() or len(lines[at]) >= longest:
            found.append((at + 1, max(last, at) + 1, last >= at))
        at = max(last, at) + 1
    return found


def last_line_of_object(lines: list[bytes], torn: bytes, first: int, longest: int) -> int | None:
    """Index of the last line of the object that begins at `first`; -1: there is none; None: not yet known."""
    prefix = ObjectPrefix()
    for last in range(first, len(lines)):
        text = b"\n".join(lines[first : last + 1])
        if len(text) >= longest or depth_of(text) > MAX_DEPTH:
            return -1
        verdict = prefix.feed(lines[last] + b"\n")
        if verdict is not Verdict.OPEN or not lines[first].strip():
            return last if is_object(text) else -1
    # A line that is too long already can't go on with anything.
    return -1 if len(torn) > longest else None


def depth_of(text: bytes) -> int:
    """How deep a text whose strings have no brackets is nested."""
    return max(accumulate((byte in b"{[") - (byte in b"}]") for byte in text), default=0)


def is_object(text: bytes) -> bool:
    """Whether a strict parser takes `text` for an object of valid strings."""
    if depth_of(text) > MAX_DEPTH:
        return False
    try:
        value = json.loads(text.decode(), parse_constant=_refused)
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return False
    return isinstance(value, dict)


def _refused(constant: str) -> None:
    raise ValueError(constant)


@given(logs, st.booleans(), st.booleans())
def test_the_records_are_those_that_the_contract_describes(log: bytes, judges: bool, values: bool) -> None:  # noqa: FBT001  # hypothesis
    reader = RecordReader()
    reader.judge(wanted=judges, values=values)

    found = fed(reader, log)

    assert outline(found) == by_the_book(log)
    assert reader.lines == log.count(b"\n")


@given(deep_logs)
def test_objects_nested_too_deep_are_malformed_and_those_inside_them_are_not(log: bytes) -> None:
    with patch.object(record_reader, "MAX_RECORD_BYTES", 100 * LIMIT):
        assert outline(records_of(log)) == by_the_book(log, 100 * LIMIT)


@given(st.data(), logs)
def test_the_records_are_the_same_however_the_bytes_arrive(data: st.DataObject, log: bytes) -> None:
    whole, split = RecordReader(), RecordReader()
    split.judge(wanted=data.draw(st.booleans()), values=data.draw(st.booleans()))
    expected = fed(whole, log)

    found = []
    rest = log
    while rest:
        size = data.draw(st.integers(1, min(len(rest), 2 * LIMIT)))
        split.most = (data.draw(st.integers(1, 5)), data.draw(st.integers(-1, LIMIT)))
        found += fed(split, rest[:size])
        rest = rest[size:]

    assert found == expected
    assert (split.lines, split.boundary) == (whole.lines, whole.boundary)


@given(logs)
def test_a_reader_started_at_any_boundary_finds_the_remaining_records(log: bytes) -> None:
    everything = records_of(log)
    reader = RecordReader()
    boundaries = {Position(0, 0)}
    for line in log.split(b"\n")[:-1]:
        fed(reader, line + b"\n")
        boundaries.add(reader.boundary)
    boundaries |= {Position(record.last_line, record.end) for record in everything}

    for boundary in boundaries:
        found = fed(RecordReader(boundary), log[boundary.offset :])
        assert found == [record for record in everything if record.last_line > boundary.line]


@given(logs)
def test_text_size_and_place_of_a_record_are_those_of_its_lines(log: bytes) -> None:
    lines = [line + b"\n" for line in log.split(b"\n")[:-1]]

    for record in records_of(log):
        text = b"".join(lines[record.first_line - 1 : record.last_line])
        assert record.end == len(b"".join(lines[: record.last_line]))
        assert record.size_bytes == len(text)
        assert record.sha256 == hashlib.sha256(text).hexdigest()
        assert text.startswith(record.text)
