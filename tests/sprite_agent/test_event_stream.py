"""A subscription gives every event once and in order, says where it stands, and ends only as it promises."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import threading
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.artifacts import ArtifactFiles
from sprite_agent.contract import json_text
from sprite_agent.contract.events import EventBuilder
from sprite_agent.contract.json_text import OpenObject
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import (
    CursorBeyondEnd,
    CursorInvalid,
    EventMalformed,
    EventsNotFound,
    HistoryRewritten,
    LogReplaced,
    LogTruncated,
    LoopNotFound,
    RequestInvalid,
    ResumeTokenInvalid,
)
from sprite_agent.event_log import record_reader, tail
from sprite_agent.event_log import stream as stream_module
from sprite_agent.event_log.folder_watch import FolderWatch
from sprite_agent.event_log.newest import MAX_BATCH_BYTES, MAX_BATCH_EVENTS
from sprite_agent.event_log.pieces import Pace, goes_on
from sprite_agent.event_log.reader import LogReader
from sprite_agent.event_log.records import MAX_RECORD_BYTES
from sprite_agent.repo import Repo
from support.following import Follower, come_to_rest, lines_of, replay, subscribe
from support.logs import numbered
from support.repos import LOOP, MOMENT, LoopFiles, event, line, lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sprite_agent.errors import OpsError
    from sprite_agent.event_log.records import Record, Run

SPACED = b"".join(
    [
        line(event(n=1)),
        b"\n",
        lines(event("usage_check", n=2)),
        line(event(n=3)),
        b"\n\n",
        lines(event("usage_check", n=4)),
        line(event(n=5)),
        line(event(n=6)),
        b" \n\n",
    ]
)
"""Events on one line and on several, between blank lines."""

SPACED_LINES = [1, 10, 11, 21, 22, 23]


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    return LoopFiles(tmp_path / "repo")


@pytest.fixture
async def repo(loop: LoopFiles, tmp_path: Path) -> AsyncIterator[Repo]:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
    yield repo
    repo.close()


def open_files() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


# What an event holds.


@pytest.mark.usefixtures("steady")
async def test_the_raw_line_and_its_data_are_verbatim(repo: Repo, loop: LoopFiles) -> None:
    text = '{ "timestamp":"t", "type" : "x","data": { "a":1.0,\n "a" : [1e2, 18446744073709551616] } , "u": "\\u00e9é"}'
    loop.append(text.encode() + b"\n")

    found = (await replay(repo))[0].events[0]["event"]

    assert isinstance(found["raw"], OpenObject)
    assert found["raw"].text == text
    assert isinstance(found["payload"], OpenObject)
    assert found["payload"].text == '{ "a":1.0,\n "a" : [1e2, 18446744073709551616] }'


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    "data", ['"data":{"a":1},"data":{"b":2}', '"data":{"a":1},"d\\u0061ta":{"b":2}', '"data":3,"data":{"b":2}']
)
async def test_of_a_key_given_twice_the_last_counts_for_value_and_text(repo: Repo, loop: LoopFiles, data: str) -> None:
    loop.append(f'{{"timestamp":"t","event":"x",{data}}}\n'.encode())

    payload = (await replay(repo))[0].events[0]["event"]["payload"]

    assert isinstance(payload, OpenObject)
    assert (payload, payload.text) == ({"b": 2}, '{"b":2}')


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"event": None}, "event.name"),
        ({"event": ""}, "event.name"),
        ({"event": 3}, "event.name"),
        ({"timestamp": None}, "event.timestamp"),
        ({"timestamp": ""}, "event.timestamp"),
        ({"timestamp": 1771824606}, "event.timestamp"),
        ({"role": 3}, "event.role"),
        ({"status": True}, "event.status"),
        ({"message": {}}, "event.message"),
        ({"data": []}, "event.payload"),
        ({"data": "text"}, "event.payload"),
        ({"run_id": 7}, "run.runId"),
        ({"iteration": -1}, "run.iteration"),
        ({"iteration": 2.5}, "run.iteration"),
        ({"iteration": "2.5"}, "run.iteration"),
        ({"iteration": 2**63}, "run.iteration"),
        ({"iteration": "1e400"}, ""),
    ],
)
async def test_an_event_that_the_schema_refuses_fails_with_its_line_and_what_is_wrong(
    repo: Repo, loop: LoopFiles, members: dict[str, Any], path: str
) -> None:
    loop.append(line(event(n=1)), line(event(**members)), line(event(n=3)))

    async with subscribe(repo) as follower:
        assert lines_of([await follower.next()]) == [1]
        with pytest.raises(EventMalformed, match=f"line 2 of the event log is malformed: {path}") as malformed:
            await follower.next()

    assert malformed.value.details == {"line": "2", "lastLine": "2"}


def sized(size: int, n: int) -> bytes:
    """An event whose line has so many bytes."""
    return line(event(n=n, text="x" * (size - len(line(event(n=n, text=""))))))


@pytest.mark.parametrize("follow", [False, True], ids=["read", "from the tail"])
async def test_a_line_that_is_too_long_is_malformed_whatever_stands_before_it(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, *, follow: bool
) -> None:
    """A record that is longer than a batch leaves less than no room in it."""
    monkeypatch.setattr(Pace, "over", lambda _: False)  # as on a fast machine
    content = sized(160_000, 1) + sized(MAX_RECORD_BYTES + 101, 2) + b"".join(sized(200, n) for n in range(3, 300))
    async with subscribe(repo, follow=follow) if follow else contextlib.nullcontext() as follower:
        if follower is not None:
            await follower.next()
        loop.append(content)

        with pytest.raises(EventMalformed, match="line 2 of the event log is malformed: a line of"):
            await (replay(repo) if follower is None else follower.until_lines(299))


# Where a subscription begins.


@pytest.mark.parametrize("offset", range(SPACED.count(b"\n") + 1))
async def test_a_subscription_after_a_line_gives_the_events_whose_last_line_comes_later(
    repo: Repo, loop: LoopFiles, offset: int
) -> None:
    loop.append(SPACED)

    batches = await replay(repo, after_line=offset)

    assert lines_of(batches) == [number for number in SPACED_LINES if number > offset]
    assert batches[-1].caught_up
    assert batches[-1].cursor == {"eventLineOffset": max(offset, 23), "eventLineCount": 25}


@pytest.mark.usefixtures("steady")
async def test_a_subscription_that_finds_nothing_new_leaves_the_cursor_where_it_was(
    repo: Repo, loop: LoopFiles
) -> None:
    loop.append(SPACED)

    (batch,) = await replay(repo, after_line=24)

    assert batch.events == []
    assert batch.cursor == {"eventLineOffset": 24, "eventLineCount": 25}


async def test_a_place_beyond_the_end_is_refused(repo: Repo, loop: LoopFiles) -> None:
    loop.append(SPACED)

    with pytest.raises(CursorBeyondEnd):
        await replay(repo, after_line=26)


@pytest.mark.parametrize(
    ("query", "refusal"),
    [
        ({"after_line": -1}, CursorInvalid),
        ({"max_events": -1}, RequestInvalid),
        ({"heartbeat_interval": 0.0}, RequestInvalid),
        ({"heartbeat_interval": 0.05}, RequestInvalid),
        ({"heartbeat_interval": 61.0}, RequestInvalid),
        ({"heartbeat_interval": float("nan")}, RequestInvalid),
        ({"heartbeat_interval": float("inf")}, RequestInvalid),
        ({"resume_token": ""}, ResumeTokenInvalid),
        ({"resume_token": "r1.x"}, ResumeTokenInvalid),
        ({"loop_id": "other"}, LoopNotFound),
    ],
)
async def test_what_cannot_be_asked_for_is_refused(repo: Repo, query: dict[str, Any], refusal: type[OpsError]) -> None:
    with pytest.raises(refusal):
        await replay(repo, **query)


@pytest.mark.usefixtures("steady")
async def test_a_token_counts_more_than_a_line(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(5))
    (batch,) = await replay(repo, max_events=3)

    assert lines_of(await replay(repo, resume_token=batch.resume_token, after_line=1)) == [4, 5]
    assert lines_of(await replay(repo, resume_token=batch.resume_token, after_line=1000)) == [4, 5]


@pytest.mark.parametrize("size", range(1, len(SPACED_LINES) + 2))
async def test_every_batch_resumes_to_the_exact_remainder(repo: Repo, loop: LoopFiles, size: int) -> None:
    loop.append(SPACED)
    await come_to_rest(repo)
    first = await replay(repo)
    found: list[int] = []
    token = None
    while batches := [batch for batch in await replay(repo, resume_token=token, max_events=size) if batch.events]:
        for batch in batches:
            found += lines_of([batch])
            remaining = await replay(repo, resume_token=batch.resume_token)
            assert found + lines_of(remaining) == lines_of(first)
            assert batch.cursor["eventLineOffset"] == found[-1]
            remaining = await replay(repo, after_line=batch.cursor["eventLineOffset"])
            assert found + lines_of(remaining) == lines_of(first)
        token = batches[-1].resume_token

    assert found == lines_of(first) == SPACED_LINES


async def test_every_batch_of_a_long_replay_resumes_to_the_exact_remainder(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(3000, width=200))
    batches = await replay(repo)
    assert lines_of(batches) == list(range(1, 3001))

    for count in range(1, len(batches) + 1):
        done = lines_of(batches[:count])
        remaining = await replay(repo, resume_token=batches[count - 1].resume_token)
        assert done + lines_of(remaining) == lines_of(batches)


async def test_the_resume_token_of_a_snapshot_is_consistent_with_its_count(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(3), b"\n")
    token = repo.read_loop(LOOP).resume_token
    assert [batch.events for batch in await replay(repo, resume_token=token)] == [[]]

    loop.append(numbered(2, first=5))

    assert lines_of(await replay(repo, resume_token=token)) == [5, 6]


async def test_the_resume_token_of_a_snapshot_stands_before_an_object_that_is_not_closed_yet(
    repo: Repo, loop: LoopFiles
) -> None:
    whole = lines(event("usage_check"))
    loop.append(numbered(3), whole[:20])
    token = repo.read_loop(LOOP).resume_token

    loop.append(whole[20:])

    assert lines_of(await replay(repo, resume_token=token)) == [10]


# How much comes at once.


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_a_subscription_ends_after_as_many_events_as_asked_for(
    repo: Repo, loop: LoopFiles, *, limit: int, follow: bool
) -> None:
    loop.append(SPACED)

    batches = await replay(repo, max_events=limit, follow=follow)

    assert lines_of(batches) == SPACED_LINES[:limit]
    assert not batches[-1].caught_up


async def test_a_following_subscription_ends_when_the_last_event_asked_for_comes(repo: Repo, loop: LoopFiles) -> None:
    async with subscribe(repo, max_events=2, follow=True) as follower:
        await follower.next()
        loop.append(numbered(1))
        await follower.until_lines(1)
        loop.append(numbered(2, first=2))

        assert lines_of(await follower.to_end()) == [1, 2]


async def test_no_limit_on_events_means_all_of_them(repo: Repo, loop: LoopFiles) -> None:
    loop.append(SPACED)

    assert lines_of(await replay(repo, max_events=0)) == SPACED_LINES


@pytest.mark.usefixtures("steady")
async def test_a_batch_holds_a_bounded_number_of_events(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(2 * MAX_BATCH_EVENTS + 1))

    batches = await replay(repo)

    assert [len(batch.events) for batch in batches] == [MAX_BATCH_EVENTS, MAX_BATCH_EVENTS, 1]
    assert [batch.caught_up for batch in batches] == [False, False, True]


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("follow", [True, False])
async def test_a_full_batch_at_the_end_of_the_log_is_followed_by_word_that_this_was_all(
    repo: Repo, loop: LoopFiles, *, follow: bool
) -> None:
    loop.append(numbered(MAX_BATCH_EVENTS))
    async with subscribe(repo, follow=follow) as follower:
        await follower.until_lines(MAX_BATCH_EVENTS)
        if not follower.seen[-1].caught_up:
            await follower.next()

        assert follower.seen[-1].caught_up
        assert len(follower.seen) <= 2


@pytest.mark.usefixtures("steady")
async def test_a_batch_holds_a_bounded_number_of_skipped_records(repo: Repo, loop: LoopFiles) -> None:
    loop.append(b"x\n" * (MAX_BATCH_EVENTS + 1), numbered(1))

    batches = await replay(repo, skip_malformed=True)

    assert [(len(batch.events), len(batch.skipped)) for batch in batches] == [(0, MAX_BATCH_EVENTS), (1, 1)]


@pytest.mark.parametrize("width", [1000, 40_000, 300_000, 500_000])
async def test_a_batch_of_more_than_one_event_holds_a_bounded_number_of_bytes(
    repo: Repo, loop: LoopFiles, width: int
) -> None:
    loop.append(numbered(30), b"".join(numbered(2) + numbered(1, width=width) for _ in range(5)))

    batches = await replay(repo)

    sizes = [
        sum(len(found["event"]["raw"].text) for found in batch.events if isinstance(found["event"]["raw"], OpenObject))
        for batch in batches
        if len(batch.events) > 1
    ]
    assert max(sizes) <= MAX_BATCH_BYTES
    assert len(lines_of(batches)) == 45


# What a batch says of where the stream stands.


@pytest.mark.usefixtures("steady")
async def test_blank_lines_at_the_end_leave_the_cursor_below_the_count_and_the_stream_caught_up(
    repo: Repo, loop: LoopFiles
) -> None:
    loop.append(numbered(2), b"\n\n \n")

    (batch,) = await replay(repo)

    assert batch.cursor == {"eventLineOffset": 2, "eventLineCount": 5}
    assert batch.caught_up


@pytest.mark.usefixtures("steady")
async def test_an_object_that_is_not_closed_yet_leaves_the_stream_caught_up(repo: Repo, loop: LoopFiles) -> None:
    whole = lines(event("usage_check"))
    loop.append(numbered(2), whole[:-2])

    (batch,) = await replay(repo)

    assert batch.cursor == {"eventLineOffset": 2, "eventLineCount": 8}
    assert batch.caught_up
    loop.append(whole[-2:])
    assert lines_of(await replay(repo, resume_token=batch.resume_token)) == [9]
    assert lines_of(await replay(repo, after_line=batch.cursor["eventLineOffset"])) == [9]


@pytest.mark.usefixtures("steady")
async def test_events_and_cursor_say_how_many_lines_the_log_had(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(3), b"\n", b'{"torn')

    async with subscribe(repo, follow=True, skip_malformed=True) as follower:
        first = await follower.next()
        loop.append(b'": 1}\n' + numbered(2))
        second = await follower.next()

    assert {found["cursor"]["eventLineCount"] for found in first.events} == {4}
    assert first.cursor["eventLineCount"] == 4
    assert {found["cursor"]["eventLineCount"] for found in second.events} == {7}
    assert second.cursor["eventLineCount"] == 7


@pytest.mark.usefixtures("steady")
async def test_the_trace_id_is_in_every_event(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(2))

    (batch,) = await replay(repo, trace_id="trace-1")

    assert [found["traceId"] for found in batch.events] == ["trace-1", "trace-1"]


# Malformed records.


async def test_everything_before_a_malformed_record_is_delivered_then_it_fails_with_its_line(
    repo: Repo, loop: LoopFiles
) -> None:
    loop.append(numbered(250), b"\n", b"not json\n", numbered(1))

    async with subscribe(repo) as follower:
        assert await follower.until_lines(250) == list(range(1, 251))
        with pytest.raises(EventMalformed, match="line 252 of the event log is malformed: not JSON") as malformed:
            await follower.next()

    assert malformed.value.details == {"line": "252", "lastLine": "252"}


async def test_a_malformed_first_record_fails_after_an_empty_batch(repo: Repo, loop: LoopFiles) -> None:
    loop.append(b"not json\n", numbered(1))

    async with subscribe(repo) as follower:
        assert (await follower.next()).events == []
        with pytest.raises(EventMalformed, match="line 1 "):
            await follower.next()


async def test_a_malformed_record_over_several_lines_is_named_by_all_of_them(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(1), b'{\n"no": "name"\n}\n')

    with pytest.raises(EventMalformed, match="lines 2 to 4 of the event log is malformed") as malformed:
        await replay(repo)

    assert malformed.value.details == {"line": "2", "lastLine": "4"}


async def test_a_malformed_record_that_comes_while_following_fails_after_what_came_before(
    repo: Repo, loop: LoopFiles
) -> None:
    async with subscribe(repo, follow=True) as follower:
        await follower.next()
        loop.append(numbered(2) + b"not json\n" + numbered(1))

        with pytest.raises(EventMalformed, match="line 3 "):
            await follower.to_end()

    assert follower.lines == [1, 2]
    assert lines_of(await replay(repo, resume_token=follower.seen[-1].resume_token, skip_malformed=True)) == [4]


async def test_skipped_records_are_reported_with_what_is_known_of_them(repo: Repo, loop: LoopFiles) -> None:
    nameless = b'{\n"no": "name"\n}\n'
    overlong = b"x" * (MAX_RECORD_BYTES + 1) + b"\n"
    loop.append(numbered(1), b"not \xff json\n", numbered(1), nameless, overlong, b"{\n", numbered(1))

    batches = await replay(repo, skip_malformed=True)

    assert lines_of(batches) == [1, 3, 9]
    skips = [skipped for batch in batches for skipped in batch.skipped]
    found = [(skipped.first_line, skipped.last_line, skipped.excerpt) for skipped in skips]
    assert found == [(2, 2, "not \\xff json"), (4, 6, '{\n"no": "name"\n}'), (7, 7, "x" * 200), (8, 8, "{")]
    texts = [b"not \xff json\n", nameless, overlong, b"{\n"]
    assert [skipped.size_bytes for skipped in skips] == [len(text) for text in texts]
    assert [skipped.sha256 for skipped in skips] == [hashlib.sha256(text).hexdigest() for text in texts]
    reasons = ["not JSON", "event.", "longer than 1048576", "the beginning of an object"]
    assert all(wanted in skipped.reason for wanted, skipped in zip(reasons, skips, strict=True))


@pytest.mark.usefixtures("steady")
async def test_a_skipped_record_is_not_reported_again_after_resuming(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(1), b"not json\n", b"\n")

    (batch,) = await replay(repo, skip_malformed=True)
    assert len(batch.skipped) == 1
    assert batch.cursor == {"eventLineOffset": 1, "eventLineCount": 3}
    assert batch.caught_up
    loop.append(numbered(1))

    (resumed,) = await replay(repo, skip_malformed=True, resume_token=batch.resume_token)
    assert resumed.skipped == []
    assert lines_of([resumed]) == [4]
    assert lines_of(await replay(repo, resume_token=batch.resume_token)) == [4]


async def test_a_record_skipped_while_following_is_reported_at_once_though_no_event_came(
    repo: Repo, loop: LoopFiles
) -> None:
    async with subscribe(repo, follow=True, skip_malformed=True) as follower:
        await follower.next()
        loop.append(b"not json\n")

        batch = await follower.next()

        assert (batch.events, [skipped.first_line for skipped in batch.skipped]) == ([], [1])
        assert batch.cursor == {"eventLineOffset": 0, "eventLineCount": 1}


async def test_skipped_records_do_not_count_as_events_asked_for(repo: Repo, loop: LoopFiles) -> None:
    loop.append(b"x\n", numbered(1), b"x\n", numbered(2), b"x\n")

    assert lines_of(await replay(repo, skip_malformed=True, max_events=2)) == [2, 4]


# Following.


async def test_the_first_batch_comes_at_once_though_there_is_nothing_in_it(repo: Repo) -> None:
    async with subscribe(repo, follow=True) as follower:
        began = time.monotonic()
        batch = await follower.next()

        assert time.monotonic() - began < 5
        assert (batch.events, batch.skipped, batch.caught_up) == ([], [], True)
        assert batch.cursor == {"eventLineOffset": 0, "eventLineCount": 0}


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 10_000])
async def test_what_is_appended_arrives_once_and_in_order_however_it_is_written(
    repo: Repo, loop: LoopFiles, size: int
) -> None:
    async with subscribe(repo, follow=True) as follower:
        await follower.next()
        parts = [SPACED[start : start + size] for start in range(0, len(SPACED), size)]
        writer = asyncio.create_task(asyncio.to_thread(loop.append, *parts))

        assert await follower.until_lines(len(SPACED_LINES)) == SPACED_LINES
        await writer


async def test_a_following_stream_gives_first_what_is_there_and_then_what_comes(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(500))

    async with subscribe(repo, follow=True, after_line=100) as follower:
        await follower.until_lines(400)
        loop.append(numbered(300, first=501))

        assert await follower.until_lines(700) == list(range(101, 801))


async def test_a_torn_line_arrives_when_it_is_complete(repo: Repo, loop: LoopFiles) -> None:
    whole = numbered(1)
    async with subscribe(repo, follow=True, heartbeat_interval=0.1) as follower:
        await follower.next()
        loop.append(whole[:-1])
        assert (await follower.next()).events == []

        loop.append(whole[-1:])

        assert await follower.until_lines(1) == [1]


async def test_an_object_over_several_lines_arrives_when_it_is_closed(repo: Repo, loop: LoopFiles) -> None:
    whole = lines(event("usage_check"))
    async with subscribe(repo, follow=True, heartbeat_interval=0.1) as follower:
        await follower.next()
        loop.append(whole[:-2])
        batch = await follower.next()
        while batch.cursor["eventLineCount"] == 0:
            batch = await follower.next()
        assert (batch.events, batch.cursor) == ([], {"eventLineOffset": 0, "eventLineCount": 6})

        loop.append(whole[-2:])

        assert await follower.until_lines(1) == [7]
    assert lines_of(await replay(repo, resume_token=batch.resume_token)) == [7]


async def test_a_quiet_stream_beats_and_says_where_it_stands(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(2), b"\n")

    began = time.monotonic()
    async with subscribe(repo, follow=True, heartbeat_interval=0.1) as follower:
        first = await follower.next()
        beats = [await follower.next() for _ in range(3)]

        assert time.monotonic() - began > 0.25
        for beat in beats:
            assert (beat.events, beat.skipped, beat.caught_up) == ([], [], True)
            assert (beat.cursor, beat.resume_token) == (first.cursor, first.resume_token)


async def test_a_beat_passes_blank_lines_that_came_meanwhile(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(1))
    async with subscribe(repo, follow=True, heartbeat_interval=0.1) as follower:
        await follower.next()
        loop.append(b"\n\n")

        batch = await follower.next()
        while batch.cursor["eventLineCount"] == 1:
            batch = await follower.next()

        assert batch.cursor == {"eventLineOffset": 1, "eventLineCount": 3}
        assert batch.caught_up


async def test_a_reader_that_comes_back_late_has_missed_nothing(repo: Repo, loop: LoopFiles) -> None:
    async with subscribe(repo, follow=True) as follower, subscribe(repo, follow=True) as prompt:
        await follower.next()
        for round_ in range(5):
            loop.append(numbered(100, first=100 * round_))
            await prompt.until_lines(100 * (round_ + 1))

        assert await follower.until_lines(500) == prompt.lines == list(range(1, 501))


async def test_followers_that_leave_do_not_disturb_the_others(repo: Repo, loop: LoopFiles) -> None:
    async with subscribe(repo, follow=True) as staying:
        async with subscribe(repo, follow=True) as leaving:
            await staying.next()
            await leaving.next()
        loop.append(numbered(1))

        assert await staying.until_lines(1) == [1]


async def test_a_stream_that_is_left_gives_back_what_it_held(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(1))
    async with subscribe(repo, follow=True) as follower:
        await follower.next()
    before = open_files()

    for _ in range(3):
        async with subscribe(repo, follow=True) as follower:
            await follower.next()
        with pytest.raises(CursorBeyondEnd):
            await replay(repo, after_line=99)
        with pytest.raises(ResumeTokenInvalid):
            await replay(repo, resume_token="x")  # noqa: S106  # a place in a log, no secret

    assert open_files() == before


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("place", ["the start", "a line", "a token"])
async def test_a_place_in_a_small_log_is_found_at_once(repo: Repo, loop: LoopFiles, place: str) -> None:
    """By no other thread: the way there would take longer, and the peer would be told first that it has to wait."""
    loop.append(numbered(30))
    batches = await replay(repo, max_events=20)
    places: dict[str, dict[str, Any]] = {
        "the start": {},
        "a line": {"after_line": 20},
        "a token": {"resume_token": batches[-1].resume_token},
    }
    waits = 0

    async def before_waiting() -> None:
        nonlocal waits
        waits += 1

    query = EventQuery(loop_id=LOOP, follow=True, **places[place])
    async with contextlib.aclosing(repo.stream_events(query, before_waiting=before_waiting)) as stream:
        batch = await anext(stream)

    assert lines_of([batch])[-1] == 30
    assert not waits


async def resume_at_end(repo: Repo, loop: LoopFiles, place: str) -> EventQuery:
    """Has the log hold 30 events, and asks for what comes after them."""
    loop.append(numbered(30))
    await come_to_rest(repo)
    by = {"a line": {"after_line": 30}, "a token": {"resume_token": repo.read_loop(LOOP).resume_token}}
    return EventQuery(loop_id=LOOP, follow=True, heartbeat_interval=60.0, **by[place])  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["a line", "a token"])
async def test_the_end_of_a_log_that_has_not_changed_is_found_without_opening_it(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    query = await resume_at_end(repo, loop, place)
    opened = 0
    open_file = ArtifactFiles.open

    def counting(files: ArtifactFiles, path: str) -> int | None:
        nonlocal opened
        opened += 1
        return open_file(files, path)

    monkeypatch.setattr(ArtifactFiles, "open", counting)
    async with Follower(repo.stream_events(query)) as follower:
        first = await follower.next()
        assert not opened

        loop.append(numbered(2, first=31))
        assert await follower.until_lines(2) == [31, 32]

    assert (first.events, first.skipped, first.caught_up) == ([], [], True)
    assert first.cursor == {"eventLineOffset": 30, "eventLineCount": 30}
    assert lines_of(await replay(repo, resume_token=first.resume_token)) == [31, 32]


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("place", ["a line", "a token"])
async def test_what_has_come_since_the_end_of_a_log_was_known_is_in_the_first_batch(
    repo: Repo, loop: LoopFiles, place: str
) -> None:
    query = await resume_at_end(repo, loop, place)
    loop.append(numbered(2, first=31))

    async with Follower(repo.stream_events(query)) as follower:
        assert lines_of([await follower.next()]) == [31, 32]


@pytest.mark.parametrize(
    ("raw", "in_vain"),
    [(True, (json_text, "objects_in")), (False, (record_reader, "usual_lines"))],
    ids=["raw", "whole"],
)
async def test_a_usual_line_is_only_parsed_for_what_is_sent(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, *, raw: bool, in_vain: tuple[Any, str]
) -> None:
    loop.append(numbered(300))

    def parsed(_: object) -> None:
        pytest.fail("parsed for nothing")

    monkeypatch.setattr(*in_vain, parsed)

    batches = [batch async for batch in repo.stream_events(EventQuery(loop_id=LOOP), raw=raw)]

    assert sum(batch.event_count for batch in batches) == 300


async def test_the_end_of_a_log_is_not_known_in_the_midst_of_a_chunk(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 10 * MAX_BATCH_EVENTS
    loop.append(*(line(event(n=number, text="")) for number in range(1, lines + 1)))
    await asyncio.sleep(0.1)  # by then its times tell of any change
    log = repo._log(LOOP)  # noqa: SLF001  # no stream stops where it is wanted
    builder = EventBuilder(
        source={"repoPath": str(loop.repo), "loopId": LOOP}, trace_id=None, emitted_at=MOMENT, line_count=0
    )
    log.keep_newest(builder)  # as a tail has it: pieces end where batches do
    look = log.newest_steps()
    while goes_on(look):
        pass
    asked: set[Pace] = set()

    def over_when_asked_again(pace: Pace) -> bool:
        was_asked = pace in asked
        asked.add(pace)
        return was_asked

    monkeypatch.setattr(Pace, "over", over_when_asked_again)
    whole_look = log.look_steps()
    while log._index.end < loop.log.stat().st_size:  # noqa: SLF001  # nor there
        assert goes_on(whole_look)
    monkeypatch.undo()
    passed = log.lines_read
    assert 0 < passed < lines

    found = lines_of(await replay(repo, after_line=passed))

    assert found == list(range(passed + 1, lines + 1))
    log.keep_newest(None)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda loop: loop.rewrite(numbered(29) + numbered(1, first=99)), HistoryRewritten),
        (lambda loop: loop.replace(numbered(30, first=31)), LogReplaced),
        (lambda loop: loop.truncate(len(numbered(29))), LogTruncated),
        (lambda loop: loop.log.unlink(), EventsNotFound),
        (lambda loop: shutil.rmtree(loop.folder), LoopNotFound),
    ],
    ids=["rewritten", "replaced", "truncated", "removed", "all removed"],
)
async def test_a_log_that_has_changed_since_its_end_was_known_is_told_at_once(
    repo: Repo, loop: LoopFiles, change: Callable[[LoopFiles], None], lost: type[OpsError]
) -> None:
    query = await resume_at_end(repo, loop, "a token")
    change(loop)

    async with Follower(repo.stream_events(query)) as follower:
        with pytest.raises(lost):
            await follower.next()


@pytest.mark.parametrize("line_before", [2, 8], ids=["before it", "in it"])
async def test_a_stream_that_begins_at_an_object_that_is_not_closed_yet_brings_it_once_it_is(
    repo: Repo, loop: LoopFiles, line_before: int
) -> None:
    whole = lines(event("usage_check"))
    loop.append(numbered(2), whole[:-2])
    await come_to_rest(repo)

    async with subscribe(repo, follow=True, after_line=line_before) as follower:
        first = await follower.next()
        assert first.caught_up
        assert first.cursor == {"eventLineOffset": line_before, "eventLineCount": 8}
        loop.append(whole[-2:])
        assert await follower.until_lines(1) == [9]


async def test_appended_lines_arrive_without_inotify_too(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderWatch, "add", lambda *_: None)
    monkeypatch.setattr(tail, "POLL", 6.0)

    async with subscribe(repo, follow=True) as follower:
        await follower.next()
        for count in range(1, 4):
            loop.append(numbered(1))
            async with asyncio.timeout(4):  # ten times as often as where there is inotify
                assert await follower.until_lines(count) == list(range(1, count + 1))


async def test_appended_lines_arrive_faster_than_the_slow_poll_where_there_is_inotify(
    repo: Repo, loop: LoopFiles
) -> None:
    async with subscribe(repo, follow=True) as follower:
        await follower.next()
        began = time.monotonic()
        for count in range(1, 11):
            loop.append(numbered(1))
            await follower.until_lines(count)

    assert time.monotonic() - began < 5  # ten slow polls take ten seconds


async def test_a_long_stretch_without_events_does_not_hold_up_other_streams(repo: Repo, loop: LoopFiles) -> None:
    loop.append(b"\n" * (2 * 1024 * 1024), numbered(1))
    repo.read_loop(LOOP)
    longest = 0.0

    async def watch() -> None:
        """What this process does in between counts, and not what others do, or nobody."""
        nonlocal longest
        while True:
            before = time.process_time()
            await asyncio.sleep(0.001)
            longest = max(longest, time.process_time() - before)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    batches = await replay(repo)
    await asyncio.sleep(0.01)
    watching.cancel()

    assert lines_of(batches) == [2 * 1024 * 1024 + 1]
    assert longest < 0.7


async def test_a_stream_is_heard_of_while_it_passes_a_long_stretch_without_events(repo: Repo, loop: LoopFiles) -> None:
    large = b'{"timestamp":"t","event":"x","data":{"a":[\n' + b"1,\n" * 300_000 + b"1]}}\n"
    loop.append(large)
    repo.read_loop(LOOP)

    async with subscribe(repo, follow=True, heartbeat_interval=0.1) as follower:
        await follower.until_lines(1)

    # It takes about a second; who hears nothing for three intervals gives up.
    on_the_way = [batch for batch in follower.seen[1:] if not batch.events]
    assert on_the_way
    assert not on_the_way[0].caught_up


def enlarge(loop: LoopFiles) -> None:
    """Has the log end with a line of many gibibytes that has no end, most of it a hole."""
    os.truncate(loop.log, 64 * 1024**3)


@pytest.mark.parametrize("by_token", [False, True])
async def test_a_stream_is_heard_of_while_a_huge_log_is_read_for_the_first_time(
    loop: LoopFiles, tmp_path: Path, *, by_token: bool
) -> None:
    loop.append(numbered(3))
    members: dict[str, Any] = {}
    if by_token:
        before = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
        members = {"resume_token": before.read_loop(LOOP).resume_token}
        before.close()
    enlarge(loop)
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)

    async with subscribe(repo, follow=True, heartbeat_interval=0.1, **members) as follower:
        beats = [await follower.next() for _ in range(3)]

    for beat in beats:
        assert (beat.events, beat.caught_up) == ([], False)
        assert beat.cursor == {"eventLineOffset": 3 * by_token, "eventLineCount": 3}
    loop.truncate(len(numbered(3)))
    assert lines_of(await replay(repo, resume_token=beats[0].resume_token)) == ([] if by_token else [1, 2, 3])
    repo.close()


async def test_a_huge_log_of_one_loop_holds_up_no_stream_of_another(repo: Repo, loop: LoopFiles) -> None:
    huge = loop.folder.parent / "huge"
    huge.mkdir()
    (huge / "events.jsonl").touch()
    os.truncate(huge / "events.jsonl", 64 * 1024**3)
    loop.append(numbered(1000))
    readers = [asyncio.create_task(replay(repo, loop_id="huge")) for _ in range(8)]
    await asyncio.sleep(0)

    began = time.monotonic()
    assert len(lines_of(await replay(repo))) == 1000
    took = time.monotonic() - began

    assert took < 5
    assert not any(reader.done() for reader in readers)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)


async def test_streams_of_a_huge_log_end_when_asked_to_and_give_back_what_they_held(
    repo: Repo, loop: LoopFiles
) -> None:
    loop.append(numbered(3))
    enlarge(loop)
    before = open_files()
    follower = subscribe(repo, follow=True)
    ending = asyncio.create_task(follower.to_end())
    await asyncio.sleep(0)

    repo.end_streams()

    assert await asyncio.wait_for(ending, 5) == []
    assert open_files() <= before + 2  # what the watch of folders keeps


async def test_a_follower_is_told_of_what_comes_while_the_log_was_just_being_made_anew(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone for a moment is not gone: what is there next decides."""
    monkeypatch.setattr(stream_module, "_LOSSES", 10_000)  # else the machine must not stand still for a moment
    loop.append(numbered(5))
    async with subscribe(repo, follow=True) as follower:
        await follower.until_lines(5)
        loop.log.unlink()
        waiting = asyncio.create_task(follower.next())
        await asyncio.sleep(0.05)  # it looks meanwhile
        loop.log.write_bytes(numbered(7))

        await waiting
        assert await follower.until_lines(7) == list(range(1, 8))


async def test_a_stream_that_is_cancelled_while_it_reads_closes_nothing_under_the_thread_that_reads(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(numbered(3000, width=100))
    repo.read_loop(LOOP)
    reading, closed = threading.Event(), threading.Event()
    take, close = LogReader.take, LogReader.close

    def slow_take(reader: LogReader, end: int, pace: Pace, most: tuple[int, int]) -> Run | Record | None:
        reading.set()
        assert not closed.wait(0.05)
        return take(reader, end, pace, most)

    def noted_close(reader: LogReader) -> None:
        closed.set()
        close(reader)

    monkeypatch.setattr(LogReader, "take", slow_take)
    monkeypatch.setattr(LogReader, "close", noted_close)
    stream = asyncio.create_task(replay(repo))
    await asyncio.to_thread(reading.wait)

    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream

    assert closed.is_set()


# A log that changes under a follower.


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda loop: loop.truncate(0), LogTruncated),
        (lambda loop: loop.truncate(len(numbered(3))), LogTruncated),
        (lambda loop: loop.replace(numbered(9, first=2)), LogReplaced),
        (lambda loop: loop.replace(numbered(2, first=2)), LogReplaced),
        (lambda loop: loop.replace(numbered(4) + numbered(5, first=8)), HistoryRewritten),
        (lambda loop: loop.rewrite(numbered(9, first=2)), LogReplaced),
        (lambda loop: loop.rewrite(numbered(5, first=2)), LogReplaced),
        (lambda loop: loop.rewrite(numbered(4) + numbered(5, first=8)), HistoryRewritten),
        (lambda loop: loop.rewrite(numbered(9, first=2, width=3)), LogReplaced),
        (lambda loop: loop.log.unlink(), EventsNotFound),
        (lambda loop: shutil.rmtree(loop.folder), LoopNotFound),
    ],
    ids=[
        "truncated to nothing",
        "truncated at a line's end",
        "replaced by a longer one",
        "replaced by a shorter one",
        "replaced by one that begins alike",
        "rewritten in place, longer",
        "rewritten in place, as long",
        "rewritten in place, beginning alike",
        "rewritten in place with other lengths",
        "removed",
        "removed with its folder",
    ],
)
async def test_a_follower_is_told_when_the_log_is_no_longer_the_one_it_has_read(
    repo: Repo, loop: LoopFiles, change: Callable[[LoopFiles], None], lost: type[OpsError]
) -> None:
    loop.append(numbered(5))
    async with subscribe(repo, follow=True, heartbeat_interval=1.0) as follower:
        await follower.until_lines(5)

        change(loop)

        with pytest.raises(lost):
            await follower.next()


async def test_the_same_content_in_another_file_is_followed_without_loss(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(5), b'{"torn')
    async with subscribe(repo, follow=True) as follower:
        await follower.until_lines(5)
        loop.replace(numbered(7))
        await follower.until_lines(7)
        loop.replace(loop.log.read_bytes())
        loop.append(numbered(1, first=8))

        assert await follower.until_lines(8) == list(range(1, 9))


async def test_a_torn_line_that_is_taken_back_is_no_change_of_what_was_read(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(2), b'{"torn')
    async with subscribe(repo, follow=True, heartbeat_interval=0.1) as follower:
        await follower.until_lines(2)
        loop.truncate(len(numbered(2)))
        await follower.next()
        loop.append(numbered(1, first=3))

        assert await follower.until_lines(3) == [1, 2, 3]


async def test_a_follower_of_an_empty_log_takes_whatever_comes(repo: Repo, loop: LoopFiles) -> None:
    async with subscribe(repo, follow=True) as follower:
        await follower.next()
        loop.replace(numbered(2))

        assert await follower.until_lines(2) == [1, 2]


# Ends.


async def test_streams_end_when_asked_to_each_with_where_to_resume(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(3))
    async with subscribe(repo, follow=True) as quiet, subscribe(repo, follow=True, after_line=3) as empty:
        await quiet.until_lines(3)
        await empty.next()

        repo.end_streams()

        for follower in (quiet, empty):
            last = (await follower.to_end())[-1]
            assert last.events == []
            assert last.cursor == {"eventLineOffset": 3, "eventLineCount": 3}
            assert lines_of(await replay(repo, resume_token=last.resume_token)) == []


async def test_a_stream_that_is_to_end_as_it_begins_gives_its_first_batch_and_where_to_resume(
    repo: Repo, loop: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent may begin to drain while the log is opened."""
    monkeypatch.setattr(Pace, "over", lambda _: False)  # as on a machine that does not stand still meanwhile
    loop.append(numbered(MAX_BATCH_EVENTS + 1))
    repo.end_streams()

    batches = await replay(repo, follow=True)

    assert lines_of(batches) == list(range(1, MAX_BATCH_EVENTS + 1))
    with contextlib.closing(Repo(loop.repo, state_folder=tmp_path / "other", runtime=None)) as later:
        assert lines_of(await replay(later, resume_token=batches[-1].resume_token)) == [MAX_BATCH_EVENTS + 1]


async def test_streams_end_when_asked_to_without_inotify_too(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderWatch, "add", lambda *_: None)
    async with subscribe(repo, follow=True) as follower:
        await follower.next()

        repo.end_streams()

        assert len(await follower.to_end()) == 2


async def test_a_stream_whose_reader_waits_holds_texts_and_nothing_parsed(repo: Repo, loop: LoopFiles) -> None:
    """Parsed, these lines are thirty times as large."""
    loop.append(line(event(x=[[]] * 60)) * 1000)
    repo.read_loop(LOOP)
    tracemalloc.start()
    try:
        streams = [repo.stream_events(EventQuery(loop_id=LOOP), raw=True) for _ in range(10)]
        for stream in streams:
            await anext(stream)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for stream in streams:
        await stream.aclose()

    assert held < 10 * 4 * MAX_BATCH_BYTES


async def test_a_stream_ends_at_its_age(loop: LoopFiles, tmp_path: Path) -> None:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None, max_stream_age=0.3)
    loop.append(numbered(3))
    async with subscribe(repo, follow=True) as follower:
        batches = await follower.to_end()

    assert lines_of(batches) == [1, 2, 3]
    assert (batches[-1].events, batches[-1].cursor["eventLineOffset"]) == ([], 3)
    repo.close()


def test_a_repo_can_be_closed_when_the_event_loop_of_its_streams_has_ended(loop: LoopFiles, tmp_path: Path) -> None:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)

    async def close() -> None:
        repo.close()

    asyncio.run(replay(repo))
    try:
        repo.close()
    finally:
        asyncio.run(close())
