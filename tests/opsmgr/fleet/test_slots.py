"""Slots bound how many do something at once, and nobody exhausts them by standing still."""

from __future__ import annotations

import asyncio

import pytest

from opsmgr.fleet import slots
from opsmgr.fleet.slots import Slots
from support.clocks import LoopClock
from support.waiting import DEADLINE

PATIENCE = 3600.0
"""Seconds: no machine stands still for so long."""


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    monkeypatch.setattr(slots, "PATIENCE", PATIENCE)
    return LoopClock(monkeypatch)


async def test_no_more_than_so_many_have_a_slot() -> None:
    bound = Slots(2)
    first, _second = await bound.take(), await bound.take()
    third = asyncio.create_task(bound.take())
    await asyncio.sleep(0)
    waited = not third.done()
    first.release()

    assert waited
    assert not (await third).is_over


async def test_a_slot_is_given_back_once_however_often_it_is_released() -> None:
    bound = Slots(1)
    first = await bound.take()
    first.release()
    first.release()
    await bound.take()
    another = asyncio.create_task(bound.take())
    await asyncio.sleep(0)

    assert not another.done()
    another.cancel()


async def test_one_who_stands_still_keeps_nobody_waiting(clock: LoopClock) -> None:
    bound = Slots(1)
    frozen = await bound.take()
    waiting = asyncio.create_task(bound.take())

    await clock.forward(0.9 * PATIENCE)
    assert not waiting.done()
    await clock.forward(0.2 * PATIENCE)
    next_one = await asyncio.wait_for(waiting, DEADLINE)

    assert frozen.is_over
    assert not next_one.is_over


async def test_one_who_moves_on_keeps_its_slot(clock: LoopClock) -> None:
    slot = await Slots(1).take()
    for _ in range(5):
        await clock.forward(0.75 * PATIENCE)
        slot.progress()

    assert not slot.is_over
