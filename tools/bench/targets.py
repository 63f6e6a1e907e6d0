"""The targets: what is to be reached, as data. The report, the documentation and the tests all read this table."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tools.bench.spreads import Spread

EXACT = 1.0
"""The margin of counts, and of memory where a margin would let pass what the gate is for."""
RATIO = 2.0
"""The margin of ratios: on a shared machine with two cores the same code, measured twice, differs by up to 1.6."""
MEMORY = 1.5
"""The margin of memory per stream: a difference of two moments, of which the allocator decides some part."""

Relation = Literal["<=", "<", ">=", "=="]
_HOLDS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, "==": operator.eq}


class Verdict(StrEnum):
    """What a run says of a target."""

    MET = "met"
    MISSED = "missed"
    NOT_RESOLVED = "not resolved"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What one figure should be."""

    key: str
    """Of the figure; its first word names the benchmark."""
    text: str
    relation: Relation
    bound: float
    unit: str = ""
    margin: float | None = None
    """By how many times `make check` lets a figure miss the bound. None: noise can move it, it is only reported."""

    def __str__(self) -> str:
        return self._worded(self.bound)

    @property
    def benchmark(self) -> str:
        """Which one measures it."""
        return self.key.partition(".")[0]

    @property
    def gate(self) -> str:
        """What `make check` holds to, in words; empty without a margin."""
        return "" if self.margin is None else self._worded(self._gate_bound(self.margin))

    def keeps_gate(self, found: Spread) -> bool:
        """Whether `make check` accepts what was found; without a margin, anything.

        It is the quartile on the good side that counts. A change for the worse shows in every round; what
        else the machine has to do shows in some, and a few of them are a median.
        """
        if self.margin is None:
            return True
        low, high = found.quartiles
        best = {"<=": (low,), "<": (low,), ">=": (high,), "==": found.values}[self.relation]
        return all(_HOLDS[self.relation](value, self._gate_bound(self.margin)) for value in best)

    def _gate_bound(self, margin: float) -> float:
        return self.bound / margin if self.relation == ">=" else self.bound * margin

    def _worded(self, bound: float) -> str:
        return f"{self.relation} {bound:,g}{f' {self.unit}' if self.unit else ''}"

    def verdict(self, found: Spread, noise: float) -> Verdict:
        """Met or missed, unless the bound lies where the same code, measured twice, may differ."""
        median = found.median
        # By factors both ways: noise above 1 would otherwise reach down to any bound.
        if noise and median / (1 + noise) <= self.bound <= median * (1 + noise):
            return Verdict.NOT_RESOLVED
        return Verdict.MET if _HOLDS[self.relation](median, self.bound) else Verdict.MISSED


TARGETS = (
    Target(
        key="replay.small.cpu_to_loads",
        text="replay: CPU of agent and manager per event / orjson.loads of the same line, small",
        relation="<=",
        bound=18,
        margin=RATIO,
    ),
    Target(
        key="replay.small.rate_to_relay",
        text="replay: rate / raw-line relay, small",
        relation=">=",
        bound=0.15,
        margin=RATIO,
    ),
    Target(
        key="replay.mix.rate_to_relay",
        text="replay: rate / raw-line relay, mix",
        relation=">=",
        bound=0.17,
        margin=RATIO,
    ),
    Target(
        key="replay.small.rate",
        text="replay: both sides validated, small",
        relation=">=",
        bound=120_000,
        unit="events/s",
    ),
    Target(
        key="replay.mix.rate", text="replay: both sides validated, mix", relation=">=", bound=60_000, unit="events/s"
    ),
    Target(key="replay.lost", text="replay: lines lost", relation="==", bound=0, unit="lines", margin=EXACT),
    Target(key="replay.doubled", text="replay: lines doubled", relation="==", bound=0, unit="lines", margin=EXACT),
    Target(
        key="replay.agent_peak",
        text="agent's memory through a replay of 1,000,000 lines, stalled reader included",
        relation="<=",
        bound=90,
        unit="MB",
        margin=EXACT,
    ),
    Target(
        key="snapshot.growth",
        text="GetSnapshot at 1,000,000 lines / at 100 lines",
        relation="<=",
        bound=1.1,
        margin=RATIO,
    ),
    Target(
        key="snapshot.to_noop",
        text="GetSnapshot / no-op unary, at 1,000,000 lines",
        relation="<=",
        bound=2,
        margin=RATIO,
    ),
    Target(
        key="snapshot.resume_to_noop",
        text="resume at line 999,999 of 1,000,000, by line / no-op unary",
        relation="<=",
        bound=3,
        margin=RATIO,
    ),
    Target(
        key="snapshot.resume_token_to_noop",
        text="resume at line 999,999 of 1,000,000, by token / no-op unary",
        relation="<=",
        bound=3,
        margin=RATIO,
    ),
    Target(
        key="live.to_noop",
        text="live: append to validated at the manager, p50 / no-op unary p50, 1 subscriber",
        relation="<=",
        bound=4,
        margin=RATIO,
    ),
    Target(key="live.flat_out.p99", text="live: p99 with a flat-out writer", relation="<", bound=10, unit="ms"),
    Target(key="live.growth", text="live: p50 at 100 subscribers / at 1", relation="<=", bound=6, margin=RATIO),
    Target(key="live.idle_cpu", text="agent's CPU idle with 100 followers", relation="<=", bound=0.5, unit="% CPU"),
    Target(key="live.lost", text="live: lines lost", relation="==", bound=0, unit="lines", margin=EXACT),
    Target(key="live.doubled", text="live: lines doubled", relation="==", bound=0, unit="lines", margin=EXACT),
    Target(
        key="control.to_fdatasync",
        text="ExecuteControl minus its command / fdatasync, all at an operator's pace",
        relation="<=",
        bound=30,
    ),
    Target(
        key="control.executions",
        text="one key sent 16 times at once: executions",
        relation="==",
        bound=1,
        margin=EXACT,
    ),
    Target(
        key="fanin.idle_memory",
        text="manager's memory per idle stream",
        relation="<=",
        bound=100,
        unit="KiB",
        margin=MEMORY,
    ),
    Target(
        key="fanin.saturated_memory",
        text="manager's memory per saturated stream",
        relation="<=",
        bound=1024,
        unit="KiB",
        margin=MEMORY,
    ),
    Target(key="fanin.open", text="2,000 streams on one manager: open all", relation="<", bound=2, unit="s"),
    Target(key="fanin.p99", text="2,000 streams, 1 event/s each: p99", relation="<", bound=25, unit="ms"),
    Target(key="fanin.lost", text="fan-in: lines lost", relation="==", bound=0, unit="lines", margin=EXACT),
    Target(key="fanin.doubled", text="fan-in: lines doubled", relation="==", bound=0, unit="lines", margin=EXACT),
    Target(key="start.help", text="start of opsmgr --help", relation="<", bound=150, unit="ms"),
    Target(
        key="start.serve", text="start of sprite-agent serve to its first answer", relation="<", bound=600, unit="ms"
    ),
)

BY_KEY = {target.key: target for target in TARGETS}
