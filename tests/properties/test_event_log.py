"""An event log is the same however it was written, and can be read on from anywhere."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from sprite_agent.artifacts import ArtifactFiles
from sprite_agent.contract.events import EventBuilder
from sprite_agent.errors import ContractError, PositionLost
from sprite_agent.event_log import index as log_index
from sprite_agent.event_log import log as log_module
from sprite_agent.event_log import newest, record_reader, rereading, resume
from sprite_agent.event_log import reader as log_reader
from sprite_agent.event_log.log import EventLog
from sprite_agent.event_log.pieces import Pace, finished
from sprite_agent.event_log.record_reader import RUN_BYTES
from sprite_agent.event_log.records import values_of
from support.logs import records_of, rest
from support.repos import LOOP, LoopFiles, event, line, lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.contract.streaming import RawEvents
    from sprite_agent.event_log.newest import Portion
    from sprite_agent.event_log.records import Record

PIECES = [
    line(event(n=1)),
    line(event("role_end", status="ok", data={"a": [1.0, None]})),
    lines(event("usage_check", data={"n": 1})),
    b"\n",
    b"  \r\n",
    b"not json\n",
    b"{\n",
    b'{"open": [\n',
    b"[1]\n",
]

logs = st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
long_logs = st.lists(
    st.sampled_from(
        [
            *PIECES,
            b'{"a": "' + b"x" * 80 + b'"}\n',
            b"x" * 250 + b"\n",
            b'{"open": [\n' + b"1,\n" * 40,
            b'{"a": "' + b"y" * 60 + b'",\n"b": "' + b"y" * 60 + b'"}\n',
        ]
    ),
    max_size=12,
).map(b"".join)
chunks = st.sampled_from([50, 500])
torn = st.sampled_from([b"", b'{"torn', b" ", b"{"])


def builder() -> EventBuilder:
    """What checks the records of the loop."""
    return EventBuilder(
        source={"repoPath": "/repo", "loopId": LOOP}, trace_id=None, emitted_at="2026-01-02T03:04:05Z", line_count=0
    )


def all_newest(log: EventLog) -> list[Portion]:
    """What has come into the log, to its end."""
    portions: list[Portion] = []
    is_all = False
    while not is_all:
        _, some, is_all = finished(log.newest_steps())
        portions += some
    return portions


def assert_like(portions: list[Portion], expected: list[Record]) -> None:
    """Fails unless the portions hold these records: each whose records are all events, as they are, else none."""
    for portion in portions:
        within = [record for record in expected if portion.start < record.end <= portion.end.offset]
        assert (portion.events is not None) == all(is_event(record) for record in within)
        if portion.events is not None:
            assert portion.record_count == sum(raw.record_count for raw in portion.events) == len(within)
            assert told(portion.events) == [(record.last_line, record.text.decode()) for record in within]
        assert 0 <= portion.size - sum(len(record.text) for record in within) <= len(within)  # newlines within runs
    assert all(any(portion.start < record.end <= portion.end.offset for portion in portions) for record in expected)


def told(raw_events: list[RawEvents]) -> list[tuple[int, str]]:
    """Each event by itself, with its line."""
    return [
        (number, text)
        for raw in raw_events
        for number, text in enumerate(raw.text.split("\n") if raw.record_count > 1 else [raw.text], raw.line)
    ]


def is_event(record: Record) -> bool:
    """Whether an envelope can be made of a judged record."""
    try:
        builder().check(values_of(record), record.last_line)
    except ContractError:
        return False
    return True


@contextlib.contextmanager
def small_limits(chunk: int = 50) -> Iterator[None]:
    """Has logs read in small pieces and records end soon, so that a short log is a long one."""
    with (
        patch.object(log_reader, "CHUNK", chunk),
        patch.object(log_index, "CHUNK", chunk),
        patch.object(rereading, "CHUNK", chunk),
        patch.object(record_reader, "RUN_BYTES", 190),
        patch.object(resume, "_FAR", 30),
        patch.object(resume, "WINDOW_BYTES", 20),
        patch.object(record_reader, "MAX_RECORD_BYTES", 200),
        patch.object(log_module, "_NEWEST_BYTES", chunk + 70),
    ):
        yield


@settings(max_examples=100)
@given(st.data(), logs, torn)
def test_a_log_looked_at_after_each_write_is_the_log_looked_at_once(
    data: st.DataObject, content: bytes, tail: bytes
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loop = LoopFiles(Path(folder))
        log = EventLog(ArtifactFiles(loop.repo), LOOP)
        unwritten = content + tail
        while unwritten:
            size = data.draw(st.integers(1, len(unwritten)))
            loop.append(unwritten[:size])
            unwritten = unwritten[size:]
            log.refresh()

        view, at_once = log.refresh(), EventLog(ArtifactFiles(loop.repo), LOOP).refresh()
        assert (view.lines, view.end, view.last_record) == (at_once.lines, at_once.end, at_once.last_record)
        assert (view.token, view.ref) == (at_once.token, at_once.ref)
        assert view.lines == content.count(b"\n")
        assert view.end == len(content)


@settings(max_examples=50)
@given(logs, torn, st.integers(1, 4))
def test_from_any_line_and_any_token_on_the_remaining_records_are_read(
    content: bytes, tail: bytes, together: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loop = LoopFiles(Path(folder))
        loop.append(content + tail)
        log = EventLog(ArtifactFiles(loop.repo), LOOP)
        everything = records_of(content + tail)

        for offset in range(content.count(b"\n") + 1):
            remaining = [record for record in everything if record.last_line > offset]
            assert rest(log, log.reader_after_line(offset)) == remaining
        with log.reader_after_line(0) as reader:
            tokens = [(reader.position, str(reader.token()))]
            while reader.take(len(content), Pace(), (together, RUN_BYTES)):
                tokens.append((reader.position, str(reader.token())))
        for place, token in tokens:
            remaining = [record for record in everything if record.last_line > place.line]
            assert rest(log, log.reader_after_token(token)) == remaining


@settings(max_examples=100)
@given(long_logs, torn, chunks, st.integers(1, 4))
def test_tokens_made_on_the_way_are_as_good_as_any(content: bytes, tail: bytes, chunk: int, together: int) -> None:
    with small_limits(chunk), tempfile.TemporaryDirectory() as folder:
        loop = LoopFiles(Path(folder))
        loop.append(content + tail)
        log = EventLog(ArtifactFiles(loop.repo), LOOP)
        everything = records_of(content + tail)

        with log.reader_after_line(0) as reader:
            while not reader.at_end(len(content)):
                reader.take(len(content), Pace(), (together, RUN_BYTES))
                remaining = [record for record in everything if record.last_line > reader.position.line]
                assert rest(log, log.reader_after_token(str(reader.token()))) == remaining
        assert rest(log, log.reader_after_token(str(log.refresh().token))) == []


@settings(max_examples=100)
@given(st.data(), logs.filter(bool), logs)
def test_a_token_of_a_changed_log_is_refused_unless_all_before_it_is_as_it_was(
    data: st.DataObject, content: bytes, other: bytes
) -> None:
    kept = data.draw(st.integers(0, len(content)))
    with tempfile.TemporaryDirectory() as folder:
        loop = LoopFiles(Path(folder))
        loop.append(content)
        log = EventLog(ArtifactFiles(loop.repo), LOOP)
        token = log.refresh().token
        loop.rewrite(content[:kept] + other)
        now = loop.log.read_bytes()

        try:
            log.reader_after_token(str(token)).close()
        except PositionLost:
            assert not now.startswith(content[: token.position.offset])
        else:
            assert now.startswith(content[: token.position.offset])


@settings(max_examples=100)
@given(st.data(), long_logs)
def test_the_portions_of_what_comes_are_all_of_it_each_with_a_token_as_good_as_any(
    data: st.DataObject, content: bytes
) -> None:
    with contextlib.ExitStack() as stack, patch.object(newest, "MAX_BATCH_EVENTS", 3):
        stack.enter_context(small_limits(data.draw(chunks)))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        loop = LoopFiles(Path(folder))
        before = data.draw(st.integers(0, len(content)))
        loop.append(content[:before])
        log = EventLog(ArtifactFiles(loop.repo), LOOP)
        start = log.refresh().token.position
        log.keep_newest(builder())
        stack.callback(log.keep_newest, None)
        portions = []
        unwritten = content[before:]
        while unwritten:
            size = data.draw(st.integers(1, len(unwritten)))
            loop.append(unwritten[:size])
            unwritten = unwritten[size:]
            if data.draw(st.booleans()):
                log.refresh()
            if data.draw(st.booleans()):
                portions += finished(log.newest_steps()).portions
        portions += all_newest(log)
        view = log.refresh()

        everything = [record for record in records_of(content) if record.last_line > start.line]
        assert_like(portions, everything)
        assert [portion.start for portion in portions] == [start.offset, *(each.end.offset for each in portions)][:-1]
        for portion in portions:
            assert len(portion.events or ()) <= 3
            remaining = [record for record in everything if record.last_line > portion.end.line]
            assert rest(log, log.reader_after_token(portion.token)) == remaining
        assert [str(view.token)] * bool(portions) == [portion.token for portion in portions[-1:]]


def test_a_portion_ends_before_the_record_that_does_not_fit_whatever_blank_lines_were_read_before_it() -> None:
    """Of the last record's end nothing is known any more when the blank lines after it were read with it."""
    blank = b"\n" * 120
    content = b"".join(line(event(n=number)) + blank for number in range(8))
    with small_limits(), patch.object(newest, "MAX_BATCH_EVENTS", 1), tempfile.TemporaryDirectory() as folder:
        loop = LoopFiles(Path(folder))
        log = EventLog(ArtifactFiles(loop.repo), LOOP)
        loop.append(b"")
        log.refresh()
        log.keep_newest(builder())
        loop.append(content)

        with patch.object(log_module, "_NEWEST_BYTES", len(content)):
            portions = all_newest(log)

        assert [len(portion.events or ()) for portion in portions] == [1] * 8
        for portion in portions:
            remaining = [record for record in records_of(content) if record.last_line > portion.end.line]
            assert rest(log, log.reader_after_token(portion.token)) == remaining
        log.keep_newest(None)
