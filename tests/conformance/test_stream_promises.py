"""The promises of StreamEvents by name, over both transports, while somebody writes the log in fragments."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import tracemalloc
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from sprite_agent.contract.streaming import EventQuery
from sprite_agent.event_log.log import EventLog
from sprite_agent.event_log.newest import MAX_BATCH_BYTES, MAX_BATCH_EVENTS
from sprite_agent.event_log.reader import LogReader
from support.following import Follower
from support.repos import LOOP, event, line, lines
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsmgr.transport.base import Transport
    from sprite_agent.contract.streaming import EventBatch
    from sprite_agent.event_log.index import LogView
    from sprite_agent.event_log.pieces import Pace, Steps
    from sprite_agent.event_log.records import Record, Run
    from support.repos import LoopFiles

RECORDS = 900
"""More than four batches."""
SEEDS = pytest.mark.parametrize("seed", [1, 2])


class Log(NamedTuple):
    """The content of a log, and what a stream over it must bring."""

    content: bytes
    events: list[int]
    """Lines of the events."""
    malformed: list[int]
    """Lines of the records that are none."""


def made_log(seed: int, *, malformed: bool = False) -> Log:
    """A log as real ones are: most events on one line, some over several, blank lines, and on request bad ones."""
    chance = random.Random(seed)  # noqa: S311  # the same log each time
    parts: list[bytes] = []
    events, bad, at = [], [], 0
    for number in range(RECORDS):
        kind = chance.random()
        if kind < 0.05:
            parts.append(chance.choice([b"\n", b"  \n", b"\n\n"]))
            at += parts[-1].count(b"\n")
        elif kind < 0.1 and malformed:
            parts.append(chance.choice([b"not json\n", b'{"timestamp":"t"}\n', b"[1]\n", b"\xff\n"]))
            at += 1
            bad.append(at)
        else:
            write = lines if kind > 0.95 else line
            parts.append(write(event(data={"n": number, "text": "\u00e9" * chance.randrange(200)})))
            at += parts[-1].count(b"\n")
            events.append(at)
    return Log(b"".join(parts), events, bad)


class Writer(threading.Thread):
    """Appends to the log in fragments of random size, as fast as it can."""

    def __init__(self, repo: LoopFiles, content: bytes, seed: int) -> None:
        super().__init__(daemon=True)
        self._repo = repo
        self._content = content
        self._chance = random.Random(seed)  # noqa: S311  # the same fragments each time

    def run(self) -> None:
        """Writes everything."""
        with self._repo.log.open("ab", buffering=0) as log:
            at = 0
            while at < len(self._content):
                size = self._chance.choice([1, 7, 60, 700, 9000])
                log.write(self._content[at : at + size])
                at += size


@pytest.fixture(params=[1, 2])
def log(request: pytest.FixtureRequest) -> Log:
    return made_log(request.param)


@pytest.fixture
def writing(repo: LoopFiles, log: Log) -> Iterator[Writer]:
    """A writer that has begun with half the log, and writes the rest meanwhile."""
    middle = len(log.content) // 2
    repo.append(log.content[:middle])
    writer = Writer(repo, log.content[middle:], seed=len(log.content))
    writer.start()
    yield writer
    writer.join(DEADLINE)


def follower(transport: Transport, **members: Any) -> Follower:
    """A subscription that goes on at the end of the log."""
    return Follower(transport.events(EventQuery(**{"loop_id": LOOP, "follow": True, **members})))


def numbers(batches: list[EventBatch]) -> list[int]:
    """The line numbers of the events in batches."""
    return [found["cursor"]["eventLineOffset"] for batch in batches for found in batch.events]


def skipped(batches: list[EventBatch]) -> list[int]:
    """The lines of the malformed records in batches."""
    return [record.first_line for batch in batches for record in batch.skipped]


async def test_ordered_and_unique(transport: Transport, log: Log, writing: Writer) -> None:
    async with follower(transport, max_events=len(log.events)) as following:
        await following.to_end()

    assert all(one < other for one, other in zip(following.lines, following.lines[1:], strict=False))
    offsets = [batch.cursor["eventLineOffset"] for batch in following.seen]
    assert offsets == sorted(offsets)


async def test_complete(transport: Transport, log: Log, writing: Writer) -> None:
    async with follower(transport, max_events=len(log.events)) as following:
        await following.to_end()

    assert following.lines == log.events


@SEEDS
async def test_complete_also_past_malformed_records(transport: Transport, repo: LoopFiles, seed: int) -> None:
    log = made_log(seed, malformed=True)
    writer = Writer(repo, log.content, seed)
    writer.start()

    async with follower(transport, skip_malformed=True) as following:
        while len(following.lines) < len(log.events) or len(skipped(following.seen)) < len(log.malformed):
            await following.next()
        assert (following.lines, skipped(following.seen)) == (log.events, log.malformed)
    writer.join(DEADLINE)


async def test_complete_from_the_middle(transport: Transport, log: Log, writing: Writer) -> None:
    at = log.events[200]

    async with follower(transport, after_line=at, max_events=len(log.events) - 201) as following:
        await following.to_end()

    assert following.lines == log.events[201:]


async def test_resumable_after_every_batch_while_the_log_grows(transport: Transport, log: Log, writing: Writer) -> None:
    seen: list[int] = []
    members: dict[str, Any] = {}
    while len(seen) < len(log.events):
        async with follower(transport, **members) as following:
            batch = await following.next()
        seen += numbers([batch])
        members = {"resume_token": batch.resume_token}

    assert seen == log.events


async def test_resumable_after_every_line(transport: Transport, log: Log, writing: Writer) -> None:
    seen: list[int] = []
    after = 0
    while len(seen) < len(log.events):
        async with follower(transport, after_line=after, max_events=97) as following:
            batch = await following.next()
        seen += numbers([batch])
        after = batch.cursor["eventLineOffset"]

    assert seen == log.events


@SEEDS
async def test_resumable_past_malformed_records(transport: Transport, repo: LoopFiles, seed: int) -> None:
    log = made_log(seed, malformed=True)
    writer = Writer(repo, log.content, seed)
    writer.start()
    batches: list[EventBatch] = []
    members: dict[str, Any] = {}
    while len(numbers(batches)) < len(log.events) or len(skipped(batches)) < len(log.malformed):
        async with follower(transport, skip_malformed=True, **members) as following:
            batches.append(await following.next())
        members = {"resume_token": batches[-1].resume_token}

    assert (numbers(batches), skipped(batches)) == (log.events, log.malformed)
    writer.join(DEADLINE)


async def test_bookmarkable(transport: Transport, repo: LoopFiles, log: Log) -> None:
    """A batch's cursor and token cover what was sent up to it: no less, and no more."""
    repo.append(log.content)
    async with follower(transport, follow=False) as following:
        batches = await following.to_end()

    assert len(batches) > 4
    for count, batch in enumerate(batches, start=1):
        sent = numbers(batches[:count])
        assert batch.cursor["eventLineOffset"] == sent[-1]
        async with follower(transport, follow=False, resume_token=batch.resume_token) as resumed:
            await resumed.to_end()
        assert sent + resumed.lines == log.events


async def test_bookmarkable_where_nothing_was_sent(transport: Transport, repo: LoopFiles) -> None:
    """What comes after an empty first response is not covered by its token."""
    repo.append(b"\n", line(event(n=1))[:10])
    async with follower(transport) as following:
        first = await following.next()
    repo.append(line(event(n=1))[10:])

    async with follower(transport, follow=False, resume_token=first.resume_token) as resumed:
        await resumed.to_end()

    assert (first.events, first.cursor["eventLineOffset"], resumed.lines) == ([], 0, [2])


async def test_bounded_batches(transport: Transport, repo: LoopFiles, log: Log, writing: Writer) -> None:
    writing.join(DEADLINE)
    small = 5 * MAX_BATCH_EVENTS  # of the others the bytes are too many before their number is
    repo.append(line(event()) * small)
    async with follower(transport, max_events=len(log.events) + small) as following:
        await following.to_end()

    for batch in following.seen:
        size = sum(len(found["event"]["raw"].text.encode()) for found in batch.events[:-1])  # type: ignore[attr-defined, misc]  # an OpenObject
        assert len(batch.events) <= MAX_BATCH_EVENTS
        assert size < MAX_BATCH_BYTES


async def test_bounded_for_a_slow_reader(
    transport: Transport, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does not read is not read for: the stream stops a few megabytes ahead of its reader."""
    repo.append(line(event(text="x" * 10_000)) * 4000)
    read = 0
    whole = LogReader.take

    def counting(reader: LogReader, end: int, pace: Pace, most: tuple[int, int]) -> Run | Record | None:
        nonlocal read
        found = whole(reader, end, pace, most)
        read += len(found.text) if found else 0
        return found

    monkeypatch.setattr(LogReader, "take", counting)
    async with follower(transport, heartbeat_interval=60.0) as following:
        first = await following.next()
        before, since = -1, time.monotonic()
        while read != before or time.monotonic() - since < 0.2:
            if read != before:
                before, since = read, time.monotonic()
            await asyncio.sleep(0.02)
        ahead = read

    assert len(first.events) > 0
    assert ahead < 8_000_000


async def test_bounded_however_long_the_log_is(transport: Transport, repo: LoopFiles) -> None:
    text = line(event(text="x" * 2000))

    async def peak(size: int) -> int:
        repo.rewrite(text * (size // len(text)))
        async for _ in transport.events(EventQuery(loop_id=LOOP, max_events=1)):
            pass  # the index is read before memory is looked at
        tracemalloc.start()
        try:
            async for _ in transport.events(EventQuery(loop_id=LOOP)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = await peak(2_000_000), await peak(12_000_000)

    assert large < small + 1_000_000


async def test_caught_up(transport: Transport, log: Log, writing: Writer) -> None:
    """It is said when everything was sent, also where blank lines leave the cursor below the end, and not before."""
    writing.join(DEADLINE)
    async with follower(transport, follow=False) as following:
        batches = await following.to_end()

    assert [batch.caught_up for batch in batches] == [False] * (len(batches) - 1) + [True]


@pytest.mark.parametrize("tail", [b"\n\n", b'{"torn', b"{\n", b"not json\n"], ids=["blank", "torn", "open", "bad"])
async def test_caught_up_whatever_is_at_the_end(transport: Transport, repo: LoopFiles, tail: bytes) -> None:
    repo.append(line(event()), tail)

    async with follower(transport, follow=False, skip_malformed=True) as following:
        batches = await following.to_end()

    assert batches[-1].caught_up
    assert batches[-1].cursor["eventLineOffset"] == 1


@pytest.mark.parametrize("follow", [True, False])
async def test_first_response_at_once(transport: Transport, repo: LoopFiles, *, follow: bool) -> None:
    """It comes although there is nothing to say, and long before the first heartbeat."""
    async with follower(transport, follow=follow, heartbeat_interval=60.0) as following:
        started = time.monotonic()
        first = await following.next()

    assert time.monotonic() - started < 5
    assert (first.events, first.caught_up) == ([], True)
    assert first.cursor == {"eventLineOffset": 0, "eventLineCount": 0}


async def test_heartbeats(transport: Transport, repo: LoopFiles) -> None:
    """A quiet stream beats, each time with where it stands, and its tokens are good."""
    repo.append(line(event(n=1)))
    async with follower(transport, heartbeat_interval=0.1) as following:
        first = await following.next()
        started = time.monotonic()
        beats = [await following.next() for _ in range(5)]
        took = time.monotonic() - started
        repo.append(line(event(n=2)))
        assert await following.until_lines(2) == [1, 2]

    assert 0.4 < took < 5
    for beat in beats:
        assert (beat.events, beat.skipped, beat.caught_up) == ([], [], True)
        assert (beat.cursor, beat.resume_token) == (first.cursor, first.resume_token)


@pytest.mark.parametrize("grows_by", [b"\n", b'"a":1,\n'], ids=["blank lines", "an object that stays open"])
async def test_heartbeats_though_the_log_grows_by_what_is_no_event(
    transport: Transport, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch, grows_by: bytes
) -> None:
    repo.append(line(event(n=1)), b"" if grows_by == b"\n" else b"{\n")
    whole = EventLog.look_steps

    def growing(log: EventLog) -> Steps[LogView]:
        repo.append(grows_by)
        return whole(log)

    async with follower(transport, heartbeat_interval=0.1) as following:
        await following.next()
        monkeypatch.setattr(EventLog, "look_steps", growing)
        beat = await asyncio.wait_for(following.next(), 3)
        monkeypatch.undo()

    assert beat.events == []
