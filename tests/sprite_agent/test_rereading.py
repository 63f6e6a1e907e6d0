"""A log is read again after each change, at once when there is need, and else in no more than a share of the time."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from sprite_agent.event_log.pieces import Pace
from sprite_agent.event_log.rereading import CHUNK, Rereading, Stamp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 20 * CHUNK
CONTENT = bytes(range(256)) * (SIZE // 256)
OLD = Stamp(SIZE, 1, 1)
"""Of a file that was not changed for long."""


class Whole:
    """What was read of a log, of which only the whole is known."""

    def digest_after(self, offset: int) -> tuple[int, str]:
        """See `rereading.Reading`."""
        assert offset < SIZE
        return SIZE, hashlib.sha256(CONTENT).hexdigest()


END = Whole().digest_after(0)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "log"
    path.write_bytes(CONTENT)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock, of the time and of the processor, that stands still but for the reading of a chunk: two milliseconds."""
    now = [1000.0]
    pread = os.pread

    def taking_time(descriptor: int, size: int, offset: int) -> bytes:
        now[0] += 0.002
        return pread(descriptor, size, offset)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(os, "pread", taking_time)
    return now


def go_on(again: Rereading, log: int, stamp: Stamp = OLD, pace: Pace | None = None) -> bool:
    """A piece of the work."""
    return again.go_on(log, stamp, Whole(), END, pace or Pace())


def test_a_log_that_holds_what_was_read_is_covered_when_all_was_read_again(log: int, clock: list[float]) -> None:
    again = Rereading()
    pieces = 0
    while not again.covers(OLD):
        assert go_on(again, log)
        pieces += 1

    assert pieces > 1
    before = clock[0]
    assert go_on(again, log)
    assert clock[0] == before


@pytest.mark.parametrize("place", [0, SIZE // 2, SIZE - 1])
def test_a_change_of_one_byte_is_found(log: int, clock: list[float], place: int) -> None:
    os.pwrite(log, b"\xff" if CONTENT[place] != 255 else b"\0", place)
    again = Rereading()

    results = [go_on(again, log) for _ in range(20)]

    assert not all(results)


def test_a_log_that_became_shorter_is_found(log: int, clock: list[float]) -> None:
    os.truncate(log, SIZE // 2)
    again = Rereading()

    assert not all(go_on(again, log) for _ in range(20))


def test_the_background_takes_a_share_of_the_time_and_saves_up_little(log: int, clock: list[float]) -> None:
    again = Rereading()
    spent = 0.0
    for number in range(2000):
        before = clock[0]
        go_on(again, log, OLD._replace(changed=number))  # changed all the time
        spent += clock[0] - before
        clock[0] = max(clock[0], before + 0.01)

    assert 0.5 < spent < 0.1 + 0.05 * 20 + 0.1


def test_what_others_took_of_the_processor_meanwhile_is_not_owed(
    log: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: clock[0] / 1000)
    again = Rereading()
    pread = os.pread
    with monkeypatch.context() as slow:
        slow.setattr(os, "pread", lambda *where: (clock.__setitem__(0, clock[0] + 1.0), pread(*where))[1])
        assert go_on(again, log)

    before = clock[0]
    assert go_on(again, log)

    assert clock[0] > before


def test_a_pass_that_was_asked_for_is_made_at_once(log: int, clock: list[float]) -> None:
    again = Rereading()
    for number in range(100):
        go_on(again, log, OLD._replace(changed=number))
    before = clock[0]
    go_on(again, log)
    assert clock[0] == before  # the background has used up what it may take
    again.demand()
    wanted = again.demanded

    for _ in range(2 * SIZE // CHUNK):
        assert go_on(again, log)
        if again.is_done(wanted):
            break

    assert again.is_done(wanted)
    assert not again.demanded


def test_what_is_asked_for_while_a_pass_is_under_way_needs_one_that_begins_afterwards(
    log: int, clock: list[float]
) -> None:
    again = Rereading()
    assert go_on(again, log)
    os.pwrite(log, b"\xff", 0)  # where the pass under way has been already
    again.demand()

    assert not all(go_on(again, log) for _ in range(20))


def test_a_pass_that_is_no_longer_needed_is_waited_for_by_nobody(log: int) -> None:
    again = Rereading()
    again.demand()
    wanted = again.demanded
    assert not again.is_done(wanted)

    again.withdraw()

    assert again.is_done(wanted)


def test_a_log_that_was_changed_a_moment_ago_is_not_covered_by_a_pass_that_begins_now(
    log: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times may stay as they are though it is changed once more."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)  # however long the pass takes
    just_now = Stamp(SIZE, now, now)
    again = Rereading()

    assert go_on(again, log, just_now, Pace(60.0))

    assert not again.covers(just_now)
    assert not just_now.is_settled()
    assert OLD.is_settled()
