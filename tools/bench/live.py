"""live: how long a line takes from just before its append to the validated event at the manager."""

from __future__ import annotations

import math
import os
import random
import time
from functools import partial
from typing import TYPE_CHECKING

from tools.bench import calls, floors, followers
from tools.bench.followers import Place
from tools.bench.logs import LOOP, add_loop, append
from tools.bench.plan import Sized
from tools.bench.processes import Agent, Worker, confine, cpu_seconds, memory
from tools.bench.readers import Tally
from tools.bench.results import Result, Series, figure
from tools.bench.rounds import interleaved
from tools.bench.spreads import noise, quantile, ratios, spread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tools.bench.followers import Deliveries
    from tools.bench.plan import Plan
    from tools.bench.results import Figure

MOST = 100
"""Followers."""
FOLLOWERS: Sized[tuple[int, ...]] = Sized(full=(1, 10, MOST), gate=(1, MOST), quick=(1, 10, MOST))
APPENDS = Sized(full=40, gate=15, quick=5)
"""Of one round."""
GAPS = Sized(full=(0.005, 0.066), gate=(0.04, 0.06), quick=(0.005, 0.066))
"""Seconds between appends: about 28 a second. For gates none comes close upon another: where a machine has other
things to do, a hundred followers would get behind, and what is measured then is a queue.
"""
FLAT_OUT_LINES = Sized(full=20_000, gate=5_000, quick=500)
HURRIED_RATE = 20_000
"""Lines a second: a thousand times what a busy loop writes, and less than fills the processors."""
REST_SECONDS = Sized(full=10.0, quick=3.0)
"""Until what opening streams has begun is over, and the log, 100 MB by then, was read again since it changed."""
IDLE_SECONDS = Sized(full=10.0, quick=1.0)
"""Twice: each as long as one heartbeat of every follower."""


class _Scene:
    """A real agent with one log that grows, and a manager beside it."""

    def __init__(self, plan: Plan, log: Path, agent: Agent, worker: Worker) -> None:
        self._log = log
        self.agent = agent
        self.worker = worker
        self.written = 0
        self.appends = plan.sized(APPENDS)
        self._gaps = plan.sized(GAPS)
        self._chance = random.Random(f"{plan.seed} gaps")  # noqa: S311  # the same each time
        self.tally = Tally()

    def follow(self, count: int) -> None:
        """Opens streams at the end of the log."""
        place = Place(server=self.agent.server, loop=LOOP, after=self.written)
        self.worker.call(followers.follow, [place] * count)

    def collect(self, lines: int) -> Deliveries:
        """What came of the last so many lines."""
        found = self.worker.call(followers.collect, lines)
        self.tally += found.tally
        return found

    def gaps(self) -> list[float]:
        """Pauses, as random as appends are."""
        return [self._chance.uniform(*self._gaps) for _ in range(self.appends)]

    def write(self) -> None:
        """Appends one line."""
        self.written += 1
        append(self._log, self.written)

    def paced(self, count: int) -> list[float]:
        """Milliseconds of each delivery, at an unhurried pace."""
        self.follow(count)
        for gap in self.gaps():
            time.sleep(gap)
            self.write()
        return self.collect(self.appends).delays

    def flat_out(self, lines: int, rate: float = math.inf) -> tuple[list[float], float]:
        """Milliseconds of each delivery from a writer that pauses only when it is ahead, and its lines a second."""
        self.follow(1)
        began = time.perf_counter()
        for number in range(lines):
            while (ahead := began + number / rate - time.perf_counter()) > 0:
                time.sleep(ahead)
            self.write()
        seconds = time.perf_counter() - began
        return self.collect(lines).delays, lines / seconds

    def apart(self, lines: int) -> tuple[list[float], float]:
        """The same, the writer and the agent on one processor, as in a Sprite, and the manager outside on another."""
        all_of_them = os.sched_getaffinity(0)
        inside, outside = ({processor} for processor in (min(all_of_them), max(all_of_them)))
        places = {os.getpid(): inside, self.agent.pid: inside, self.worker.pid: outside}
        try:
            for pid, place in places.items():
                confine(pid, place)
            return self.flat_out(lines)
        finally:
            for pid in places:
                confine(pid, all_of_them)


def run(plan: Plan) -> Result:
    """Few and many followers against a no-op call, a hurried writer, and silence."""
    repo = plan.folder / "live"
    counts = plan.sized(FOLLOWERS)
    log = add_loop(repo, LOOP, None)
    with Agent(repo, "--max-streams-per-caller", "200") as agent, Worker() as worker, floors.floor() as floor:
        scene = _Scene(plan, log, agent, worker)
        arms: dict[str, Callable[[], list[float]]] = {f"{count}": partial(scene.paced, count) for count in counts}
        arms["again"] = partial(scene.paced, 1)
        arms["noop"] = lambda: worker.call(calls.noops, floor, [0.0] * scene.appends * 5)
        arms["paced noop"] = lambda: worker.call(calls.noops, floor, scene.gaps())
        rounds = interleaved(plan, "live", arms)
        lines = plan.sized(FLAT_OUT_LINES)
        writers: dict[str, Callable[[], tuple[list[float], float]]] = {
            "flat out": partial(scene.flat_out, lines),
            "hurried": partial(scene.flat_out, lines, HURRIED_RATE),
        }
        if len(os.sched_getaffinity(0)) > 1:
            writers["apart"] = partial(scene.apart, lines)
        # How three processes share two processors is chance, for as long as such a round lasts.
        written = interleaved(plan, "live, writers", writers, plan.rounds * 2)
        flat_out = written["flat out"]
        plan.say("live: nothing happens, 100 followers")
        idle = _idle(plan, scene)
    return Result(
        figures=(
            *_latencies(rounds, counts),
            figure("live.flat_out.p99", [quantile(delays, 0.99) for delays, _ in flat_out], noise=_spread_of(flat_out)),
            *_hurried("live.flat_out", "with it", flat_out, (0.5,)),
            *_hurried(
                "live.apart", "with it, the manager on a processor of its own", written.get("apart", []), (0.5, 0.99)
            ),
            *_hurried("live.hurried", f"with one of {HURRIED_RATE:,} lines/s", written["hurried"], (0.5, 0.99)),
            *idle,
            figure("live.lost", scene.tally.lost),
            figure("live.doubled", scene.tally.doubled),
        ),
        series=(
            Series(
                key="live.growth",
                text="live: p50 from append to validated event",
                across="subscribers",
                unit="ms",
                points=tuple((float(n), spread(_medians(rounds[f"{n}"])).median) for n in counts),
            ),
        ),
    )


def _latencies(rounds: dict[str, list[list[float]]], counts: tuple[int, ...]) -> list[Figure]:
    one, again, most = (_medians(rounds[arm]) for arm in ("1", "again", f"{MOST}"))
    noop, paced = (_medians(rounds[arm]) for arm in ("noop", "paced noop"))
    differs = noise(again, one)
    figures = [
        figure("live.to_noop", ratios(one, noop), noise=differs),
        figure("live.growth", ratios(most, one), noise=differs),
        figure("live.noop.p50", noop, "ms", text="no-op unary, back to back: p50"),
        figure("live.paced_noop.p50", paced, "ms", text="no-op unary, at the pace of the appends: p50"),
        figure("live.to_paced_noop", ratios(one, paced), text="live: p50 / no-op unary at the same pace, 1 subscriber"),
        figure("live.a_a", ratios(again, one), text="live: p50, against itself, 1 subscriber"),
    ]
    for count in counts:
        found = rounds[f"{count}"]
        head, text = f"live.{count}", f"live: %s, {count} subscriber{'s' if count > 1 else ''}"
        figures.append(figure(f"{head}.p50", _medians(found), "ms", text=text % "p50"))
        figures.append(figure(f"{head}.p99", [quantile(delays, 0.99) for delays in found], "ms", text=text % "p99"))
    return figures


def _medians(rounds: list[list[float]]) -> list[float]:
    return [quantile(delays, 0.5) for delays in rounds]


def _hurried(
    head: str, text: str, rounds: list[tuple[list[float], float]], quantiles: tuple[float, ...]
) -> list[Figure]:
    if not rounds:
        return []
    figures = [
        figure(
            f"{head}.p{share * 100:.0f}",
            [quantile(delays, share) for delays, _ in rounds],
            "ms",
            text=f"live: p{share * 100:.0f} {text}",
        )
        for share in quantiles
    ]
    return [*figures, figure(f"{head}.rate", [rate for _, rate in rounds], "lines/s", text=f"live: written {text}")]


def _spread_of(rounds: list[tuple[list[float], float]]) -> float:
    """How far the rounds of a writer lie from their median, as a factor less 1."""
    found = spread([quantile(delays, 0.99) for delays, _ in rounds])
    low, high = found.quartiles
    return max(found.median / low, high / found.median) - 1


def _idle(plan: Plan, scene: _Scene) -> list[Figure]:
    """What an agent uses that has many followers and nothing to tell them."""
    scene.follow(MOST)
    time.sleep(plan.sized(REST_SECONDS))
    first, second = (_use(scene.agent.pid, plan.sized(IDLE_SECONDS)) for _ in range(2))
    held = memory(scene.agent.pid)
    scene.worker.call(followers.unfollow)
    return [
        figure("live.idle_cpu", [first, second], noise=noise([first], [second])),
        figure("live.idle_memory", held / 1e6, "MB", text="live: agent's memory with 100 followers"),
    ]


def _use(pid: int, seconds: float) -> float:
    """What a process uses of a core for so long, in per cent."""
    before, began = cpu_seconds(pid), time.perf_counter()
    time.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.perf_counter() - began) * 100
