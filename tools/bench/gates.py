"""The gates: what of the targets `make check` holds to, and whether a run kept it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.bench.report import number
from tools.bench.targets import TARGETS

if TYPE_CHECKING:
    from tools.bench.results import Result
    from tools.bench.targets import Target

GATED = tuple(dict.fromkeys(target.benchmark for target in TARGETS if target.margin is not None))
"""The benchmarks that have gates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One gate after a run."""

    target: Target
    value: float | None
    """None: it was not measured, which is no way to pass."""

    @property
    def kept(self) -> bool:
        """Whether what was measured passes."""
        return self.value is not None and self.target.keeps_gate(self.value)

    def __str__(self) -> str:
        found = "not measured" if self.value is None else f"{number(self.value)} {self.target.unit}".rstrip()
        return f"{self.target.key} ({self.target.text}): {found}; its gate is {self.target.gate}"


def gates(name: str, result: Result) -> list[Gate]:
    """All gates of the benchmark of that name."""
    medians = {figure.key: figure.spread.median for figure in result.figures}
    return [
        Gate(target=target, value=medians.get(target.key))
        for target in TARGETS
        if target.benchmark == name and target.margin is not None
    ]
