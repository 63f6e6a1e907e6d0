"""What is compared is taken side by side, and no arm always comes first."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tools.bench.logs import LogStore
from tools.bench.plan import ROUNDS, Plan, Size
from tools.bench.rounds import interleaved

ARMS = "abc"


def orders(seed: int) -> list[str]:
    """The order of the arms in every round, the warm-up first."""
    taken: list[str] = []
    folder = Path("unused")
    plan = Plan(seed=seed, size=Size.FULL, folder=folder, logs=LogStore(folder, seed), say=lambda _: None)

    found = interleaved(plan, "test", {arm: partial(taken.append, arm) for arm in ARMS})

    assert {arm: len(values) for arm, values in found.items()} == dict.fromkeys(ARMS, ROUNDS.full)
    return ["".join(taken[at : at + len(ARMS)]) for at in range(0, len(taken), len(ARMS))]


def test_every_round_takes_every_arm_once_after_one_round_that_warms_up() -> None:
    assert [sorted(order) for order in orders(1)] == [list(ARMS)] * (ROUNDS.full + 1)


def test_the_order_is_drawn_anew_each_round_and_is_the_same_for_the_same_seed() -> None:
    assert len(set(orders(1))) > 1
    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
