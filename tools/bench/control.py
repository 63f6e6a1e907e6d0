"""control: what ExecuteControl costs beside its command, in flushes of the same disk, and that a race runs it once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from typing import TYPE_CHECKING

from opsmgr.transport.sprite_service import SpriteServiceTransport
from tools.bench.logs import LOOP, add_loop
from tools.bench.plan import Sized
from tools.bench.processes import Agent, Worker
from tools.bench.results import Result, figure
from tools.bench.rounds import interleaved
from tools.bench.spreads import noise, quantile, ratios, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlRequest
    from tools.bench.plan import Plan
    from tools.bench.processes import Server

CALLS = Sized(full=8, quick=2)
"""Of each kind in a round."""
PACE = 0.15
"""Seconds before each single control: an operator's.

Whatever comes after a pause finds caches and processor cold, and takes up to 2.5 times as long. So what a control
is measured against has the same pauses before it.
"""
RACERS = 16
NAMES = {
    "new": "ExecuteControl, a new key, at an operator's pace",
    "hurried": "ExecuteControl, a new key, back to back",
    "replayed": "ExecuteControl, a key known already",
    "command": "the command itself, started directly, at that pace",
    "fdatasync": "fdatasync of a small append, same file system, at that pace",
    "hurried fdatasync": "fdatasync of a small append, back to back",
}


def run(plan: Plan) -> Result:
    """Controls through the validating transport, in the same rounds as their command alone and the flush alone."""
    repo = plan.folder / "control"
    add_loop(repo, LOOP, None)
    count = plan.folder / "control.count"
    command = _command(plan.folder / "stub", count)
    calls = plan.sized(CALLS)
    options = ("--superloop-bin", str(command), "--max-control-rate", "1000")
    with Agent(repo, *options) as agent, Worker() as worker:
        keys = _Keys()

        def controls(pace: float, *, new: bool = True) -> Callable[[], float]:
            def timed() -> float:
                wanted = [keys.new() if new else keys.first for _ in range(calls)]
                return quantile(worker.call(execute, agent.server, wanted, pace), 0.5)

            return timed

        arms = {
            "new": controls(PACE),
            "again": controls(PACE),
            "hurried": controls(0),
            "replayed": controls(0, new=False),
            "command": lambda: quantile([_direct(command, repo, PACE) for _ in range(calls)], 0.5),
            "fdatasync": lambda: quantile(_flushes(plan.folder / "flushed", calls, PACE), 0.5),
            "hurried fdatasync": lambda: quantile(_flushes(plan.folder / "flushed", 5 * calls, 0), 0.5),
        }
        worker.call(execute, agent.server, [keys.first], 0)
        rounds = interleaved(plan, "control", arms)
        plan.say(f"control: one key, {RACERS} times at once")
        before = len(count.read_bytes())
        worker.call(race, agent.server, keys.new())
        executions = len(count.read_bytes()) - before
    own, again = (
        [whole - bare for whole, bare in zip(rounds[arm], rounds["command"], strict=True)] for arm in ("new", "again")
    )
    return Result(
        figures=(
            figure("control.to_fdatasync", ratios(own, rounds["fdatasync"]), noise=noise(again, own)),
            figure("control.executions", executions),
            figure("control.own", spread(own), "ms", text="ExecuteControl minus its command"),
            *(figure(f"control.{name}", rounds[name], "ms", text=text) for name, text in NAMES.items()),
            figure("control.a_a", ratios(rounds["again"], rounds["new"]), text="ExecuteControl, against itself"),
        ),
    )


class _Keys:
    """Idempotency keys, none of which is used twice but the first."""

    first = "key-0"

    def __init__(self) -> None:
        self._used = 0

    def new(self) -> str:
        self._used += 1
        return f"key-{self._used}"


def _command(path: Path, count: Path) -> Path:
    """A runtime that does nothing but count how often it was started."""
    path.write_text(f"#!/bin/sh\nprintf x >> '{count}'\n")
    path.chmod(0o755)
    return path


def _direct(command: Path, repo: Path, pace: float) -> float:
    """Milliseconds from start to exit of the command."""
    time.sleep(pace)
    began = time.perf_counter()
    subprocess.run(
        [command, "approve", "--repo", repo, "--loop", LOOP], check=True, stdin=subprocess.DEVNULL, timeout=10
    )
    return (time.perf_counter() - began) * 1e3


def _flushes(path: Path, times: int, pace: float) -> list[float]:
    """Milliseconds of an append with its flush, after a pause each."""
    found = []
    to = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for _ in range(times):
        time.sleep(pace)
        began = time.perf_counter()
        os.write(to, b"x" * 200)
        os.fdatasync(to)
        found.append((time.perf_counter() - began) * 1e3)
    os.close(to)
    return found


def _request(key: str) -> ControlRequest:
    return {
        "loopId": LOOP,
        "intent": "approve",
        "requestedBy": "bench",
        "idempotencyKey": key,
        "confirmation": {"mode": "skip"},
    }


async def execute(server: Server, keys: Sequence[str], pace: float) -> list[float]:
    """Milliseconds of one control after another, each after a pause. Runs in a worker."""
    transport = SpriteServiceTransport(server.address, token=server.token)
    await transport.info()
    times = []
    for key in keys:
        await asyncio.sleep(pace)
        began = time.perf_counter()
        await transport.execute(_request(key))
        times.append((time.perf_counter() - began) * 1e3)
    await transport.close()
    return times


async def race(server: Server, key: str) -> None:
    """Sends one key many times at once, each over a channel of its own. Runs in a worker."""
    transports = [SpriteServiceTransport(server.address, token=server.token) for _ in range(RACERS)]
    await asyncio.gather(*(transport.info() for transport in transports))
    await asyncio.gather(*(transport.execute(_request(key)) for transport in transports))
    await asyncio.gather(*(transport.close() for transport in transports))
