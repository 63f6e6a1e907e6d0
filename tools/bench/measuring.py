"""Runs benchmarks one after another, each with a deadline; what fails takes nothing from the others."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from typing import TYPE_CHECKING

from tools.bench import control, fanin, gen, live, machine, micro, reference, replay, snapshot, start
from tools.bench.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from tools.bench.plan import Plan
    from tools.bench.results import Result

BENCHMARKS: dict[str, Callable[[Plan], Result]] = {
    "gen": gen.run,
    "micro": micro.run,
    "replay": replay.run,
    "live": live.run,
    "snapshot": snapshot.run,
    "control": control.run,
    "fanin": fanin.run,
    "start": start.run,
    "reference": reference.run,
}
DEADLINE = 900
"""Seconds for one benchmark."""


def measure(plan: Plan, names: Sequence[str]) -> Report:
    """Everything that the benchmarks of these names have found."""
    before, results, failures, seconds = machine.load(), {}, {}, {}
    for name in dict.fromkeys(names):
        began = time.monotonic()
        try:
            with _deadline(name):
                results[name] = BENCHMARKS[name](plan)
        except Exception as failure:  # noqa: BLE001  # whatever it was, the others' figures stand; it is told below
            plan.say("".join(traceback.format_exception(failure)))
            failures[name] = f"{type(failure).__name__}: {failure}"
        seconds[name] = time.monotonic() - began
    return Report(
        seed=plan.seed,
        size=plan.size,
        machine=machine.describe(plan.folder),
        load={"before": before, "after": machine.load()},
        seconds=seconds,
        results=results,
        failures=failures,
    )


@contextlib.contextmanager
def _deadline(name: str) -> Iterator[None]:
    """Ends what takes too long, by an error that unwinds, so that its processes are ended too."""

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"{name} took longer than {DEADLINE} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(DEADLINE)
    try:
        yield
    finally:
        signal.alarm(0)
