"""Trying again is bounded in number and time, spread by chance, and never done where it can't help."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.errors import LoopLocked, NoAnswer, NotReached
from opsmgr.transport.base import Attempts
from opsmgr.transport.retry import Retries, RetryPolicy, retried
from opsmgr.watch import PATIENT
from sprite_agent.errors import ControlBusy, Draining, EventMalformed, LogReplaced, TokenInvalid

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sprite_agent.errors import OpsError


class _Clock:
    """A monotonic clock that moves only when someone sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(time, "monotonic", clock.time)
    monkeypatch.setattr(asyncio, "sleep", clock.sleep)
    return clock


def tries(policy: RetryPolicy | None = None) -> Retries:
    """Tries that begin now; as they are made, they would not see a fake clock."""
    retries = Retries(policy=policy or RetryPolicy(), attempts=Attempts())
    retries.progress()
    return retries


def failing(*errors: OpsError, answer: Any = "answer") -> Callable[[], Awaitable[Any]]:
    """A call that raises each error once, then answers."""
    left = list(errors)

    async def call() -> Any:
        if left:
            raise left.pop(0)
        return answer

    return call


def no_answers(count: int) -> list[OpsError]:
    return [NoAnswer(f"no answer {number}") for number in range(1, count + 1)]


async def test_an_answer_at_once_costs_nothing(clock: _Clock) -> None:
    retries = tries()

    assert await retried(failing(), retries) == "answer"
    assert clock.sleeps == []
    assert retries.attempts == Attempts(retries=0, waited_seconds=0.0)


async def test_what_succeeds_at_the_last_attempt_is_answered(clock: _Clock) -> None:
    retries = tries(RetryPolicy(attempts=4))

    assert await retried(failing(*no_answers(3)), retries) == "answer"
    assert len(clock.sleeps) == 3


async def test_after_as_many_attempts_as_allowed_the_last_error_is_raised(clock: _Clock) -> None:
    with pytest.raises(NoAnswer, match="no answer 4"):
        await retried(failing(*no_answers(9)), tries(RetryPolicy(attempts=4)))

    assert len(clock.sleeps) == 3


async def test_the_first_error_is_raised_when_one_attempt_is_allowed(clock: _Clock) -> None:
    with pytest.raises(NoAnswer, match="no answer 1"):
        await retried(failing(*no_answers(9)), tries(RetryPolicy(attempts=1)))

    assert clock.sleeps == []


async def test_retries_waits_and_reasons_are_noted(clock: _Clock) -> None:
    retries = tries()

    await retried(failing(NoAnswer("lost"), Draining("stopping"), ControlBusy("busy")), retries)

    assert retries.attempts.retries == 3
    assert list(retries.attempts.codes) == ["NO_ANSWER", "DRAINING", "CONTROL_BUSY"]
    assert retries.attempts.waited_seconds == pytest.approx(sum(clock.sleeps))


async def test_the_attempt_that_is_the_last_is_not_noted_as_retried(clock: _Clock) -> None:
    retries = tries(RetryPolicy(attempts=2))

    with pytest.raises(NoAnswer):
        await retried(failing(*no_answers(2)), retries)

    assert retries.attempts.retries == 1


@pytest.mark.parametrize("last", [TokenInvalid("revoked"), ControlBusy("busy")], ids=["refused", "tried out"])
async def test_what_an_earlier_try_may_have_run_is_not_denied_by_the_last(clock: _Clock, last: OpsError) -> None:
    with pytest.raises(type(last)) as caught:
        await retried(failing(NoAnswer("lost"), Draining("stopping"), last), tries(RetryPolicy(attempts=3)))

    assert caught.value.executed is None


async def test_that_nothing_was_sent_is_not_said_where_an_earlier_try_was(clock: _Clock) -> None:
    with pytest.raises(NoAnswer) as caught:
        await retried(
            failing(NoAnswer("lost"), *(NotReached("refused", details={"target": "t"}) for _ in range(2))),
            tries(RetryPolicy(attempts=3)),
        )

    assert (caught.value.reason, caught.value.message) == ("NO_ANSWER", "refused")
    assert (caught.value.executed, caught.value.details, caught.value.attempts) == (None, {"target": "t"}, 3)


async def test_what_no_try_has_run_is_said(clock: _Clock) -> None:
    with pytest.raises(TokenInvalid) as caught:
        await retried(failing(Draining("stopping"), ControlBusy("busy"), TokenInvalid("revoked")), tries())

    assert caught.value.executed is False


def test_after_progress_earlier_tries_count_no_more() -> None:
    retries = tries()
    retries.wait_after(NoAnswer("lost"))

    retries.progress()

    with pytest.raises(TokenInvalid) as caught:
        retries.wait_after(TokenInvalid("revoked"))
    assert caught.value.executed is False


# What is not tried again.


@pytest.mark.parametrize(
    "error", [TokenInvalid("no"), LogReplaced("gone"), EventMalformed("line 3"), LoopLocked("busy")]
)
async def test_a_refusal_is_raised_at_once(clock: _Clock, error: OpsError) -> None:
    retries = tries()

    with pytest.raises(type(error)):
        await retried(failing(error), retries)

    assert clock.sleeps == []
    assert retries.attempts.retries == 0


async def test_a_refusal_after_no_answer_ends_the_tries(clock: _Clock) -> None:
    with pytest.raises(TokenInvalid):
        await retried(failing(NoAnswer("lost"), TokenInvalid("no")), tries())

    assert len(clock.sleeps) == 1


async def test_an_error_of_another_kind_is_not_caught(clock: _Clock) -> None:
    async def call() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await retried(call, tries())
    assert clock.sleeps == []


# The budget.


async def test_no_wait_goes_beyond_the_budget(clock: _Clock) -> None:
    began = clock.now

    with pytest.raises(NoAnswer):
        await retried(failing(*no_answers(10_000)), tries(RetryPolicy(attempts=10_000, budget=5.0)))

    assert clock.sleeps
    assert clock.now - began <= 5.0


async def test_time_spent_in_the_calls_counts_against_the_budget(clock: _Clock) -> None:
    calls = 0

    async def slow() -> None:
        nonlocal calls
        calls += 1
        clock.now += 30.0
        raise NoAnswer("lost")

    with pytest.raises(NoAnswer):
        await retried(slow, tries(RetryPolicy(budget=50.0)))
    assert calls == 2


def test_a_budget_of_nothing_allows_no_second_attempt(clock: _Clock) -> None:
    lost = NoAnswer("lost", retry_after=0.1)

    with pytest.raises(NoAnswer):
        tries(RetryPolicy(budget=0.0)).wait_after(lost)


# Chance.


@pytest.mark.parametrize(
    ("failures", "most"), [(1, 0.2), (2, 0.4), (3, 0.8), (4, 1.6), (6, 6.4), (7, 10.0), (60, 10.0)]
)
def test_a_wait_is_anywhere_between_nothing_and_a_limit_that_doubles(failures: int, most: float) -> None:
    waits = [RetryPolicy().backoff(failures, None) for _ in range(500)]

    assert all(0 <= wait <= most for wait in waits)
    assert min(waits) < most / 10
    assert max(waits) > most * 9 / 10


@pytest.mark.parametrize("failures", [1_000, 1_025, 5_000, 1_000_000])
def test_after_any_number_of_failures_the_wait_is_still_within_the_cap(failures: int) -> None:
    """`watch` tries for ever: 1,025 failures are an hour and a half of a suspended Sprite."""
    assert 0 <= PATIENT.backoff(failures, None) <= PATIENT.cap


def test_watching_outlasts_a_day_without_an_answer(clock: _Clock) -> None:
    retries = tries(PATIENT)
    began = clock.now
    while clock.now - began < 86_400:
        clock.now += retries.wait_after(NoAnswer("lost"))


# What the agent asks for.


@pytest.mark.parametrize("asked", [0.5, 2.0, 30.0])
def test_the_agent_is_never_asked_again_sooner_than_it_said(asked: float) -> None:
    waits = [RetryPolicy().backoff(failures, asked) for failures in (1, 2, 5) for _ in range(100)]

    assert all(wait >= asked for wait in waits)


def test_beyond_what_the_agent_asked_for_chance_still_spreads_the_load() -> None:
    waits = {RetryPolicy(base=8.0).backoff(1, 0.1) for _ in range(100)}

    assert len(waits) > 1
    assert max(waits) <= 8.0


def test_a_wait_the_agent_asks_for_that_the_budget_has_no_room_for_is_not_waited(clock: _Clock) -> None:
    with pytest.raises(Draining):
        tries(RetryPolicy(budget=60.0)).wait_after(Draining("stopping", retry_after=61.0))


def test_a_wait_the_agent_asks_for_is_used(clock: _Clock) -> None:
    assert tries().wait_after(Draining("stopping", retry_after=7.0)) == 7.0


# Progress.


def test_progress_begins_the_count_of_attempts_anew(clock: _Clock) -> None:
    retries = tries(RetryPolicy(attempts=3))
    for _ in range(20):
        retries.wait_after(NoAnswer("lost"))
        retries.wait_after(NoAnswer("lost"))
        retries.progress()

    retries.wait_after(NoAnswer("lost"))
    retries.wait_after(NoAnswer("lost"))
    with pytest.raises(NoAnswer):
        retries.wait_after(NoAnswer("lost"))


def test_progress_begins_the_budget_anew(clock: _Clock) -> None:
    retries = tries(RetryPolicy(budget=10.0))
    for _ in range(20):
        clock.now += 9.0
        retries.wait_after(NoAnswer("lost", retry_after=0.5))
        retries.progress()

    clock.now += 11.0
    with pytest.raises(NoAnswer):
        retries.wait_after(NoAnswer("lost"))


def test_progress_makes_the_next_wait_a_short_one(clock: _Clock) -> None:
    retries = tries(RetryPolicy(attempts=100, budget=1e9))
    for _ in range(50):
        retries.wait_after(NoAnswer("lost"))
    retries.progress()

    assert retries.wait_after(NoAnswer("lost")) <= 0.2


def test_tries_of_two_things_share_what_they_cost_but_not_their_bounds(clock: _Clock) -> None:
    attempts = Attempts()
    one = Retries(policy=RetryPolicy(attempts=2), attempts=attempts)
    other = Retries(policy=RetryPolicy(attempts=2), attempts=attempts)
    for retries in (one, other):
        retries.progress()
        retries.wait_after(NoAnswer("lost"))

    assert attempts.retries == 2
