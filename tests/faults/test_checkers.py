"""The checkers of the other tests here: each finds what it is there to find."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.contract.json_text import open_object
from sprite_agent.contract.streaming import EventQuery
from support.following import Follower
from support.history import EventHistory, assert_prefix
from support.repos import LOOP, event, line, lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.transport.local import LocalTransport
    from sprite_agent.contract.streaming import EventBatch
    from support.repos import LoopFiles

    Change = Callable[[list[Any]], None]

LOG = line(event(n=1)) + b"\n" + lines(event(n=2)) + b"not json\n" + line(event(n=3)) + b"[]\n" + line(event(n=4))


async def seen(transport: LocalTransport, repo: LoopFiles) -> list[EventBatch]:
    """Everything that the log holds, as a client sees it."""
    repo.append(LOG)
    async with Follower(transport.events(EventQuery(loop_id=LOOP, skip_malformed=True))) as following:
        return await following.to_end()


def altered(events: list[Any]) -> None:
    """Changes the text of an event."""
    told = events[1]["event"]
    told["raw"] = open_object(told["raw"], told["raw"].text.replace("2", "5"))


async def test_a_history_that_is_the_log_is_right_whole_and_in_part(local: LocalTransport, repo: LoopFiles) -> None:
    batches = await seen(local, repo)

    assert assert_prefix(batches, repo.log) == 4
    assert assert_prefix([], repo.log) == 0
    with EventHistory(repo.log) as history:
        assert not history.at_end()
        history.saw(batches[0])
        assert history.at_end()


@pytest.mark.parametrize(
    "change",
    [
        lambda events: events.pop(0),
        lambda events: events.pop(1),
        lambda events: events.append(events[-1]),
        lambda events: events.reverse(),
        altered,
    ],
    ids=["the first left out", "one left out", "the last doubled", "turned round", "altered"],
)
async def test_a_history_that_is_not_the_logs_is_found_out(
    local: LocalTransport, repo: LoopFiles, change: Change
) -> None:
    batches = await seen(local, repo)
    change(batches[0].events)

    with pytest.raises(AssertionError):
        assert_prefix(batches, repo.log)


async def test_a_record_that_is_neither_seen_nor_reported_is_found_out(local: LocalTransport, repo: LoopFiles) -> None:
    batches = await seen(local, repo)
    batches[0].skipped.pop()

    with pytest.raises(AssertionError):
        assert_prefix(batches, repo.log)


async def test_a_line_that_was_seen_before_it_was_complete_is_found_out(local: LocalTransport, repo: LoopFiles) -> None:
    batches = await seen(local, repo)
    repo.truncate(len(LOG) - 1)

    with pytest.raises(AssertionError, match="not complete"):
        assert_prefix(batches, repo.log)
