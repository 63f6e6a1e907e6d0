"""What repeated measurements amount to: medians with quartiles, ratios of pairs, and how far noise reaches."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Values of one figure, one for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies the middle half of the values."""
        return quantile(self.values, 0.25), quantile(self.values, 0.75)


def spread(values: Sequence[float]) -> Spread:
    """The spread of `values`, of which there is at least one."""
    if not values:
        raise ValueError("a figure needs at least one value")
    return Spread(values=tuple(values))


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` (0 to 1) of the values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratios of pairs that were taken in the same round: what a busy machine does to both cancels out."""
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def noise(first: Sequence[float], second: Sequence[float]) -> float:
    """How far the same code differs from itself: the farther quartile of the paired ratios, as a factor less 1.

    Half as long is as far as twice as long: which of the two is called the first is chance.
    """
    return max(ratios(first, second).quartiles[1], ratios(second, first).quartiles[1]) - 1
