"""What comes into a log is read, judged and checked once for all who follow it, and each still gets all of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.contract.events import EventBuilder
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import EventMalformed, EventsNotFound, PositionLost
from sprite_agent.event_log import newest, window
from sprite_agent.event_log import tail as tail_module
from sprite_agent.event_log.folder_watch import FolderWatch
from sprite_agent.event_log.log import EventLog
from sprite_agent.event_log.newest import MAX_BATCH_BYTES, MAX_BATCH_EVENTS, Newest
from sprite_agent.repo import Repo
from support.following import Follower, come_to_rest, lines_of
from support.repos import LOOP, LoopFiles, event, line
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    return LoopFiles(tmp_path / "repo")


@pytest.fixture
async def repo(loop: LoopFiles, tmp_path: Path) -> AsyncIterator[Repo]:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
    yield repo
    repo.close()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the tail has checked each line."""
    counted: Counter[int] = Counter()
    check = EventBuilder.check

    def counting(builder: EventBuilder, values: Sequence[dict[str, Any]], line: int) -> None:
        counted.update(range(line, line + len(values)))
        check(builder, values, line)

    monkeypatch.setattr(EventBuilder, "check", counting)
    return counted


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each look at the log, and whose it is."""
    noted: list[str] = []
    for name in ("look_steps", "newest_steps", "after_token_steps"):
        monkeypatch.setattr(EventLog, name, _noting(noted, name))
    return noted


def _noting(noted: list[str], name: str) -> Any:
    steps = getattr(EventLog, name)

    def noting(log: EventLog, *words: Any) -> Any:
        noted.append(name)
        return steps(log, *words)

    return noting


def numbered(first: int, last: int, *, width: int = 0) -> bytes:
    """Lines with events, from one number to another."""
    return b"".join(line(event(n=number, text="x" * width)) for number in range(first, last + 1))


def append_each(loop: LoopFiles, numbers: range) -> None:
    """Appends the lines one by one."""
    for number in numbers:
        loop.append(numbered(number, number))


def follow(repo: Repo, **query: Any) -> Follower:
    return Follower(repo.stream_events(EventQuery(**{"loop_id": LOOP, "follow": True, **query})))


def waiting(repo: Repo) -> int:
    """How many wait for what the tails bring."""
    return sum(len(each._waiting) for each in repo._tails._tails.values())  # noqa: SLF001  # nothing else tells


def open_logs() -> int:
    """How many descriptors of the log this process has open."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found += "events.jsonl" in str(descriptor.readlink())
    return found


@contextlib.asynccontextmanager
async def following(repo: Repo, loop: LoopFiles, count: int, **query: Any) -> AsyncIterator[list[Follower]]:
    """So many followers, who have all been given line 1 from the file and line 2 from the tail."""
    loop.append(numbered(1, 1))
    async with contextlib.AsyncExitStack() as stack:
        followers = [await stack.enter_async_context(follow(repo, **query)) for _ in range(count)]
        await asyncio.gather(*(follower.until_lines(1) for follower in followers))
        asking = [asyncio.ensure_future(follower.until_lines(2)) for follower in followers]
        await eventually(lambda: waiting(repo) == count, "all wait for what comes")
        loop.append(numbered(2, 2))
        await asyncio.gather(*asking)
        yield followers


async def test_every_line_is_checked_once_however_many_follow(
    repo: Repo, loop: LoopFiles, checks: Counter[int]
) -> None:
    async with following(repo, loop, 20) as followers:
        loop.append(numbered(3, 40))

        for follower in followers:
            assert await follower.until_lines(40) == list(range(1, 41))

    assert {checks[number] for number in range(3, 41)} == {1}


async def test_followers_who_wait_look_at_nothing_and_hold_one_descriptor_between_them(
    repo: Repo, loop: LoopFiles, looks: list[str]
) -> None:
    async with following(repo, loop, 20, heartbeat_interval=0.1) as followers:
        looks.clear()

        for _ in range(5):  # beats
            await asyncio.gather(*(follower.next() for follower in followers))

        assert set(looks) <= {"newest_steps", "look_steps"}
        assert len(looks) < 20  # the tail's own, while the log has just changed
        assert open_logs() == 1


@pytest.mark.parametrize("intervals", [(0.1, 0.4), (0.4, 0.1), (0.1, 60.0), (60.0, 0.1)])
async def test_each_follower_of_a_tail_has_a_beat_of_its_own(
    repo: Repo, loop: LoopFiles, intervals: tuple[float, float]
) -> None:
    """No sooner because somebody else's is quicker, and no later because it is slower."""
    wanted = {0.1: 10, 0.4: 3, 60.0: 0}
    loop.append(numbered(1, 1))
    over = asyncio.Event()

    async def beats(interval: float) -> tuple[float, int]:
        """How long it took to get those wanted, and how many there were when the quicker one had all of its own."""
        began = time.monotonic()
        async with follow(repo, heartbeat_interval=interval) as follower:
            await follower.until_lines(1)
            for _ in range(wanted[interval]):
                await follower.next()
            took = time.monotonic() - began
            if interval == min(intervals):
                over.set()
            waiting = asyncio.ensure_future(follower.next())
            await over.wait()
            waiting.cancel()
            await asyncio.wait([waiting])
            return took, len(follower.seen) - 1

    found = dict(zip(intervals, await asyncio.gather(*map(beats, intervals)), strict=True))

    assert all(took >= 0.9 * interval * wanted[interval] for interval, (took, _) in found.items())
    assert 60.0 not in found or found[60.0][1] == 0


async def test_a_tail_goes_on_from_what_its_first_follower_has_seen(
    repo: Repo, loop: LoopFiles, looks: list[str]
) -> None:
    loop.append(numbered(1, 3))
    await asyncio.sleep(0.1)  # a log that has just changed is looked at again in any case
    async with follow(repo) as follower:
        assert await follower.until_lines(3) == [1, 2, 3]
        asking = asyncio.ensure_future(follower.until_lines(4))
        await eventually(lambda: waiting(repo) == 1, "it waits for what comes")
        assert "newest_steps" not in looks

        loop.append(numbered(4, 4))

        assert await asking == [1, 2, 3, 4]
        assert "newest_steps" in looks


@pytest.mark.parametrize("begin", [0, 3], ids=["read", "at the end"])
@pytest.mark.parametrize("change", ["appended", "rewritten", "replaced", "truncated"])
async def test_what_changes_before_there_is_a_tail_is_found_all_the_same(
    repo: Repo, loop: LoopFiles, change: str, begin: int
) -> None:
    loop.append(numbered(1, 3))
    await come_to_rest(repo)
    async with follow(repo, after_line=begin) as follower:
        assert (await follower.next()).caught_up  # and not asked for more: it has no tail yet
        assert follower.lines == list(range(begin + 1, 4))
        assert waiting(repo) == 0

        if change == "appended":
            loop.append(numbered(4, 4))
            assert (await follower.until_lines(4 - begin))[-1] == 4
            return
        if change == "rewritten":
            loop.rewrite(numbered(5, 7))
        elif change == "replaced":
            loop.replace(numbered(5, 7))
        else:
            loop.truncate(len(numbered(1, 2)))
        with pytest.raises(PositionLost):
            await follower.until_lines(4)


async def test_all_who_are_at_the_same_place_are_given_the_same_batch(repo: Repo, loop: LoopFiles) -> None:
    loop.append(numbered(1, 1))
    query = EventQuery(loop_id=LOOP, follow=True)
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(contextlib.aclosing(repo.stream_events(query, raw=True))) for _ in range(3)
        ]
        for stream in streams:
            while not (await anext(stream)).caught_up:
                pass
        asking = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await eventually(lambda: waiting(repo) == 3, "all wait for what comes")
        loop.append(numbered(2, 2))

        batches = await asyncio.gather(*asking)

    assert [raw.line for raw in batches[0].raw_events] == [2]
    assert all(batch is batches[0] for batch in batches)


@pytest.mark.parametrize("raw", [True, False])
async def test_a_burst_comes_in_batches_of_bounded_size(repo: Repo, loop: LoopFiles, *, raw: bool) -> None:
    query = EventQuery(loop_id=LOOP, follow=True)
    sizes, seen, ends = [], 0, []
    small = 3 * MAX_BATCH_EVENTS
    lines = small + 300
    async with contextlib.aclosing(repo.stream_events(query, raw=raw)) as batches:
        await anext(batches)
        asking = asyncio.ensure_future(anext(batches))
        await eventually(lambda: waiting(repo) == 1, "it waits for what comes")
        loop.append(numbered(1, small), numbered(small + 1, lines, width=2000))
        batch = await asking
        while seen < lines:
            texts = [text for sent in batch.raw_events for text in sent.text.split("\n")]
            texts = texts or [found["event"]["raw"].text for found in batch.events]  # type: ignore[attr-defined]  # an OpenObject
            seen += len(texts)
            sizes.append((len(texts), sum(map(len, texts))))
            ends.append(batch.caught_up)
            if seen < lines:
                batch = await asyncio.wait_for(anext(batches), 10)

    assert seen == lines
    assert not any(ends[:-1])  # though a look takes only a part of it
    assert max(count for count, _ in sizes) <= MAX_BATCH_EVENTS
    assert max(size for _, size in sizes) <= MAX_BATCH_BYTES


@pytest.mark.parametrize("kept", [300, 3000])
async def test_a_reader_too_slow_for_the_window_misses_nothing(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(window, "_MAX_KEPT", kept)
    monkeypatch.setattr(newest, "_MAX_KEPT", 4 * kept)
    async with following(repo, loop, 2) as (quick, slow):
        for number in range(3, 60):
            loop.append(numbered(number, number, width=50))
            await quick.until_lines(number)

        assert quick.lines == list(range(1, 60))
        assert await slow.until_lines(59) == list(range(1, 60))


async def test_what_was_kept_for_a_while_is_let_go_and_a_slower_reader_misses_nothing(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "_MAX_AGE", 0.0)
    async with following(repo, loop, 2) as (quick, slow):
        (tail,) = repo._tails._tails.values()  # noqa: SLF001
        for number in range(3, 60):
            loop.append(numbered(number, number))
            await quick.until_lines(number)
            assert len(tail._window._portions) <= 2  # noqa: SLF001

        assert quick.lines == list(range(1, 60))
        assert await slow.until_lines(59) == list(range(1, 60))


async def test_more_at_once_than_is_kept_is_read_from_the_file(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newest, "_MAX_KEPT", 1000)
    async with following(repo, loop, 3) as followers:
        loop.append(numbered(3, 1002, width=100))

        for follower in followers:
            assert await follower.until_lines(1002) == list(range(1, 1003))


async def test_what_others_see_of_the_log_while_no_follower_takes_is_not_kept_for_ever(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newest, "MAX_PORTIONS", 10)
    async with following(repo, loop, 1) as (follower,):
        index = repo._log(LOOP)._index  # noqa: SLF001
        assert index._newest is not None  # noqa: SLF001
        for _ in range(50):
            loop.append(b"\n")
            repo.read_loop(LOOP)
            assert len(index._newest._portions) <= 10  # noqa: SLF001

        loop.append(numbered(3, 3))
        assert await follower.until_lines(3) == [1, 2, 53]


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which what comes is judged, by their names."""
    threads: list[str] = []
    add = Newest.add

    def noting(*words: Any) -> None:
        threads.append(threading.current_thread().name)
        add(*words)

    monkeypatch.setattr(Newest, "add", noting)
    return threads


async def test_a_burst_is_judged_without_another_thread(repo: Repo, loop: LoopFiles, judging: list[str]) -> None:
    burst = numbered(3, 2_500, width=200)
    assert 512 * 1024 < len(burst) < 1024 * 1024

    await follow_while(burst, repo, loop, judging)

    assert set(judging) == {threading.current_thread().name}


async def test_what_may_not_be_in_memory_is_judged_in_another_thread(
    repo: Repo, loop: LoopFiles, judging: list[str]
) -> None:
    burst = numbered(3, 6_000, width=200)
    assert len(burst) > 1024 * 1024

    await follow_while(burst, repo, loop, judging)

    assert judging[0].startswith("log")


async def follow_while(burst: bytes, repo: Repo, loop: LoopFiles, judging: list[str]) -> None:
    """Follows a log to which lines are appended all at once, until all have come; where they were judged is noted."""
    async with following(repo, loop, 1) as (follower,):
        asking = asyncio.ensure_future(follower.until_lines(2 + burst.count(b"\n")))
        await eventually(lambda: waiting(repo) == 1, "it waits for what comes")
        judging.clear()
        loop.append(burst)
        await asking


async def test_a_record_whose_last_bytes_come_by_themselves_is_judged_in_another_thread(
    repo: Repo, loop: LoopFiles, judging: list[str]
) -> None:
    async with following(repo, loop, 1) as (follower,):
        text = numbered(3, 3, width=300_000)
        index = repo._log(LOOP)._index  # noqa: SLF001
        asking = asyncio.ensure_future(follower.until_lines(3))
        loop.append(text[:-1])
        await eventually(lambda: index.end == loop.log.stat().st_size, "the torn line was read")
        judging.clear()
        loop.append(text[-1:])
        await asyncio.wait_for(asking, 10)

    assert judging
    assert [name for name in judging if not name.startswith("log")] == []


async def test_a_malformed_record_ends_those_who_do_not_skip_it_after_what_came_before(
    repo: Repo, loop: LoopFiles
) -> None:
    async with following(repo, loop, 2) as (strict, other), follow(repo, skip_malformed=True) as skipping:
        await skipping.until_lines(2)
        loop.append(numbered(3, 3), b"not json\n", numbered(5, 5))

        for follower in (strict, other):
            with pytest.raises(EventMalformed, match="line 4"):
                await follower.to_end()
            assert follower.lines == [1, 2, 3]
        assert await skipping.until_lines(4) == [1, 2, 3, 5]
        assert [record.first_line for batch in skipping.seen for record in batch.skipped] == [4]
        loop.append(numbered(6, 6))
        assert await skipping.until_lines(5) == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), EventsNotFound("gone"), ValueError("a bug")])
async def test_a_look_that_fails_is_made_good_by_the_followers_own(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    steps = EventLog.newest_steps
    failures = [error, error]

    def failing(log: EventLog, *words: Any) -> Any:
        if failures:
            raise failures.pop()
        return steps(log, *words)

    async with following(repo, loop, 2) as followers:
        monkeypatch.setattr(EventLog, "newest_steps", failing)
        for number in (3, 4, 5):
            loop.append(numbered(number, number))
            for follower in followers:
                assert await follower.until_lines(number) == list(range(1, number + 1))

    assert not failures


async def test_a_change_of_which_nobody_tells_is_found_by_the_poll(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system; of a log that is read again by now, so that nothing else looks."""
    monkeypatch.setattr(tail_module, "POLL", 0.1)
    monkeypatch.setattr(tail_module, "SETTLED_PAUSE", 0.1)
    monkeypatch.setattr(FolderWatch, "_wake", lambda watch: watch._inotify.read(timeout=0))  # noqa: SLF001  # and says nothing
    async with following(repo, loop, 2) as followers:
        (tail,) = repo._tails._tails.values()  # noqa: SLF001  # nothing public tells
        asking = [asyncio.ensure_future(follower.until_lines(3)) for follower in followers]
        await eventually(lambda: tail.view is not None and tail.view.is_sure, "the log is read again")
        loop.append(numbered(3, 3))

        assert await asyncio.gather(*asking) == [[1, 2, 3]] * 2


async def test_in_a_burst_the_system_is_not_asked_and_afterwards_the_next_line_comes_at_once(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a log that is read again by now, so that nothing else looks."""
    monkeypatch.setattr(tail_module, "POLL", 60.0)
    told = 0
    wake = FolderWatch._wake  # noqa: SLF001  # what the system's word leads to

    def counting(folders: FolderWatch) -> None:
        nonlocal told
        told += 1
        wake(folders)

    monkeypatch.setattr(FolderWatch, "_wake", counting)
    async with following(repo, loop, 1) as (follower,):
        (tail,) = repo._tails._tails.values()  # noqa: SLF001  # nothing public tells
        reading = asyncio.ensure_future(follower.until_lines(2000))
        await asyncio.to_thread(append_each, loop, range(3, 2001))
        assert await reading == list(range(1, 2001))
        assert told < 200

        reading = asyncio.ensure_future(follower.until_lines(2001))
        await eventually(lambda: not tail._changes.is_deaf, "it listens again")  # noqa: SLF001
        await asyncio.sleep(tail_module.SETTLED_PAUSE)
        tail.poll()
        assert tail.view is not None
        assert tail.view.is_sure
        loop.append(numbered(2001, 2001))
        assert (await asyncio.wait_for(reading, 5))[-1] == 2001


async def test_in_a_burst_a_large_log_is_read_again_a_tenth_as_often(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "UNSURE_PAUSE", 100.0)
    loop.append(numbered(1, 6_000, width=200))
    async with follow(repo, after_line=6_000) as follower:
        await follower.next()
        asking = asyncio.ensure_future(follower.next())
        await eventually(lambda: waiting(repo) == 1, "it waits for what comes")
        (tail,) = repo._tails._tails.values()  # noqa: SLF001  # how often it is depends on the machine, here and below
        assert tail.view is not None
        tail.view = tail.view._replace(is_sure=False)

        def is_due(ago: float, *, in_burst: bool) -> bool:
            tail._changes.is_deaf = in_burst  # noqa: SLF001
            tail._reread_at = time.monotonic() - ago  # noqa: SLF001
            return tail._is_to_be_reread()  # noqa: SLF001

        in_burst = [is_due(ago, in_burst=True) for ago in (50, 500, 1500)]
        else_due = [is_due(ago, in_burst=False) for ago in (50, 500, 1500)]
        loop.append(numbered(6_001, 6_001))
        await asking

    assert in_burst == [False, False, True]
    assert else_due == [False, True, True]


async def test_the_tail_ends_with_the_last_of_its_followers(repo: Repo, loop: LoopFiles) -> None:
    async with following(repo, loop, 2) as (first, last):
        await first.close()
        loop.append(numbered(3, 3))
        assert await last.until_lines(3) == [1, 2, 3]
        (timer,) = [each._timer for each in repo._tails._tails.values()]  # noqa: SLF001

    assert repo._tails._tails == {}  # noqa: SLF001
    assert timer is None or timer.cancelled() or timer.when() <= asyncio.get_running_loop().time()  # or it went off
    assert open_logs() == 0
    assert repo._folders._followers == {}  # noqa: SLF001


async def test_what_a_tail_has_kept_ends_with_it(repo: Repo, loop: LoopFiles) -> None:
    gc.disable()
    try:
        async with following(repo, loop, 1):
            (kept,) = [weakref.ref(each._window) for each in repo._tails._tails.values()]  # noqa: SLF001
            assert kept() is not None
        assert kept() is None
    finally:
        gc.enable()


async def test_somebody_elses_look_takes_nothing_from_the_followers(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot reads on in the same index; what it passes still comes to those who follow."""
    async with following(repo, loop, 3) as followers:
        for number in range(3, 30):
            loop.append(numbered(number, number))
            await asyncio.to_thread(repo.read_loop, LOOP)
        for follower in followers:
            assert await follower.until_lines(29) == list(range(1, 30))


async def test_what_a_closed_tail_still_does_takes_nothing_from_the_next_one(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(numbered(1, 1))
    held, go_on, over = threading.Event(), threading.Event(), threading.Event()
    piece_of = tail_module.Tail._piece_of  # noqa: SLF001  # what runs in the other thread

    def suspended(tail: tail_module.Tail, look: Any) -> Any:
        if threading.current_thread() is threading.main_thread() or held.is_set():
            return piece_of(tail, look)
        held.set()
        go_on.wait(10)
        try:
            return piece_of(tail, look)
        finally:
            over.set()

    monkeypatch.setattr(tail_module.Tail, "_piece_of", suspended)
    async with follow(repo) as first:
        await first.next()
        asking = asyncio.create_task(first.next())
        await asyncio.sleep(0.05)
        with repo._log(LOOP)._lock:  # noqa: SLF001  # as a snapshot has it: so the look is made by the other thread
            loop.append(numbered(2, 2))
            await eventually(held.is_set, "the other thread looks")
        asking.cancel()
        await asyncio.wait([asking])
    async with follow(repo) as second:
        await second.until_lines(2)
        asking = asyncio.create_task(second.next())
        await asyncio.sleep(0.05)
        loop.append(numbered(3, 3))
        go_on.set()
        over.wait(10)

        assert lines_of([await asking]) == [3]


@pytest.mark.parametrize("begin", [0, 3], ids=["read", "at the end"])
async def test_somebody_elses_look_takes_nothing_from_a_tail_that_has_not_looked_yet(
    repo: Repo, loop: LoopFiles, begin: int
) -> None:
    loop.append(numbered(1, 3))
    await come_to_rest(repo)
    async with follow(repo, after_line=begin) as follower:
        await follower.next()
        asking = asyncio.ensure_future(follower.until_lines(4 - begin))
        await eventually(lambda: waiting(repo) == 1, "it waits for what comes")

        loop.append(numbered(4, 4))
        repo.read_loop(LOOP)

        assert (await asking)[-1] == 4


async def test_the_token_of_every_batch_of_the_tail_resumes_to_the_exact_remainder(repo: Repo, loop: LoopFiles) -> None:
    async with following(repo, loop, 1) as (follower,):
        for number in range(3, 20):
            loop.append(numbered(number, number), b"\n" * (number % 3))
        await follower.until_lines(19)

    everything = follower.lines
    for batch in follower.seen:
        rest = Follower(repo.stream_events(EventQuery(loop_id=LOOP, resume_token=batch.resume_token)))
        await rest.to_end()
        assert rest.lines == [number for number in everything if number > batch.cursor["eventLineOffset"]]
