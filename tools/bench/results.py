"""What a benchmark hands back: figures, which may have a target, and series, which show how cost grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tools.bench.spreads import Spread, spread
from tools.bench.targets import BY_KEY

if TYPE_CHECKING:
    from tools.bench.targets import Target, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One thing measured."""

    key: str
    text: str
    unit: str
    spread: Spread
    noise: float = 0.0
    """How far the same code, measured twice in this run, differs: a factor less 1. 0: nothing that noise could move."""

    @property
    def target(self) -> Target | None:
        """What it should be, if that is said."""
        return BY_KEY.get(self.key)

    @property
    def verdict(self) -> Verdict | None:
        """What this run says of the target."""
        return None if self.target is None else self.target.verdict(self.spread, self.noise)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """How one figure grows with another."""

    key: str
    text: str
    across: str
    """What grows, for the axis."""
    unit: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Everything that one benchmark has found."""

    figures: tuple[Figure, ...]
    series: tuple[Series, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    """What else a reader needs to know: sizes, seeds, digests."""


def figure(
    key: str, values: Spread | list[float] | float, unit: str = "", *, text: str = "", noise: float = 0
) -> Figure:
    """A figure; one that has a target bears its text and unit."""
    target = BY_KEY.get(key)
    if not isinstance(values, Spread):
        values = spread(values if isinstance(values, list) else [values])
    if target is not None:
        text, unit = target.text, target.unit
    return Figure(key=key, text=text or key, unit=unit, spread=values, noise=noise)
