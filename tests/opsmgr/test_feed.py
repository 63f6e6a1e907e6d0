"""A pass that is fed by a subscription handles every event once, also when a pass fails or is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.errors import InputInvalid, NoAnswer
from opsmgr.passes import feed as feed_module
from opsmgr.passes import ingest
from opsmgr.passes.feed import MOST_RECORDS, Feed, fold
from opsmgr.passes.reconcile import ReconcileOptions, reconcile, reconcile_held, record_failure
from opsmgr.store import LoopStore, default_folder
from opsmgr.transport.local import LocalTransport
from sprite_agent.contract import clock
from sprite_agent.contract.streaming import EventBatch, EventQuery, SkippedRecord
from sprite_agent.errors import LogReplaced, OpsError
from support.repos import LOOP, LoopFiles, event, line, put
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from opsmgr.passes.feed import Portion
    from opsmgr.transport.base import Snapshot, Transport

Json = dict[str, Any]
OPTIONS = ReconcileOptions(loop_id=LOOP)


class _Meanwhile(LocalTransport):
    """The local transport, with something that happens right after the next snapshot was taken."""

    def __init__(self, repo: Path, *, state_folder: Path) -> None:
        super().__init__(repo, state_folder=state_folder)
        self.happens: Callable[[], object] | None = None
        self.taken = asyncio.Event()

    async def snapshot(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> Snapshot:
        found = await super().snapshot(loop_id, trace_id=trace_id, run_id=run_id)
        if self.happens is not None:
            happens, self.happens = self.happens, None
            if isinstance(waits := happens(), Awaitable):
                await waits
        self.taken.set()
        return found


class _Fed:
    """A manager of the one loop in a repo, with a feed of what a subscription brings."""

    def __init__(self, loop: LoopFiles, transport: _Meanwhile) -> None:
        self.store = LoopStore(default_folder(loop.repo, LOOP))
        self.transport = transport
        self.feed = Feed()

    async def passes(self, *, after_line: int | None = None) -> Json:
        """One pass, once the feed has everything up to a line."""
        if after_line is not None:
            assert await self.feed.reaches(after_line, within=DEADLINE)
        return await reconcile_held(self.transport, self.store, OPTIONS, feed=self.feed)

    async def read(self, token: str | None = None) -> str:
        """Puts into the feed what the log has by now, after a token; gives that of its end."""
        query = EventQuery(loop_id=LOOP, resume_token=token, skip_malformed=True)
        async for batch in self.transport.events(query):
            self.feed.put(batch)
            token = batch.resume_token
        assert token is not None
        return token

    @contextlib.asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """A subscription fills the feed meanwhile."""
        task = asyncio.create_task(_fill(self.feed, self.transport))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    @property
    def cursor(self) -> Json:
        return dict(json.loads(self.store.cursor.read_bytes()))

    @property
    def ingested(self) -> list[int]:
        return [entry["eventsIngested"] for entry in read_log(self.store.reconcile_telemetry)]

    @property
    def escalations(self) -> list[Json]:
        return read_log(self.store.escalations)

    @property
    def categories(self) -> list[str]:
        return [entry["category"] for entry in self.escalations]


async def _fill(feed: Feed, transport: Transport) -> None:
    query = EventQuery(loop_id=LOOP, follow=True, skip_malformed=True)
    while True:
        try:
            async for batch in transport.events(query):
                feed.put(batch)
        except OpsError as error:
            feed.start_over(error)


def read_log(path: Path) -> list[Json]:
    return [json.loads(entry) for entry in path.read_text().splitlines()] if path.exists() else []


def fresh(name: str = "usage_check") -> bytes:
    return line(event(name, timestamp=clock.now()))


def batch(first: int, last: int) -> EventBatch:
    """Events of these lines, as far as a feed looks at them."""
    cursor: Any = {"eventLineOffset": last, "eventLineCount": last}
    events: Any = [
        {"cursor": {"eventLineOffset": number}, "sequence": {"value": number}} for number in range(first, last + 1)
    ]
    return EventBatch(events=events, cursor=cursor, resume_token="", caught_up=True, skipped=[], emitted_at="")


def bad(first: int, last: int) -> EventBatch:
    """Malformed records on these lines."""
    cursor: Any = {"eventLineOffset": 0, "eventLineCount": last}
    skipped = [
        SkippedRecord(first_line=line, last_line=line, reason="no JSON", excerpt="x", size_bytes=1, sha256="")
        for line in range(first, last + 1)
    ]
    return EventBatch(events=[], cursor=cursor, resume_token="", caught_up=True, skipped=skipped, emitted_at="")


def lines_of(portion: Portion) -> list[int]:
    return [event["cursor"]["eventLineOffset"] for event in portion.events]


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    """A loop at work that has said two things."""
    loop = LoopFiles(tmp_path / "repo")
    put(loop.state, {"active": True, "current_loop_id": LOOP, "iteration": 1})
    loop.append(fresh("loop_start"), fresh("iteration_start"))
    return loop


@pytest.fixture
async def fed(loop: LoopFiles, tmp_path: Path) -> AsyncIterator[_Fed]:
    transport = _Meanwhile(loop.repo, state_folder=tmp_path / "state")
    yield _Fed(loop, transport)
    await transport.close()


async def test_a_fed_pass_takes_each_event_once_as_they_come(fed: _Fed, loop: LoopFiles) -> None:
    async with fed.streaming():
        first = await fed.passes(after_line=2)
        loop.append(fresh("role_start"))
        second = await fed.passes(after_line=3)
        third = await fed.passes()

    assert fed.ingested == [2, 1, 0]
    assert [state["transition"]["triggeringSignal"] for state in (first, second, third)] == [
        "event:iteration_start",
        "event:role_start",
        "snapshot_status:running",
    ]
    assert fed.escalations == []


async def test_what_came_after_the_snapshot_stays_in_the_feed(fed: _Fed, loop: LoopFiles) -> None:
    async with fed.streaming():
        assert await fed.feed.reaches(2, within=DEADLINE)
        fed.transport.happens = lambda: loop.append(fresh("role_start"), fresh("role_end"))
        first = await fed.passes()
        cursor = fed.cursor
        second = await fed.passes(after_line=4)

    assert fed.ingested == [2, 2]
    assert (cursor["eventLineOffset"], cursor["eventLineCount"]) == (2, 2)
    assert first["transition"]["triggeringSignal"] == "event:iteration_start"
    assert second["transition"]["triggeringSignal"] == "event:role_end"


async def test_one_batch_around_the_snapshot_is_split(fed: _Fed, loop: LoopFiles) -> None:
    fed.transport.happens = lambda: loop.append(fresh("role_start"), fresh("role_end"))
    waiting = asyncio.create_task(fed.passes())
    await fed.transport.taken.wait()

    async with fed.streaming():  # its first batch has all four
        await waiting
        await fed.passes(after_line=4)

    assert fed.ingested == [2, 2]


async def test_the_cursor_of_a_fed_pass_is_gone_on_from_without_a_feed(fed: _Fed, loop: LoopFiles) -> None:
    async with fed.streaming():
        await fed.passes(after_line=2)
    loop.append(fresh("role_start"))

    await reconcile(fed.transport, fed.store, OPTIONS)

    assert fed.ingested == [2, 1]
    assert fed.escalations == []


async def test_a_pass_that_can_not_write_leaves_the_feed_as_it_was(fed: _Fed) -> None:
    fed.store.folder.mkdir(parents=True)
    in_the_way = fed.store.reconcile_telemetry.parent
    in_the_way.touch()

    async with fed.streaming():
        with pytest.raises(InputInvalid, match="telemetry"):
            await fed.passes(after_line=2)
        in_the_way.unlink()
        await fed.passes()

    assert fed.ingested == [2]


async def test_a_pass_that_can_not_write_its_last_file_does_not_have_its_events_handled_twice(fed: _Fed) -> None:
    fed.store.folder.mkdir(parents=True)
    fed.store.health.mkdir()

    async with fed.streaming():
        with pytest.raises(InputInvalid, match="health"):
            await fed.passes(after_line=2)
        fed.store.health.rmdir()
        state = await fed.passes()

    assert fed.cursor["eventLineOffset"] == 2
    assert state["evidence"]["lastEventEnvelope"] is None
    assert state["sequence"]["violations"] == []


async def test_a_pass_that_is_cancelled_before_it_writes_leaves_the_feed_as_it_was(fed: _Fed) -> None:
    cancelled = asyncio.create_task(fed.passes())
    await fed.transport.taken.wait()  # now it waits for the feed, which is empty
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert fed.ingested == []

    async with fed.streaming():
        await fed.passes(after_line=2)

    assert fed.ingested == [2]


async def test_a_pass_that_is_cancelled_while_it_writes_has_written_and_its_events_are_handled(fed: _Fed) -> None:
    async with fed.streaming():
        assert await fed.feed.reaches(2, within=DEADLINE)
        cancelled = asyncio.create_task(fed.passes())
        fed.transport.happens = cancelled.cancel  # noticed at the next wait, that for the thread that writes
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await fed.passes()

    assert fed.ingested == [2, 0]
    assert fed.escalations == []


async def test_a_malformed_record_is_escalated_once_and_passed_over(fed: _Fed, loop: LoopFiles) -> None:
    loop.append(b"[no event]\n", fresh("role_start"))

    async with fed.streaming():
        await fed.passes(after_line=4)
        await fed.passes()

    assert fed.ingested == [3, 0]
    [told] = fed.escalations
    assert told["category"] == "event_malformed"
    assert (told["evidence"]["firstLine"], told["evidence"]["lastLine"]) == (3, 3)
    assert told["evidence"]["excerpt"] == "[no event]"
    assert told["evidence"].keys() == {"firstLine", "lastLine", "reason", "excerpt"}


async def test_a_replaced_log_is_escalated_once_and_taken_from_its_first_line(fed: _Fed, loop: LoopFiles) -> None:
    async with fed.streaming():
        await fed.passes(after_line=2)
        loop.replace(b"".join(fresh(f"new_{number}") for number in range(5)))
        state = await fed.passes(after_line=5)
        await fed.passes()

    assert fed.categories == ["log_replaced"]
    assert fed.ingested == [2, 5, 0]
    assert state["sequence"]["violations"] == []
    assert fed.cursor["eventLineOffset"] == 5


def test_what_is_left_of_a_log_that_is_gone_is_not_handled_as_the_new_ones() -> None:
    feed = Feed()
    portion = feed.portion(2)
    lost = LogReplaced("another log")

    feed.start_over(lost)
    feed.handled(portion)

    assert feed.lost is lost


async def test_a_pass_whose_feed_lags_behind_reads_for_itself_and_nothing_is_doubled(
    fed: _Fed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "FEED_PATIENCE", 0.01)
    await fed.passes()

    async with fed.streaming():
        await fed.passes(after_line=2)

    assert fed.ingested == [2, 0]
    assert fed.escalations == []


async def test_a_log_that_got_shorter_before_the_stream_noticed_is_read_anew(fed: _Fed, loop: LoopFiles) -> None:
    async with fed.streaming():
        await fed.passes(after_line=2)
    loop.replace(fresh("new"))

    before = fed.feed.is_overtaken
    await fed.passes()

    assert "log_replaced" in fed.categories
    assert fed.ingested == [2, 1]
    assert fed.cursor["eventLineOffset"] == 1
    assert (before, fed.feed.is_overtaken) == (False, True)


async def test_of_a_feed_that_was_overtaken_nothing_is_taken_any_more(fed: _Fed, loop: LoopFiles) -> None:
    async with fed.streaming():
        await fed.passes(after_line=2)
    loop.replace(fresh("new"))
    await fed.passes()
    fed.feed.put(batch(3, 9))  # of the old log
    loop.append(*(fresh() for _ in range(9)))

    state = await fed.passes()

    assert fed.ingested == [2, 1, 9]
    assert state["cursor"]["eventLineOffset"] == 10


async def test_a_failure_that_is_known_is_written_down_without_another_try(fed: _Fed, loop: LoopFiles) -> None:
    await reconcile(fed.transport, fed.store, OPTIONS)
    before = fed.store.state.read_bytes(), fed.store.cursor.read_bytes()

    for _ in range(2):
        await record_failure(fed.transport, fed.store, OPTIONS, NoAnswer("connection refused"))

    health = json.loads(fed.store.health.read_bytes())
    assert health["reasonCodes"] == ["transport_unreachable"]
    assert health["metrics"]["transportFailureStreak"] == 2
    assert (fed.store.state.read_bytes(), fed.store.cursor.read_bytes()) == before
    last = read_log(fed.store.reconcile_telemetry)[-1]
    assert (last["status"], last["failureCode"]) == ("failed", "snapshot_unavailable")
    assert last["failureMessage"] == "connection refused"
    assert fed.categories == ["health_degraded"]


@pytest.mark.parametrize("feeds", [True, False], ids=["fed", "reading for itself"])
async def test_many_events_are_counted_and_not_all_kept(
    fed: _Fed, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, *, feeds: bool
) -> None:
    monkeypatch.setattr(feed_module, "MOST_EVENTS", 10)
    loop.rewrite(fresh() * 1000 + fresh("loop_complete"))
    if feeds:
        async with fed.streaming():
            state = await fed.passes(after_line=1001)
    else:
        state = await reconcile(fed.transport, fed.store, OPTIONS)
    kept = sum(len(batch.events) for batch in fed.feed._batches)  # noqa: SLF001  # its memory is what this is about

    assert state["transition"]["triggeringSignal"] == "event:loop_complete"
    assert not state["sequence"]["driftActive"]
    assert state["sequence"]["lastEventSequence"] == 1001
    assert read_log(fed.store.reconcile_telemetry)[0]["eventsIngested"] == 1001
    assert kept <= 20


async def test_what_came_after_the_snapshot_is_not_folded_into_what_came_before(
    fed: _Fed, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "MOST_EVENTS", 5)
    put(loop.state, {"active": False})
    loop.rewrite(fresh("iteration_start") + 7 * fresh() + fresh("loop_complete"))
    token = await fed.read()

    async def go_on() -> None:
        loop.append(*(fresh() for _ in range(6)))
        await fed.read(token)

    fed.transport.happens = go_on
    first = await fed.passes()
    cursor = fed.cursor
    second = await fed.passes()

    assert (cursor["eventLineOffset"], cursor["eventLineCount"]) == (9, 9)
    assert first["transition"]["triggeringSignal"] == "event:loop_complete"
    assert second["transition"]["triggeringSignal"] == "event:usage_check"
    assert fed.ingested == [9, 6]
    assert fed.escalations == []


def test_both_sides_of_a_split_are_folded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MOST_EVENTS", 5)
    feed = Feed()
    feed.put(batch(1, 9))
    feed.split(9)
    feed.put(batch(10, 29))

    first = feed.portion(9)
    feed.handled(first)
    second = feed.portion(29)

    assert [lines_of(portion) for portion in (first, second)] == [[1, 9], [10, 29]]
    assert [portion.folded for portion in (first, second)] == [7, 18]
    assert first.is_whole
    assert second.is_whole


def test_a_portion_that_would_take_a_fold_apart_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MOST_EVENTS", 5)
    feed = Feed()
    feed.put(batch(1, 9))
    feed.put(batch(10, 29))

    for end, is_whole in ((9, False), (29, False), (40, True)):
        portion = feed.portion(end)
        feed.handled(portion)
        assert portion.is_whole is is_whole


def test_events_whose_order_is_not_as_it_should_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MOST_EVENTS", 3)
    rising: Any = [{"sequence": {"value": value}} for value in (1, 2, 3, 5, 9)]
    doubled: Any = [*rising, {"sequence": {"value": 9}}]

    assert fold(rising) == ([rising[0], rising[-1]], 3)
    assert fold(doubled) == (doubled, 0)
    unnumbered: Any = [*rising, {}]
    assert fold(unnumbered) == (unnumbered, 0)


def test_of_many_malformed_records_few_are_kept_and_all_are_told() -> None:
    feed = Feed()
    for first in range(1, 100_001, 200):
        feed.put(bad(first, first + 199))

    found = feed.portion(100_000).malformed
    assert len(found) <= 4 * MOST_RECORDS
    assert [(each.first.first_line, each.last_line) for each in found[:MOST_RECORDS]] == [
        (line, line) for line in range(1, MOST_RECORDS + 1)
    ]
    assert (sum(each.record_count for each in found), found[-1].last_line) == (100_000, 100_000)


def test_malformed_records_up_to_a_split_are_told_apart_from_later_ones() -> None:
    feed = Feed()
    feed.put(bad(1, 50))
    feed.split(50)
    feed.put(bad(51, 150))

    portion = feed.portion(50)
    assert sum(each.record_count for each in portion.malformed) == 50
    feed.handled(portion)
    assert sum(each.record_count for each in feed.portion(150).malformed) == 100
