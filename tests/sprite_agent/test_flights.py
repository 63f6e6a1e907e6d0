"""Of all the calls about one key, one works on it and the others wait until it has landed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sprite_agent.control.flights import Flights
from sprite_agent.errors import ControlBusy
from support.waiting import DEADLINE, until

KEY = "demo", "key-1"


def joined(flights: Flights, place: tuple[str, str] = KEY, seconds: float = DEADLINE) -> bool:
    """Joins a flight and leaves it at once; whether that was as its leader."""
    with flights.join(place, time.monotonic() + seconds) as leads:
        return leads


def test_of_many_at_once_one_leads_and_the_others_are_held_until_it_has_landed() -> None:
    flights, landing = Flights(), threading.Event()
    with ThreadPoolExecutor(8) as pool:
        with flights.join(KEY, 0.0) as leads:
            others = [pool.submit(joined, flights) for _ in range(8)]
            until(lambda: threading.active_count() > 8, "the others have started")
            assert not any(other.done() for other in others)
            landing.set()

        assert leads
        assert [other.result() for other in others] == [False] * 8


def test_after_a_landing_the_next_one_leads() -> None:
    flights = Flights()

    assert [joined(flights) for _ in range(3)] == [True] * 3


def test_a_leader_that_fails_has_landed() -> None:
    flights = Flights()

    with pytest.raises(ZeroDivisionError), flights.join(KEY, 0.0):
        raise ZeroDivisionError

    assert joined(flights)


def test_a_flight_of_one_key_holds_up_no_other() -> None:
    flights = Flights()

    with flights.join(KEY, 0.0):
        assert joined(flights, ("demo", "key-2"))
        assert joined(flights, ("other", "key-1"))


def test_who_waits_is_told_to_come_back_at_the_deadline() -> None:
    flights = Flights()
    began = time.monotonic()

    with flights.join(KEY, 0.0), pytest.raises(ControlBusy, match="'key-1' is still being worked on") as busy:
        joined(flights, seconds=0.1)

    assert 0.1 <= time.monotonic() - began < 5
    assert (busy.value.executed, busy.value.retry_after) == (False, 1.0)
    assert joined(flights)


def test_a_deadline_that_is_over_lets_nobody_wait_but_anybody_lead() -> None:
    flights = Flights()

    assert joined(flights, seconds=-1)
    with flights.join(KEY, 0.0), pytest.raises(ControlBusy):
        joined(flights, seconds=-1)
