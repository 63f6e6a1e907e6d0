"""A subscription outlives its streams: cut, frozen, killed, drained, it goes on and brings every event once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.cursors import Position
from opsmgr.errors import NoAnswer
from opsmgr.subscription import subscribe
from opsmgr.transport.base import Attempts
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from opsmgr.watch import follow
from sprite_agent.contract.streaming import EventBatch, EventQuery
from sprite_agent.errors import Draining, EventMalformed, LogReplaced, LoopNotFound, OpsError
from support.chaos import ChaosProxy, Weather
from support.following import Follower
from support.repos import LOOP, MOMENT, event, line
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from conftest import Agent, AgentProgram

    from opsmgr.transport.base import Transport, TransportName
    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
PATIENT = RetryPolicy(attempts=1000, budget=60.0, base=0.05, cap=0.2)
QUICK = RetryPolicy(attempts=3, budget=5.0, base=0.01, cap=0.02)


def query(**members: Any) -> EventQuery:
    """A query that follows the loop."""
    return EventQuery(**{"loop_id": LOOP, "follow": True, "heartbeat_interval": 0.2, **members})


def numbered(first: int, count: int) -> bytes:
    """Lines with events."""
    return b"".join(line(event(n=number)) for number in range(first, first + count))


# A real agent that goes away.


@contextlib.asynccontextmanager
async def reaching(address: str) -> AsyncIterator[SpriteServiceTransport]:
    """The transport to an agent."""
    transport = SpriteServiceTransport(address, token=TOKEN, policy=PATIENT)
    yield transport
    await transport.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
async def test_a_subscription_goes_on_when_the_agent_is_started_again(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path, number: signal.Signals
) -> None:
    listen = f"unix:{tmp_path}/agent.sock"
    program = start_agent("--listen", listen)
    repo.append(numbered(1, 250))
    async with (
        reaching(program.address()) as transport,
        Follower(subscribe(transport, query(), policy=PATIENT)) as following,
    ):
        await following.until_lines(250)
        for round_ in range(1, 4):
            program.process.send_signal(number)
            repo.append(numbered(1 + 250 * round_, 125))
            program.exit_code()
            program = start_agent("--listen", listen)
            repo.append(numbered(126 + 250 * round_, 125))
            await following.until_lines(250 + 250 * round_)

    assert following.lines == list(range(1, 1001))


async def test_a_subscription_goes_on_when_a_frozen_agent_thaws(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path
) -> None:
    program = start_agent("--listen", f"unix:{tmp_path}/agent.sock")
    repo.append(numbered(1, 3))
    told: list[OpsError] = []

    def on_retry(error: OpsError, _: float) -> None:
        told.append(error)
        program.process.send_signal(signal.SIGCONT)

    async with (
        reaching(program.address()) as transport,
        Follower(subscribe(transport, query(), policy=PATIENT, on_retry=on_retry)) as following,
    ):
        await following.until_lines(3)
        program.process.send_signal(signal.SIGSTOP)
        repo.append(numbered(4, 3))
        await following.until_lines(6)

    assert following.lines == [1, 2, 3, 4, 5, 6]
    assert isinstance(told[0], NoAnswer)


async def test_a_stream_of_a_frozen_agent_is_dropped_after_three_missed_heartbeats(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path
) -> None:
    program = start_agent("--listen", f"unix:{tmp_path}/agent.sock")
    async with reaching(program.address()) as transport:
        async with Follower(transport.events(query(heartbeat_interval=0.3))) as following:
            await following.next()
            program.process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            with pytest.raises(NoAnswer, match="was silent for"):
                await following.to_end()
            assert 0.6 <= time.monotonic() - stopped < 3
        program.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_subscription_brings_every_event_once_over_connections_that_are_cut_anywhere(
    agent: Agent, repo: LoopFiles, seed: int
) -> None:
    repo.append(numbered(1, 3000))
    chance = random.Random(seed)  # noqa: S311  # the same cuts each time
    async with (
        ChaosProxy(agent.address, lambda: Weather(cut_after=chance.randrange(200, 200_000))) as proxy,
        reaching(proxy.address) as transport,
        Follower(subscribe(transport, query(max_events=3300), policy=PATIENT)) as following,
    ):
        await following.until_lines(300)
        repo.append(numbered(301, 300))
        await following.to_end()

    assert following.lines == list(range(1, 3301))
    assert proxy.cuts > 1


# Streams as told.


class Told:
    """A transport whose streams are told: each a list of batches, and how it ends."""

    name: TransportName = "sprite_service"

    def __init__(self, *streams: list[Any]) -> None:
        self.attempts = Attempts()
        self.queries: list[EventQuery] = []
        self._streams = streams

    async def events(self, query: EventQuery) -> AsyncIterator[EventBatch]:
        """The next stream; the last one again and again."""
        self.queries.append(query)
        await asyncio.sleep(0)
        for step in self._streams[min(len(self.queries), len(self._streams)) - 1]:
            if isinstance(step, Exception):
                raise step
            yield step


def batch(token: str, *numbers: int, caught_up: bool = False) -> EventBatch:
    """A batch with events at these lines."""
    events: list[Any] = [{"cursor": {"eventLineOffset": number, "eventLineCount": 99}} for number in numbers]
    return EventBatch(
        events=events,
        cursor={"eventLineOffset": 0, "eventLineCount": 99},
        resume_token=token,
        caught_up=caught_up,
        skipped=[],
        emitted_at=MOMENT,
    )


def subscribed(told: Told, **members: Any) -> Follower:
    """A subscription over streams as told, with few and quick tries."""
    policy = members.pop("policy", QUICK)
    on_retry = members.pop("on_retry", None)
    transport: Any = told
    return Follower(subscribe(transport, query(**members), policy=policy, on_retry=on_retry))


LOST = NoAnswer("lost")


async def test_every_stream_resumes_from_the_last_batch_received() -> None:
    told = Told([batch("a", 1), batch("b", 2), LOST], [batch("c"), LOST], [batch("d", 3, caught_up=True)])

    async with subscribed(told, follow=False, after_line=7) as following:
        await following.to_end()

    assert following.lines == [1, 2, 3]
    assert [(asked.resume_token, asked.after_line) for asked in told.queries] == [(None, 7), ("b", 7), ("c", 7)]


async def test_the_number_of_events_holds_over_all_streams() -> None:
    told = Told([batch("a", 1, 2), LOST], [batch("b", 3), LOST], [batch("c", 4, 5)])

    async with subscribed(told, max_events=5) as following:
        await following.to_end()

    assert [asked.max_events for asked in told.queries] == [5, 3, 2]
    assert following.lines == [1, 2, 3, 4, 5]


async def test_a_stream_lost_after_its_last_event_is_not_asked_for_again() -> None:
    told = Told([batch("a", 1, 2), LOST])

    async with subscribed(told, max_events=2) as following:
        await following.to_end()

    assert (following.lines, len(told.queries)) == ([1, 2], 1)


async def test_a_stream_that_ends_before_it_is_caught_up_is_followed_by_another() -> None:
    told = Told([batch("a", 1)], [batch("b", 2, caught_up=True)])

    async with subscribed(told, follow=False) as following:
        await following.to_end()

    assert (following.lines, len(told.queries)) == ([1, 2], 2)


async def test_a_following_stream_that_ends_is_followed_by_another_though_it_was_caught_up() -> None:
    told = Told([batch("a", 1, caught_up=True)], [batch("b", 2, caught_up=True)], [LoopNotFound("gone")])

    async with subscribed(told) as following:
        with pytest.raises(LoopNotFound):
            await following.to_end()

    assert following.lines == [1, 2]


async def test_without_an_answer_it_gives_up_when_the_policy_says_so() -> None:
    told = Told([batch("a", 1), LOST], [LOST])
    heard: list[tuple[OpsError, float]] = []

    async with subscribed(told, on_retry=lambda error, wait: heard.append((error, wait))) as following:
        with pytest.raises(NoAnswer):
            await following.to_end()

    assert (following.lines, len(told.queries)) == ([1], QUICK.attempts)
    assert [error for error, _ in heard] == [LOST] * (QUICK.attempts - 1)
    assert told.attempts.retries == QUICK.attempts - 1


async def test_the_budget_begins_anew_with_every_batch() -> None:
    streams = [[batch(f"t{number}", number), LOST] for number in range(1, 21)]
    told = Told(*streams, [batch("end", 21, caught_up=True)])

    async with subscribed(told, follow=False) as following:
        await following.to_end()

    assert following.lines == list(range(1, 22))


async def test_an_agent_that_drains_is_asked_again_when_it_says() -> None:
    told = Told([Draining("soon", retry_after=0.2)], [batch("a", 1, caught_up=True)])
    started = time.monotonic()

    async with subscribed(told, follow=False) as following:
        await following.to_end()

    assert following.lines == [1]
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize("refusal", [LogReplaced("replaced"), EventMalformed("bad"), LoopNotFound("none")])
async def test_a_refusal_is_the_callers_to_deal_with(refusal: OpsError) -> None:
    told = Told([batch("a", 1), refusal])

    async with subscribed(told) as following:
        with pytest.raises(type(refusal)):
            await following.to_end()

    assert (following.lines, len(told.queries)) == ([1], 1)


@pytest.mark.parametrize("stream", [[], [batch("a")]], ids=["nothing", "an empty batch"])
async def test_streams_that_end_at_once_are_not_asked_for_without_a_pause(stream: list[Any]) -> None:
    told = Told(stream)

    async def forever() -> None:
        async for _ in subscribe(told, query(), policy=RetryPolicy()):  # type: ignore[arg-type]  # as much as is needed
            pass

    with pytest.raises((TimeoutError, OpsError)):
        await asyncio.wait_for(forever(), 0.5)

    assert len(told.queries) < 50


# Following for ever.


def watching(transport: Transport, remarks: list[str], **members: Any) -> Follower:
    """What `opsmgr watch` sees of the loop; from the first line unless told otherwise."""
    return Follower(follow(transport, LOOP, **{"start": Position(), "tell": remarks.append, **members}))


async def test_watching_starts_with_what_happens_from_now_on(transport: Transport, repo: LoopFiles) -> None:
    repo.append(numbered(1, 3))
    async with watching(transport, [], start=None, max_events=2) as following:
        first = await following.next()
        repo.append(numbered(4, 2))
        await following.to_end()

    assert (first.events, following.lines) == ([], [4, 5])


async def test_watching_starts_where_it_is_told_to(transport: Transport, repo: LoopFiles) -> None:
    repo.append(numbered(1, 3))
    token = (await transport.snapshot(LOOP)).resume_token
    repo.append(numbered(4, 2))

    async with watching(transport, [], start=Position(line=2), max_events=3) as following:
        await following.to_end()
    async with watching(transport, [], start=Position(line=1, resume_token=token), max_events=2) as resumed:
        await resumed.to_end()

    assert (following.lines, resumed.lines) == ([3, 4, 5], [4, 5])


@pytest.mark.parametrize("change", ["replaced", "rewritten", "rewritten further up", "truncated"])
async def test_watching_tells_of_a_replaced_log_and_goes_on_with_its_first_line(
    transport: Transport, repo: LoopFiles, change: str
) -> None:
    repo.append(numbered(1, 3))
    remarks: list[str] = []
    async with watching(transport, remarks, max_events=6) as following:
        assert await following.until_lines(3) == [1, 2, 3]
        if change == "replaced":
            repo.replace(numbered(101, 2))
        elif change == "rewritten":
            repo.rewrite(numbered(101, 2))
        elif change == "rewritten further up":
            repo.rewrite(numbered(1, 1) + numbered(102, 1))
        else:
            repo.truncate(len(numbered(1, 2)))
        assert await following.until_lines(5) == [1, 2, 3, 1, 2]
        repo.append(numbered(103, 1))
        await following.to_end()

    assert following.lines == [1, 2, 3, 1, 2, 3]
    (remark,) = remarks
    assert remark.startswith("the event log was ")
    assert remark.endswith("going on with its first line")


async def test_watching_passes_over_malformed_records_and_reports_them(transport: Transport, repo: LoopFiles) -> None:
    repo.append(numbered(1, 1), b"not json\n", numbered(3, 1))

    async with watching(transport, [], max_events=2) as following:
        await following.to_end()

    assert following.lines == [1, 3]
    assert [record.first_line for batch in following.seen for record in batch.skipped] == [2]


async def test_watching_refuses_where_the_agent_does(transport: Transport) -> None:
    with pytest.raises(LoopNotFound):
        await anext(follow(transport, "other", start=Position(), tell=print))


async def test_watching_that_is_ended_has_ended_its_stream(
    transport: Transport, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.append(numbered(1, 1))
    streaming, ended = transport.events, []

    async def observed(asked: EventQuery) -> AsyncIterator[EventBatch]:
        async with contextlib.aclosing(streaming(asked)) as batches:
            try:
                async for found in batches:
                    yield found
            finally:
                ended.append(asked.loop_id)

    monkeypatch.setattr(transport, "events", observed)
    batches = follow(transport, LOOP, start=Position(), tell=print)
    await anext(batches)

    await batches.aclose()

    assert ended == [LOOP]


async def test_watching_tells_of_a_lost_agent_and_waits_for_it(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path
) -> None:
    listen = f"unix:{tmp_path}/agent.sock"
    program = start_agent("--listen", listen)
    repo.append(numbered(1, 2))
    remarks: list[str] = []
    async with reaching(program.address()) as transport, watching(transport, remarks, max_events=4) as following:
        await following.until_lines(2)
        program.end()
        arriving = asyncio.ensure_future(following.to_end())
        await asyncio.to_thread(until, lambda: len(remarks) > 1, "the loss is told of")
        repo.append(numbered(3, 2))
        start_agent("--listen", listen).address()
        await asyncio.wait_for(arriving, DEADLINE)

    assert following.lines == [1, 2, 3, 4]
    assert remarks[0].startswith("no answer from unix:")
    assert "; trying again in " in remarks[0]
