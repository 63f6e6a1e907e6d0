"""Slots bound how many do something at once, and nobody exhausts them by standing still."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from opsmgr.fleet import slots
from opsmgr.fleet.slots import Slots

if TYPE_CHECKING:
    import pytest


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


async def test_one_who_stands_still_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PATIENCE", 0.05)
    bound = Slots(1)
    frozen = await bound.take()

    next_one = await asyncio.wait_for(bound.take(), 2)

    assert frozen.is_over
    assert not next_one.is_over


async def test_one_who_moves_on_keeps_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PATIENCE", 0.2)
    slot = await Slots(1).take()
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.5
    while loop.time() < until:
        slot.progress()
        await asyncio.sleep(0.01)

    assert not slot.is_over
