"""When a target that was lost is tried again, and when it is polled."""

from __future__ import annotations

from opsmgr.fleet.pacing import Pacing


def test_a_target_that_does_not_answer_is_polled_when_it_has_been_lost_for_a_while() -> None:
    pacing = Pacing(poll_seconds=15)
    pacing.lost(100)

    assert not pacing.is_poll_due(114, answers=False)
    assert pacing.is_poll_due(115, answers=False)


def test_a_target_that_answers_and_will_not_stream_is_polled_at_once() -> None:
    pacing = Pacing(poll_seconds=15)
    pacing.lost(100)

    assert pacing.is_poll_due(100, answers=True)


def test_polls_are_apart_however_often_the_stream_is_tried() -> None:
    pacing = Pacing(poll_seconds=15)
    pacing.lost(100)
    pacing.polled(100)
    pacing.lost(101)

    assert not pacing.is_poll_due(114, answers=True)
    assert pacing.is_poll_due(115, answers=False)


def test_a_target_that_was_reached_begins_anew() -> None:
    pacing = Pacing(poll_seconds=15)
    pacing.lost(100)
    pacing.polled(115)
    pacing.reached()
    pacing.lost(200)

    assert pacing.failures == 1
    assert not pacing.is_poll_due(214, answers=False)


def test_tries_are_ten_seconds_apart_at_most_and_a_minute_where_the_sprite_sleeps() -> None:
    pacing = Pacing(poll_seconds=15)
    for _ in range(50):
        pacing.lost(1)
    awake = [pacing.wait(None, asleep=False) for _ in range(300)]
    asleep = [pacing.wait(None, asleep=True) for _ in range(300)]

    assert max(awake) <= 10
    assert 30 < max(asleep) <= 60


def test_what_the_agent_asked_for_is_the_least() -> None:
    pacing = Pacing(poll_seconds=15)
    pacing.lost(1)

    assert pacing.wait(3.0, asleep=False) >= 3.0
