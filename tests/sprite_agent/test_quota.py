"""A quota lets so many things pass a minute, and what it leaves out it counts."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from sprite_agent.control.journal import Journal
from sprite_agent.control.journal_file import read_audit
from sprite_agent.control.refusals import RefusalNotes
from sprite_agent.quota import PER_MINUTE, Quota
from support.runtime import made_folder

if TYPE_CHECKING:
    from pathlib import Path

    from support.repos import LoopFiles


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1200.0

    def now(self) -> float:
        """In seconds."""
        return self.seconds


def test_as_many_pass_as_may_in_a_minute_and_not_one_more() -> None:
    quota = Quota(Clock().now)

    taken = [quota.take() for _ in range(PER_MINUTE + 5)]

    assert taken == [0] * PER_MINUTE + [None] * 5


def test_the_first_of_the_next_minute_is_told_how_many_were_left_out_and_the_second_is_not() -> None:
    clock = Clock()
    quota = Quota(clock.now)
    for _ in range(PER_MINUTE + 5):
        quota.take()

    clock.seconds += 59.9
    assert quota.take() is None
    clock.seconds += 0.1

    assert [quota.take(), quota.take()] == [6, 0]


def test_what_was_left_out_is_told_however_long_nothing_comes() -> None:
    clock = Clock()
    quota = Quota(clock.now)
    for _ in range(PER_MINUTE + 1):
        quota.take()

    clock.seconds += 7200

    assert quota.take() == 1


def test_threads_together_get_what_one_alone_would() -> None:
    quota = Quota(Clock().now)
    taken: list[int | None] = []

    def take() -> None:
        taken.extend(quota.take() for _ in range(PER_MINUTE))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (taken.count(0), taken.count(None)) == (PER_MINUTE, 3 * PER_MINUTE)


def test_the_audit_has_so_many_refusals_a_minute_and_how_many_were_left_out(loop: LoopFiles, state: Path) -> None:
    clock = Clock()
    notes = RefusalNotes(Quota(clock.now))
    folder = made_folder(state, loop)
    journal = Journal(folder)
    facts: dict[str, Any] = {"reason": "SCOPE_MISSING", "caller": {"identity": "token:ada"}}

    for _ in range(PER_MINUTE + 5):
        notes.note(lambda: journal, facts)
    clock.seconds += 60
    for _ in range(2):
        notes.note(lambda: journal, facts)
    journal.close()

    entries = [entry.document for entry in read_audit(folder.journal)]
    noted = [entry["body"] for entry in entries if entry["kind"] == "refused"]
    assert len(noted) == PER_MINUTE + 2
    assert [number for number, entry in enumerate(noted) if "leftOutBefore" in entry] == [PER_MINUTE]
    assert noted[PER_MINUTE]["leftOutBefore"] == 5
