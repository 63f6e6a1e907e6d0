"""The counts of what one caller may have: by caller, exact at the limit, and nothing is kept of those who left."""

from __future__ import annotations

import contextlib
import threading

import pytest

from sprite_agent.errors import RateLimited, StreamLimit
from sprite_agent.face.limits import BURST, CallerLimits


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> int:
        """In nanoseconds."""
        return round(self.seconds * 1e9)


def limits(*, streams: int = 2, rate: int = 10, clock: Clock | None = None) -> CallerLimits:
    return CallerLimits(max_streams=streams, control_rate=rate, now=(clock or Clock()).now)


def test_a_caller_has_as_many_streams_as_it_may_and_not_one_more() -> None:
    counted = limits(streams=2)

    with (
        counted.stream("a", follow=True),
        counted.stream("a", follow=True),
        pytest.raises(StreamLimit, match="a has 2 streams open") as caught,
        counted.stream("a", follow=True),
    ):
        pass

    assert caught.value.details == {"caller": "a", "limit": "2"}
    assert caught.value.retry_after is not None
    assert caught.value.retryable


def test_a_stream_that_has_ended_makes_room_however_it_ended() -> None:
    counted = limits(streams=1)

    for _ in range(3):
        with contextlib.suppress(ConnectionError), counted.stream("a", follow=True):
            raise ConnectionError


def test_a_refused_stream_takes_no_room() -> None:
    counted = limits(streams=1)
    with counted.stream("a", follow=True):
        for _ in range(3):
            with pytest.raises(StreamLimit), counted.stream("a", follow=True):
                pass

    with counted.stream("a", follow=True):
        pass


def test_streams_that_end_by_themselves_are_counted_apart_from_those_that_follow() -> None:
    counted = CallerLimits(max_streams=1)

    with counted.stream("a", follow=True), counted.stream("a", follow=False):
        with pytest.raises(StreamLimit), counted.stream("a", follow=False):
            pass
        with pytest.raises(StreamLimit), counted.stream("a", follow=True):
            pass


def test_streams_of_one_caller_do_not_count_against_another() -> None:
    counted = limits(streams=1)

    with (
        counted.stream("a", follow=True),
        counted.stream("b", follow=True),
        pytest.raises(StreamLimit),
        counted.stream("b", follow=True),
    ):
        pass


def test_as_many_control_calls_as_the_burst_allows_come_at_once_and_the_next_is_told_how_long_to_wait() -> None:
    counted = limits(rate=10)
    for _ in range(10 * BURST):
        counted.count_control("a")

    with pytest.raises(RateLimited, match="a makes more than 10 control calls a second") as caught:
        counted.count_control("a")

    assert caught.value.retry_after == pytest.approx(0.1)
    assert caught.value.details == {"caller": "a", "perSecond": "10"}


def test_a_caller_that_waits_as_long_as_it_is_told_is_let_through() -> None:
    clock = Clock()
    counted = limits(rate=10, clock=clock)
    for _ in range(10 * BURST):
        counted.count_control("a")
    with pytest.raises(RateLimited) as caught:
        counted.count_control("a")

    clock.seconds += caught.value.retry_after or 0
    counted.count_control("a")

    with pytest.raises(RateLimited):
        counted.count_control("a")


def test_refused_calls_do_not_lengthen_the_wait() -> None:
    counted = limits(rate=10)
    for _ in range(10 * BURST):
        counted.count_control("a")

    waits = []
    for _ in range(100):
        with pytest.raises(RateLimited) as caught:
            counted.count_control("a")
        waits.append(caught.value.retry_after)

    assert set(waits) == {waits[0]}


def test_calls_at_the_rate_go_on_for_ever_and_a_little_faster_they_do_not() -> None:
    clock = Clock()
    counted = limits(rate=10, clock=clock)
    for _ in range(1000):
        counted.count_control("a")
        clock.seconds += 0.1

    with pytest.raises(RateLimited):  # noqa: PT012  # which of them is refused is the burst's affair
        for _ in range(1000):
            counted.count_control("a")
            clock.seconds += 0.09


def test_calls_of_one_caller_do_not_count_against_another() -> None:
    counted = limits(rate=1)
    for _ in range(BURST):
        counted.count_control("a")

    counted.count_control("b")

    with pytest.raises(RateLimited):
        counted.count_control("a")


def test_nothing_is_kept_of_callers_that_have_left() -> None:
    clock = Clock()
    counted = limits(rate=10, clock=clock)
    for number in range(20_000):
        counted.count_control(f"caller-{number}")
        with counted.stream(f"caller-{number}", follow=True):
            clock.seconds += 0.01

    assert len(counted._used_up) <= 1_001  # noqa: SLF001  # nothing else shows it
    assert not counted._streams  # noqa: SLF001  # likewise


def test_callers_in_threads_together_get_what_one_after_the_other_would() -> None:
    counted = limits(rate=100)
    passed = []

    def call() -> None:
        for _ in range(100):
            with contextlib.suppress(RateLimited):
                counted.count_control("a")
                passed.append(1)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(passed) == 100 * BURST
