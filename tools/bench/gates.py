"""The gates: what of the targets `make check` holds to, and whether a run kept it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.bench.report import number
from tools.bench.targets import TARGETS

if TYPE_CHECKING:
    from tools.bench.results import Result
    from tools.bench.spreads import Spread
    from tools.bench.targets import Target

GATED = tuple(dict.fromkeys(target.benchmark for target in TARGETS if target.margin is not None))
"""The benchmarks that have gates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One gate after a run."""

    target: Target
    found: Spread | None
    """None: it was not measured, which is no way to pass."""

    @property
    def kept(self) -> bool:
        """Whether what was measured passes."""
        return self.found is not None and self.target.keeps_gate(self.found)

    def __str__(self) -> str:
        return f"{self.target.key} ({self.target.text}): {self._worded()}; its gate is {self.target.gate}"

    def _worded(self) -> str:
        if self.found is None:
            return "not measured"
        words = f"{number(self.found.median)} {self.target.unit}".rstrip()
        if len(self.found.values) > 1:
            words += " ({} to {})".format(*map(number, self.found.quartiles))
        return words


def gates(name: str, result: Result) -> list[Gate]:
    """All gates of the benchmark of that name."""
    spreads = {figure.key: figure.spread for figure in result.figures}
    return [
        Gate(target=target, found=spreads.get(target.key))
        for target in TARGETS
        if target.benchmark == name and target.margin is not None
    ]
