"""start: how long the programs take until they have said something."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench import calls
from tools.bench.logs import LOOP, add_loop
from tools.bench.processes import Agent, Worker
from tools.bench.results import Result, figure
from tools.bench.rounds import interleaved
from tools.bench.spreads import noise, ratios

if TYPE_CHECKING:
    from tools.bench.plan import Plan


def run(plan: Plan) -> Result:
    """The programs in turn, beside an interpreter that does nothing."""
    repo = plan.folder / "start"
    add_loop(repo, LOOP, plan.logs.log("small", 100))
    program = str(Path(sys.executable).with_name("opsmgr"))
    with Worker() as worker:
        worker.call(_nothing)
        arms = {
            "help": partial(_milliseconds, program, "--help"),
            "again": partial(_milliseconds, program, "--help"),
            "serve": partial(_first_answer, Agent(repo), worker),
            "serve again": partial(_first_answer, Agent(repo), worker),
            "python": partial(_milliseconds, sys.executable, "-c", "pass"),
        }
        rounds = interleaved(plan, "start", arms)
    return Result(
        figures=(
            figure("start.help", rounds["help"], noise=noise(rounds["again"], rounds["help"])),
            figure("start.serve", rounds["serve"], noise=noise(rounds["serve again"], rounds["serve"])),
            figure("start.python", rounds["python"], "ms", text="start of Python alone"),
            figure("start.a_a", ratios(rounds["again"], rounds["help"]), text="opsmgr --help, against itself"),
        ),
    )


async def _nothing() -> None:
    """Has a worker import what it will need."""


def _milliseconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=30)
    return (time.perf_counter() - began) * 1e3


def _first_answer(agent: Agent, worker: Worker) -> float:
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(agent)
        worker.call(calls.info, agent.server)
        return (time.perf_counter() - began) * 1e3
