"""gen: makes the logs of a seed and tells how they can be known again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tools.bench.logs import KINDS
from tools.bench.plan import Sized
from tools.bench.results import Result, figure

if TYPE_CHECKING:
    from tools.bench.plan import Plan
    from tools.bench.results import Figure

LINES = Sized(full=1_000_000, quick=2_000)


def run(plan: Plan) -> Result:
    """Makes a small log of full length, and a mix of a tenth of it."""
    figures: list[Figure] = []
    notes: dict[str, Any] = {}
    for kind in KINDS:
        lines = plan.sized(LINES) // (1 if kind == "small" else 10)
        plan.say(f"gen: {lines:,} lines, {kind}")
        began = time.perf_counter()
        log = plan.logs.log(kind, lines)
        seconds = time.perf_counter() - began
        figures.append(figure(f"gen.{kind}.line", log.size / log.lines, "bytes", text=f"a line of {kind}, on average"))
        figures.append(figure(f"gen.{kind}.seconds", seconds, "s", text=f"making {lines:,} lines of {kind}"))
        notes[kind] = {"seed": plan.seed, "lines": log.lines, "bytes": log.size, "sha256": log.sha256}
    return Result(figures=tuple(figures), notes=notes)
