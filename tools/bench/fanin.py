"""fanin: one manager that holds hundreds and thousands of streams: memory, CPU, delay and completeness."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from tools.bench import floors, followers
from tools.bench.followers import Place
from tools.bench.logs import add_loop, append
from tools.bench.plan import Sized
from tools.bench.processes import Agent, Worker, cpu_seconds, forget_peak, memory, peak_memory
from tools.bench.readers import Tally
from tools.bench.results import Result, Series, figure
from tools.bench.rounds import interleaved
from tools.bench.spreads import noise, quantile, ratios

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tools.bench.followers import Deliveries
    from tools.bench.plan import Plan
    from tools.bench.results import Figure

MOST = 2000
"""Streams, as the next."""
STREAMS: Sized[tuple[int, ...]] = Sized(full=(100, 500, MOST), gate=(100,), quick=(10, 40))
OPENINGS = Sized(full=8, quick=2)
"""Rounds of opening all of them, and as many bare ones. An even number."""
IDLE_SECONDS = Sized(full=4.0, quick=1.0)
EVENTS = Sized(full=8, gate=4, quick=2)
"""Of each stream, one a second."""
SATURATED = Sized(full=100, gate=100, quick=5)
"""Streams with much to catch up on at once."""
BACKLOG = Sized(full=3_000, gate=2_050, quick=300)
"""Lines that each of them has to catch up on."""
SLOTS = 16
"""As many as the supervisor of a fleet lets catch up at once."""
PATIENCE = 300.0


def run(plan: Plan) -> Result:
    """Grows the number of streams, then saturates some, without a limit and with it."""
    found: list[Figure] = []
    sizes = plan.sized(STREAMS)
    with contextlib.ExitStack() as stack:
        fleet = _Fleet(plan, stack)
        for streams in sizes:
            found += fleet.hold(streams)
        total = fleet.tally
        found += _openings(plan, fleet, sizes[-1])
    found += _bare(plan, sizes[-1])
    saturated, caught_up = _saturate(plan)
    found += saturated
    total += caught_up
    medians = {figure.key: figure.spread.median for figure in found}
    by_streams = {
        name: tuple((float(streams), medians[f"fanin.{streams}.{name}"]) for streams in sizes)
        for name in ("p99", "idle_memory")
    }
    return Result(
        figures=(
            *found,
            figure("fanin.idle_memory", medians[f"fanin.{sizes[-1]}.idle_memory"]),
            figure("fanin.lost", total.lost),
            figure("fanin.doubled", total.doubled),
        ),
        series=(
            Series(
                key="fanin.p99",
                text="fan-in, 1 event/s for each stream: p99",
                across="streams of one manager",
                unit="ms",
                points=by_streams["p99"],
            ),
            Series(
                key="fanin.idle_memory",
                text="fan-in: manager's memory per idle stream",
                across="streams of one manager",
                unit="KiB",
                points=by_streams["idle_memory"],
            ),
        ),
    )


class _Fleet:
    """Two agents with many loops each. Lives as long as the stack it was made with."""

    def __init__(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        self._plan = plan
        self._logs: list[tuple[Agent, str, Path]] = []
        self.tally = Tally()
        loops = plan.sized(STREAMS)[-1] // 2
        repos = [plan.folder / f"fanin-{side}" for side in "ab"]
        logs = [{f"loop-{n}": add_loop(repo, f"loop-{n}", None) for n in range(loops)} for repo in repos]
        agents = [stack.enter_context(Agent(repo, "--max-streams-per-caller", "2000")) for repo in repos]
        for n in range(loops):
            self._logs += [(agent, f"loop-{n}", of[f"loop-{n}"]) for agent, of in zip(agents, logs, strict=True)]
        self._lines = dict.fromkeys((log for _, _, log in self._logs), 0)

    def hold(self, streams: int) -> list[Figure]:
        """Opens so many streams, looks at them idle, then sends one event a second by each."""
        plan, logs = self._plan, self._logs[:streams]
        places = self._places(streams)
        events = plan.sized(EVENTS)
        with Worker() as worker:
            plan.say(f"fanin: opening {streams} streams")
            worker.call(followers.warm_up, places[0])
            before = memory(worker.pid)
            opened = worker.call(followers.follow, places)
            seconds = plan.sized(IDLE_SECONDS)
            time.sleep(1.0)  # what opening them has begun comes to rest
            idle = (memory(worker.pid) - before) / streams / 1024
            used = cpu_seconds(worker.pid)
            time.sleep(seconds)
            idle_cpu = (cpu_seconds(worker.pid) - used) / seconds * 100
            plan.say(f"fanin: {streams} streams, {events} events each, one a second")
            used, began = cpu_seconds(worker.pid), time.perf_counter()
            self._write([log for _, _, log in logs], events)
            got = worker.call(followers.collect, events)
            busy = (cpu_seconds(worker.pid) - used) / (time.perf_counter() - began) * 100
        self.tally += got.tally
        return _held(streams, opened=opened, idle=idle, cpus=(idle_cpu, busy), seconds=_by_second(got, events))

    def open(self, streams: int) -> float:
        """Opens so many streams from a process that has none yet, and ends them; seconds until all had caught up."""
        places = self._places(streams)
        with Worker() as worker:
            worker.call(followers.warm_up, places[0])
            opened = worker.call(followers.follow, places)
            worker.call(followers.unfollow)
        return opened

    def _places(self, streams: int) -> list[Place]:
        return [
            Place(server=agent.server, loop=loop, after=self._lines[log]) for agent, loop, log in self._logs[:streams]
        ]

    def _write(self, logs: Sequence[Path], events: int) -> None:
        """Appends so many lines to each log, evenly over so many seconds."""
        began = time.perf_counter()
        for number in range(events * len(logs)):
            log = logs[number % len(logs)]
            ahead = number / len(logs) - (time.perf_counter() - began)
            if ahead > 0:
                time.sleep(ahead)
            self._lines[log] += 1
            append(log, self._lines[log])


def _by_second(got: Deliveries, events: int) -> list[list[float]]:
    """The delays of each second of the writing."""
    size = len(got.delays) // events
    return [got.delays[at : at + size] for at in range(0, size * events, size)]


def _held(
    streams: int, *, opened: float, idle: float, cpus: tuple[float, float], seconds: list[list[float]]
) -> list[Figure]:
    p99s = [quantile(delays, 0.99) for delays in seconds]
    # Every other second against the next: the same code, in the same run.
    differs = noise(p99s[0::2], p99s[1::2]) if len(p99s) % 2 == 0 else 0.0
    head, text = f"fanin.{streams}", f"{streams} streams: "
    idle_cpu, busy = cpus
    figures = [
        figure(f"{head}.open", opened, "s", text=f"{text}open all"),
        figure(f"{head}.idle_memory", idle, "KiB", text=f"{text}memory of each, idle"),
        figure(f"{head}.idle_cpu", idle_cpu, "%", text=f"{text}manager's CPU, idle"),
        figure(f"{head}.busy_cpu", busy, "%", text=f"{text}manager's CPU at 1 event/s each"),
        figure(f"{head}.p50", [quantile(delays, 0.5) for delays in seconds], "ms", text=f"{text}p50 at 1 event/s each"),
        figure(f"{head}.p99", p99s, "ms", text=f"{text}p99 at 1 event/s each"),
    ]
    if streams == MOST:
        figures.append(figure("fanin.p99", p99s, noise=differs))
    return figures


def _openings(plan: Plan, fleet: _Fleet, streams: int) -> list[Figure]:
    """How long it takes to open so many streams, in turn with as many bare ones."""
    with floors.floor() as one, floors.floor() as other:

        def bare() -> float:
            with Worker() as worker:
                return worker.call(floors.beats, [one, other], streams, 1, patience=PATIENCE).opened

        arms = {"ours": lambda: fleet.open(streams), "bare": bare}
        found = interleaved(
            plan, f"fanin: opening {streams} streams, and as many bare ones", arms, plan.sized(OPENINGS)
        )
    ours = found["ours"]
    key = "fanin.open" if streams == MOST else f"fanin.{streams}.openings"
    return [
        figure(key, ours, "s", text=f"{streams} streams: open all, in turn", noise=noise(ours[0::2], ours[1::2])),
        figure(
            "fanin.open_to_bare",
            ratios(ours, found["bare"]),
            text=f"{streams} streams: open all / as many bare ones",
        ),
        figure("fanin.bare.open", found["bare"], "s", text=f"{streams} bare streams: open all"),
    ]


def _bare(plan: Plan, streams: int) -> list[Figure]:
    """What the same gRPC takes to carry one message a second by each of as many streams, and no more."""
    plan.say(f"fanin: {streams} bare streams")
    with floors.floor() as one, floors.floor() as other, Worker() as worker:
        held = worker.call(floors.beats, [one, other], streams, plan.sized(EVENTS), patience=PATIENCE)
    text = f"{streams} bare streams: "
    return [
        figure("fanin.bare.p50", quantile(held.delays, 0.5), "ms", text=f"{text}p50 at 1 message/s each"),
        figure("fanin.bare.p99", quantile(held.delays, 0.99), "ms", text=f"{text}p99 at 1 message/s each"),
    ]


def _saturate(plan: Plan) -> tuple[list[Figure], Tally]:
    """Peak memory per stream, above a manager that has none, while many streams catch up at once."""
    streams, lines = plan.sized(SATURATED), plan.sized(BACKLOG)
    log = plan.logs.log("small", lines)
    repo = plan.folder / "fanin-saturated"
    for number in range(streams):
        add_loop(repo, f"loop-{number}", log)
    figures = []
    total = Tally()
    with Agent(repo, "--max-streams-per-caller", "200") as agent:
        places = [Place(server=agent.server, loop=f"loop-{number}", after=0) for number in range(streams)]
        for slots in (0, SLOTS):
            limit = f"{slots} at once" if slots else "no limit"
            plan.say(f"fanin: {streams} streams catch up on {lines:,} lines, {limit}")
            with Worker() as worker:
                worker.call(followers.warm_up, places[0])
                before = memory(worker.pid)
                forget_peak(worker.pid)
                seconds = worker.call(followers.follow, places, slots, patience=PATIENCE)
                each = (peak_memory(worker.pid) - before) / streams / 1024
                total += worker.call(followers.collect, lines).tally
            key = "fanin.saturated_memory" if slots else "fanin.unlimited_memory"
            figures.append(figure(key, each, "KiB", text=f"memory of each saturated stream, {limit}"))
            rate = streams * lines / seconds
            figures.append(figure(f"{key}_rate", rate, "events/s", text=f"{streams} streams catching up, {limit}"))
    return figures, total
