"""Runs what is to be compared side by side: each round takes every arm once, in an order drawn anew.

In a fixed order, whatever the first arm leaves warm is credited to the second: that alone once
made one of two equal things look 1.31 times as fast.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tools.bench.plan import Plan

_T = TypeVar("_T")


def interleaved(plan: Plan, name: str, arms: Mapping[str, Callable[[], _T]], rounds: int = 0) -> dict[str, list[_T]]:
    """What each arm gave, round by round, after one round that only warms up; `rounds` 0: as many as the plan says."""
    rounds = rounds or plan.rounds
    chance = random.Random(f"{plan.seed} {name}")  # noqa: S311  # the same orders each time
    found: dict[str, list[_T]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        plan.say(f"{name}: round {number} of {rounds}" if number else f"{name}: warming up")
        order = list(arms)
        chance.shuffle(order)
        for arm in order:
            value = arms[arm]()
            if number:
                found[arm].append(value)
    return found
