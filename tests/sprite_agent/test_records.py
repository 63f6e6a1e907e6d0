"""A log is cut into records: complete lines only, one object on a line or over several, and what is neither."""

from __future__ import annotations

import gc
import hashlib
import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from sprite_agent.event_log import record_reader
from sprite_agent.event_log.json_prefix import ObjectPrefix
from sprite_agent.event_log.record_reader import RecordReader
from sprite_agent.event_log.records import MAX_RECORD_BYTES, Position, Record
from support.logs import fed, records_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.event_log.json_prefix import Verdict


def read(log: bytes) -> list[Record]:
    """The records of a whole log."""
    return records_of(log)


def outline(records: list[Record]) -> list[tuple[int, int, bool]]:
    """First line, last line and whether it is an object, for each record."""
    return [(record.first_line, record.last_line, record.value is not None) for record in records]


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    """`data`, `size` bytes at a time."""
    return (data[start : start + size] for start in range(0, len(data), size))


def test_each_line_with_an_object_is_a_record_and_says_where_it_ends() -> None:
    assert read(b'{"a":1}\n{"b":2}\n') == [
        Record(1, 1, 8, b'{"a":1}', {"a": 1}),
        Record(2, 2, 16, b'{"b":2}', {"b": 2}),
    ]


def test_a_torn_last_line_is_left_until_its_newline_comes() -> None:
    reader = RecordReader()

    assert outline(fed(reader, b'{"a":1}\n{"b":')) == [(1, 1, True)]
    assert (reader.lines, reader.boundary) == (1, Position(1, 8))
    assert fed(reader, b"2}") == []
    assert fed(reader, b"\n") == [Record(2, 2, 16, b'{"b":2}', {"b": 2})]
    assert (reader.lines, reader.boundary) == (2, Position(2, 16))


def test_a_torn_line_that_is_an_object_already_is_no_record_yet() -> None:
    assert read(b'{"a":1}') == []


def test_nothing_comes_of_nothing() -> None:
    assert read(b"") == []


def test_blank_lines_count_as_lines_and_are_no_records() -> None:
    reader = RecordReader()

    records = fed(reader, b'\n{"a":1}\n \t \n\r\n{"b":2}\n\n')

    assert outline(records) == [(2, 2, True), (5, 5, True)]
    assert (reader.lines, reader.boundary) == (6, Position(6, 24))


def test_an_object_over_several_lines_is_one_record_with_the_number_of_its_last_line() -> None:
    log = b'{"a":1}\n{\n  "b": [\n    2\n  ]\n}\n{"c":3}\n'

    assert read(log) == [
        Record(1, 1, 8, b'{"a":1}', {"a": 1}),
        Record(2, 6, 31, b'{\n  "b": [\n    2\n  ]\n}', {"b": [2]}),
        Record(7, 7, 39, b'{"c":3}', {"c": 3}),
    ]


def test_blank_lines_inside_an_object_are_part_of_it() -> None:
    assert read(b'{\n\n"a": 1\n  \n}\n') == [Record(1, 5, 15, b'{\n\n"a": 1\n  \n}', {"a": 1})]


def test_windows_line_ends_are_white_space() -> None:
    assert [record.value for record in read(b'{"a":1}\r\n{\r\n"b": 2\r\n}\r\n')] == [{"a": 1}, {"b": 2}]


def test_an_object_that_is_not_closed_at_the_end_is_not_yet_a_record_though_its_lines_count() -> None:
    reader = RecordReader()

    assert outline(fed(reader, b'{"a":1}\n{\n"b": 2,\n')) == [(1, 1, True)]
    assert (reader.lines, reader.boundary) == (3, Position(1, 8))
    assert outline(fed(reader, b'"c": 3\n}\n')) == [(2, 5, True)]
    assert (reader.lines, reader.boundary) == (5, Position(5, 27))


def test_an_opening_line_that_is_not_gone_on_with_is_malformed_alone_and_the_next_is_read_again() -> None:
    records = read(b'{"a": 1,\n{"b":2}\n')

    assert outline(records) == [(1, 1, False), (2, 2, True)]
    assert records[0].text == b'{"a": 1,'
    assert records[0].end == 9
    assert records[0].fault == "the beginning of an object that the next lines do not go on with"
    assert records[1] == Record(2, 2, 17, b'{"b":2}', {"b": 2})


def test_all_the_lines_after_a_given_up_opening_are_read_again() -> None:
    log = b'{\n"a": 1,\n\n{\n"b": 2\n}\n{"c":3}\n'

    records = read(log)

    assert outline(records) == [(1, 1, False), (2, 2, False), (4, 6, True), (7, 7, True)]
    assert [record.value for record in records] == [None, None, {"b": 2}, {"c": 3}]
    assert records[-1].end == len(log)


def test_a_malformed_opening_can_be_followed_by_another_one() -> None:
    assert outline(read(b'{\n{\n"a": 1\n}\n')) == [(1, 1, False), (2, 4, True)]


def test_an_object_whose_grammar_holds_but_whose_strings_do_not_is_given_up_at_its_last_line() -> None:
    assert outline(read(b'{\n"a": "\\ud800"\n}\n{"b":2}\n')) == [
        (1, 1, False),
        (2, 2, False),
        (3, 3, False),
        (4, 4, True),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"not json", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": -Infinity}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a": 1}x', "not JSON"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "deeper than 256 levels"),
        (b"[1, 2]", "no object"),
        (b"[", "not JSON"),
        (b'"text"', "no object"),
        (b"3", "no object"),
        (b"null", "no object"),
        (b"}", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\x00\x00", "not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_malformed_and_says_why(line: bytes, fault: str) -> None:
    records = read(b'{"a":1}\n' + line + b'\n{"b":2}\n')

    assert outline(records) == [(1, 1, True), (2, 2, False), (3, 3, True)]
    assert fault in str(records[1].fault)
    assert records[1].text == line


def test_integers_of_any_size_stay_exact() -> None:
    assert read(b'{"a": [9007199254740993, 18446744073709551616]}\n')[0].value == {"a": [2**53 + 1, 2**64]}


def test_size_digest_and_excerpt_of_a_record_are_those_of_its_bytes_newline_included() -> None:
    text = b'{\n"a": "' + "é".encode() * 150 + b'"\n}\n'

    record = read(text)[0]

    assert record.size_bytes == len(text)
    assert record.sha256 == hashlib.sha256(text).hexdigest()
    assert record.excerpt == '{\n"a": "' + "é" * 150 + '"\n}'


def test_an_excerpt_escapes_what_is_not_utf_8() -> None:
    assert read(b'{"a": "\xff\xc3"}\n')[0].excerpt == '{"a": "\\xff\\xc3"}'


@pytest.mark.parametrize("piece", [4096, 64 * 1024, 3 * MAX_RECORD_BYTES])
def test_of_an_overlong_line_size_digest_and_beginning_are_kept(piece: int) -> None:
    overlong = b'{"a":"' + b"x" * (2 * MAX_RECORD_BYTES) + b'"}\n'
    log = b'{"a":1}\n' + overlong + b'{"b":2}\n'
    reader = RecordReader()

    records = [record for part in in_pieces(log, piece) for record in fed(reader, part)]

    assert outline(records) == [(1, 1, True), (2, 2, False), (3, 3, True)]
    assert records[1].size_bytes == len(overlong)
    assert records[1].sha256 == hashlib.sha256(overlong).hexdigest()
    assert records[1].excerpt == overlong[:200].decode()
    assert records[1].fault == f"a line of {len(overlong)} bytes, longer than {MAX_RECORD_BYTES}"
    assert records[2] == Record(3, 3, len(log), b'{"b":2}', {"b": 2})
    assert reader.boundary == Position(3, len(log))


@pytest.mark.parametrize("piece", [1000, 2 * MAX_RECORD_BYTES])
def test_a_line_is_overlong_from_the_first_byte_beyond_the_limit(piece: int) -> None:
    longest = b'{"a":"' + b"x" * (MAX_RECORD_BYTES - 9) + b'"}\n'
    longer = longest.replace(b"x", b"xx", 1)
    assert len(longest) == MAX_RECORD_BYTES
    reader = RecordReader()

    records = [record for part in in_pieces(longest + longer, piece) for record in fed(reader, part)]

    assert outline(records) == [(1, 1, True), (2, 2, False)]
    assert records[1].size_bytes == MAX_RECORD_BYTES + 1


def test_an_overlong_line_without_its_newline_is_not_yet_a_record() -> None:
    reader = RecordReader()

    assert fed(reader, b"x" * (MAX_RECORD_BYTES + 1)) == []
    assert (reader.lines, reader.boundary) == (0, Position(0, 0))
    assert outline(fed(reader, b"\n")) == [(1, 1, False)]


def test_an_overlong_line_inside_an_object_ends_the_opening_line_and_is_malformed_itself() -> None:
    overlong = b'"b": "' + b"x" * MAX_RECORD_BYTES + b'"\n'

    records = read(b'{"a": 1,\n\n' + overlong + b'{"c":3}\n')

    assert outline(records) == [(1, 1, False), (3, 3, False), (4, 4, True)]
    assert records[0].fault == "an object that an overlong line interrupts"
    assert records[1].size_bytes == len(overlong)


def test_an_object_over_several_lines_may_be_as_long_as_a_line() -> None:
    longest = b'{"a": [\n' + b"1,\n" * ((MAX_RECORD_BYTES - 16) // 3) + b"1]" + b"}\n"
    longest = longest.replace(b"1,\n", b"1" + b" " * (MAX_RECORD_BYTES - len(longest)) + b",\n", 1)
    assert len(longest) == MAX_RECORD_BYTES

    assert outline(read(longest)) == [(1, longest.count(b"\n"), True)]


def test_of_an_object_over_several_lines_that_is_too_long_only_the_opening_line_is_malformed() -> None:
    long = b'"a": "' + b"x" * 1000 + b'",\n'
    log = b"{\n" + long * 1100 + b'"b": 2\n}\n{"c":3}\n'

    records = read(log)

    assert records[0].fault == f"an object over several lines, longer than {MAX_RECORD_BYTES} bytes"
    assert outline(records) == [*((number, number, False) for number in range(1, 1104)), (1104, 1104, True)]
    assert records[-1].end == len(log)


def test_a_reader_started_at_a_boundary_numbers_lines_and_bytes_from_there() -> None:
    reader = RecordReader(Position(7, 100))

    assert fed(reader, b'\n{"a":1}\n') == [Record(9, 9, 109, b'{"a":1}', {"a": 1})]
    assert (reader.lines, reader.boundary) == (9, Position(9, 109))


def test_reading_again_after_openings_costs_no_multiple_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sandbox code writes the log: with all lines read again after each opening, 1 MiB took minutes."""
    log = b'{"a":\n' * 250 + b"[\n" + b"1,\n" * 2000 + b"x\n"
    looks = 0
    feed = ObjectPrefix.feed

    def counted(prefix: ObjectPrefix, line: bytes) -> Verdict:
        nonlocal looks
        looks += 1
        return feed(prefix, line)

    monkeypatch.setattr(ObjectPrefix, "feed", counted)

    assert len(read(log)) == log.count(b"\n")
    assert looks < 10 * log.count(b"\n")


HOSTILE = {
    "openers around an array": b'{"a":\n' * 250 + b"[\n" + b"1,\n" * 16_000 + b"x\n",
    "openers alone": b"{\n" * 24_000,
    "nested without end": b'{"a":\n' * 8_000 + b"x\n",
    "objects in an array": b'{"a":[\n' + b"{\n}\n,\n" * 8_000 + b"x\n",
    "blank lines in an object": b"{\n" + b"\n" * 50_000 + b"x\n",
    "blank lines": b" \n" * 24_000,
    "tiny lines": b"x\n" * 24_000,
    "tiny objects": b"{}\n" * 16_000,
    "an opening of many tokens": b'{"a":[' + b"[]," * 16_000 + b"\nx\n",
    "strings with escapes": b'{"a":[\n' + b'"\\n",\n' * 8_000 + b"x\n",
    "numbers with exponents": b'{"a":[\n' + b"1e5,\n" * 10_000 + b"x\n",
    "an integer of many digits": b'{"a":' + b"1" * 50_000 + b"}\n",
    "many integers of 5,000 digits": b'{"a":[\n' + (b"1" * 5_000 + b",\n") * 50 + b"x\n",
    "nested deep on one line": b"[" * 50_000 + b"\n",
    "nested deep and closed": b'{"a":' + b"[" * 25_000 + b"]" * 25_000 + b"}\n",
    "brackets in strings": b'{"a":[' + b'"[",' * 12_000 + b"1]}\n",
    "NULs": b"\0" * 50_000 + b"\n",
    "blank lines between objects": b"{}\n\n" * 16_000,
    "blank lines between others": b"x\n \n" * 12_000,
    "objects between others": b"{}\nx\n" * 10_000,
    "a line without end": b"x" * 50_000,
}


@pytest.mark.parametrize("judges", [False, True], ids=["unjudged", "judged"])
@pytest.mark.parametrize("log", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_log_is_read_in_short_pieces_at_a_cost_that_grows_with_it_alone(log: bytes, *, judges: bool) -> None:
    """Fifty kilobytes each, by the clock of the thread: others may be at work on the machine.

    Without collections of cycles, which take as long as this whole process is large.
    """
    reader = RecordReader()
    reader.judge(wanted=judges)
    gc.disable()
    try:
        began = last = time.thread_time()
        longest = 0.0
        for _ in reader.feed(log):
            now = time.thread_time()
            longest, last = max(longest, now - last), now
        longest = max(longest, time.thread_time() - last)
    finally:
        gc.enable()

    assert longest < 0.1
    assert last - began < 2.0


@pytest.mark.parametrize("log", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_log_takes_no_more_memory_than_a_few_times_its_longest_record(log: bytes) -> None:
    reader = RecordReader()
    tracemalloc.start()
    try:
        for part in in_pieces(log, 256 * 1024):
            for _ in reader.feed(part):
                pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2 * MAX_RECORD_BYTES


def test_a_record_that_is_never_closed_takes_no_more_memory_the_longer_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_reader, "MAX_RECORD_BYTES", 10_000)
    reader = RecordReader()
    block = b'{"a": [\n' + b"{\n}\n,\n" * 800
    for _ in range(20):  # the outermost is given up, and the one inside it is still open
        fed(reader, block)

    assert reader._opening is not None  # noqa: SLF001
    assert len(reader._opening.prefix.spans) <= 4 * 800  # noqa: SLF001
