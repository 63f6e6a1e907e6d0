"""micro: microseconds of each step that an event takes from the log to the manager, one thread, nothing around it."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from tools.bench.floors import BATCH_LINES
from tools.bench.logs import KINDS
from tools.bench.plan import Sized
from tools.bench.results import Result, figure
from tools.bench.rounds import interleaved
from tools.bench.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.bench.plan import Plan

BATCHES = Sized(full=20, quick=2)
_IMPORTED = "import sys, opsmgr.client, sprite_agent.face.server; print('jsonschema' in sys.modules)"


def run(plan: Plan) -> Result:
    """Every step over the same batches, in random order."""
    figures = []
    for kind in KINDS:
        lines = plan.sized(BATCHES) * BATCH_LINES
        steps = Steps(plan.logs.log(kind, lines).path.read_bytes()).by_name()
        rounds = interleaved(plan, f"micro {kind}", {name: partial(_cost, step, lines) for name, step in steps.items()})
        for name, costs in rounds.items():
            figures.append(figure(f"micro.{kind}.{name}", costs, "µs", text=f"{name}, {kind}"))
    done = subprocess.run([sys.executable, "-c", _IMPORTED], capture_output=True, text=True, check=True, timeout=30)
    slow = int(done.stdout.strip() == "True")
    figures.append(figure("micro.python_jsonschema", slow, text="Python's jsonschema is loaded at run time (1: yes)"))
    return Result(figures=tuple(figures))


def _cost(step: Callable[[], object], events: int) -> float:
    """Microseconds of CPU per event."""
    # A whole log is kept alive here, which no real stream does: the collector would look through it again and again.
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        step()
        return (time.process_time() - began) / events * 1e6
    finally:
        gc.enable()
