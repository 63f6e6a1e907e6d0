"""Waits for facts, never for time."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE = 40.0
"""Seconds until a fact waited for counts as missing."""

_T = TypeVar("_T")


def until(fact: Callable[[], _T], what: str, *, deadline: float = DEADLINE) -> _T:
    """The first true value of `fact`; fails when there is none in time."""
    last = time.monotonic() + deadline
    while not (value := fact()):
        assert time.monotonic() < last, f"not within {deadline} s: {what}"
        time.sleep(0.01)
    return value


async def eventually(fact: Callable[[], object], what: str) -> None:
    """Returns once `fact` is true, which other tasks of this event loop see to; fails when that takes too long."""
    last = time.monotonic() + DEADLINE
    while not fact():
        assert time.monotonic() < last, f"not within {DEADLINE} s: {what}"
        await asyncio.sleep(0.01)
