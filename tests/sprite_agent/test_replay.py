"""A signature is used once: it is remembered as long as it could be used again, and refused where that can't be."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sprite_agent.callers import Proof
from sprite_agent.errors import ReplayCacheFull, SignatureReplayed
from sprite_agent.face.replay import CAPACITY, Replays


class Clock:
    """The time, as a test sets it."""

    now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def proof(nonce: str, expires: float = 1060.0, *, key_id: str = "m1") -> Proof:
    return Proof(issuer="opsmgr-1", key_id=key_id, actor="ada", nonce=nonce, expires=expires)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replays(clock: Clock) -> Replays:
    return Replays(capacity=3, now=clock)


def test_a_signature_is_taken_once(replays: Replays) -> None:
    replays.take(proof("a"))

    with pytest.raises(SignatureReplayed):
        replays.take(proof("a"))


def test_each_key_has_nonces_of_its_own(replays: Replays) -> None:
    for key_id in ("m1", "m2", "m3"):
        replays.take(proof("a", key_id=key_id))


def test_it_is_remembered_until_it_would_not_be_taken_anyway(replays: Replays, clock: Clock) -> None:
    replays.take(proof("a"))
    clock.now = 1060.0

    with pytest.raises(SignatureReplayed):
        replays.take(proof("a"))


def test_without_room_the_next_one_is_refused_and_none_is_forgotten(replays: Replays, clock: Clock) -> None:
    for number in range(3):
        replays.take(proof(f"{number}", 1060.0 + number))

    with pytest.raises(ReplayCacheFull, match="3 signatures were used of late"):
        replays.take(proof("more"))
    for number in range(3):
        with pytest.raises(SignatureReplayed):
            replays.take(proof(f"{number}", 1060.0 + number))
    clock.now = 1060.5
    replays.take(proof("more", 1100.0))
    with pytest.raises(ReplayCacheFull):
        replays.take(proof("still more", 1100.0))


def test_a_clock_that_is_set_forward_and_back_makes_no_old_signature_new(replays: Replays, clock: Clock) -> None:
    replays.take(proof("a", 1060.0))
    clock.now += 3600
    replays.take(proof("b", 4660.0))
    clock.now -= 3590

    with pytest.raises(SignatureReplayed):
        replays.take(proof("a", 1060.0))
    replays.take(proof("c", 1061.0))


def test_what_was_used_before_a_restart_is_not_taken_after_it(clock: Clock) -> None:
    replays = Replays(now=clock)
    replays.prime([("m1", "a", 1060.0), ("m1", "long past", 10.0), ("m1", "a", 1060.0)])

    with pytest.raises(SignatureReplayed):
        replays.take(proof("a"))
    replays.take(proof("b"))


def test_of_many_callers_at_once_one_gets_through() -> None:
    replays, together = Replays(), threading.Barrier(8)

    def take(number: int) -> int:
        taken = 0
        for each in range(200):
            together.wait()
            try:
                replays.take(proof(f"{each}", 1e12))
            except SignatureReplayed:
                continue
            taken += 1
        return taken

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 200


def test_as_many_are_remembered_as_was_said() -> None:
    replays = Replays()
    replays.prime(("m1", f"{number}", 1e12) for number in range(CAPACITY))

    with pytest.raises(ReplayCacheFull):
        replays.take(proof("more", 1e12))
    with pytest.raises(SignatureReplayed):
        replays.take(proof("99999", 1e12))
