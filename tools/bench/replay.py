"""replay: a whole log from a real agent to a manager, against the same lines relayed raw and parsed only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tools.bench import floors, readers
from tools.bench.logs import KINDS, add_loop
from tools.bench.plan import Sized
from tools.bench.processes import Agent, Worker, cpu_seconds, peak_memory
from tools.bench.readers import Tally
from tools.bench.results import Result, Series, figure
from tools.bench.rounds import interleaved
from tools.bench.spreads import noise, ratios, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.bench.logs import Kind, Log
    from tools.bench.plan import Plan
    from tools.bench.processes import Server
    from tools.bench.results import Figure

LINES: dict[Kind, Sized[int]] = {
    "small": Sized(full=40_000, gate=20_000, quick=1_000),
    "mix": Sized(full=20_000, gate=10_000, quick=1_000),
}
GROWTH: Sized[tuple[int, ...]] = Sized(full=(1_000, 10_000, 100_000), quick=(100, 1_000))
LONG = Sized(full=1_000_000, gate=200_000, quick=2_000)
GROWTH_ROUNDS = 3
PATIENCE = 300.0
"""Seconds for one replay."""

_NOTHING = Tally()
_PER_LINE = "µs CPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """One pass over a log, by whatever way."""

    rate: float = 0.0
    """Lines a second."""
    agent: float = 0.0
    """Microseconds of CPU per line, as the next."""
    manager: float = 0.0
    tally: Tally = _NOTHING

    @property
    def cpu(self) -> float:
        return self.agent + self.manager


def run(plan: Plan) -> Result:
    """Both kinds against their floors, then how cost and memory grow up to the long log."""
    figures: list[Figure] = []
    total = Tally()
    for kind in KINDS:
        found, tallied = _against_floors(plan, kind)
        figures += found
        total += tallied
    found, series, tallied = _growth(plan)
    total += tallied
    figures += [*found, figure("replay.lost", total.lost), figure("replay.doubled", total.doubled)]
    return Result(figures=tuple(figures), series=(series,))


def _against_floors(plan: Plan, kind: Kind) -> tuple[list[Figure], Tally]:
    log = plan.logs.log(kind, plan.sized(LINES[kind]))
    repo = plan.folder / f"replay-{kind}"
    add_loop(repo, kind, log)
    with Agent(repo) as agent, Worker() as worker, floors.floor() as floor:
        replayed = partial(_replay, agent, worker, kind, log)
        arms: dict[str, Callable[[], _Sample]] = {
            "ours": replayed,
            "again": replayed,
            "relay": partial(_relay, worker, floor, log),
            "loads": lambda: _Sample(manager=floors.parse_all(log.path) / log.lines * 1e6),
        }
        rounds = interleaved(plan, f"replay {kind}", arms)
        peaks = {"agent": peak_memory(agent.pid), "manager": peak_memory(worker.pid)}
    figures = [*_ratios(kind, rounds), *_costs(kind, rounds)]
    figures += [
        figure(f"replay.{kind}.{side}_memory", peak / 1e6, "MB", text=f"replay: peak memory of the {side}, {kind}")
        for side, peak in peaks.items()
    ]
    return figures, sum((sample.tally for sample in (*rounds["ours"], *rounds["again"])), _NOTHING)


def _ratios(kind: Kind, rounds: dict[str, list[_Sample]]) -> list[Figure]:
    """The replay against its floors, and against itself: what a difference must exceed to mean anything."""
    rates = {arm: [sample.rate for sample in found] for arm, found in rounds.items()}
    cpus = {arm: [sample.cpu for sample in found] for arm, found in rounds.items()}
    rate_noise, cpu_noise = noise(rates["again"], rates["ours"]), noise(cpus["again"], cpus["ours"])
    head = f"replay.{kind}"
    return [
        figure(
            f"{head}.cpu_to_loads",
            ratios(cpus["ours"], cpus["loads"]),
            text=f"replay: CPU of both sides / orjson.loads, {kind}",
            noise=cpu_noise,
        ),
        figure(f"{head}.rate_to_relay", ratios(rates["ours"], rates["relay"]), noise=rate_noise),
        figure(f"{head}.rate", rates["ours"], noise=rate_noise),
        figure(f"{head}.a_a_rate", ratios(rates["again"], rates["ours"]), text=f"replay: rate, against itself, {kind}"),
        figure(f"{head}.a_a_cpu", ratios(cpus["again"], cpus["ours"]), text=f"replay: CPU, against itself, {kind}"),
    ]


def _costs(kind: Kind, rounds: dict[str, list[_Sample]]) -> list[Figure]:
    """What each side uses, and what the floors are."""
    head, ours, loads = f"replay.{kind}", rounds["ours"], rounds["loads"]
    relayed = [sample.rate for sample in rounds["relay"]]
    return [
        figure(f"{head}.agent_cpu", [s.agent for s in ours], _PER_LINE, text=f"replay: agent per event, {kind}"),
        figure(f"{head}.manager_cpu", [s.manager for s in ours], _PER_LINE, text=f"replay: manager per event, {kind}"),
        figure(f"{head}.loads_cpu", [s.cpu for s in loads], _PER_LINE, text=f"orjson.loads per line, {kind}"),
        figure(f"{head}.relay_rate", relayed, "lines/s", text=f"raw-line relay, {kind}"),
    ]


def _replay(agent: Agent, worker: Worker, loop: str, log: Log) -> _Sample:
    before = cpu_seconds(agent.pid), cpu_seconds(worker.pid)
    found = worker.call(readers.replay, agent.server, loop, log.lines, patience=PATIENCE)
    used = [
        after - start for after, start in zip((cpu_seconds(agent.pid), cpu_seconds(worker.pid)), before, strict=True)
    ]
    return _Sample(
        rate=log.lines / found.seconds,
        agent=used[0] / log.lines * 1e6,
        manager=used[1] / log.lines * 1e6,
        tally=found.tally,
    )


def _relay(worker: Worker, floor: Server, log: Log) -> _Sample:
    relayed = worker.call(floors.relay_once, floor, log.path)
    if relayed.size != log.size:
        raise RuntimeError(f"the relay gave {relayed.size} of {log.size} bytes")
    return _Sample(rate=log.lines / relayed.seconds)


def _growth(plan: Plan) -> tuple[list[Figure], Series, Tally]:
    """CPU per event by the length of the log; the longest is read while another reader stalls."""
    repo = plan.folder / "replay-growth"
    logs = {f"l{lines}": plan.logs.log("small", lines) for lines in plan.sized(GROWTH)}
    long = plan.logs.log("small", plan.sized(LONG))
    for loop, log in {**logs, "long": long}.items():
        add_loop(repo, loop, log)
    with Agent(repo) as agent, Worker() as worker, Worker() as stalled:
        arms = {loop: partial(_replay, agent, worker, loop, log) for loop, log in logs.items()}
        rounds = interleaved(plan, "replay growth", arms, min(plan.rounds, GROWTH_ROUNDS))
        plan.say(f"replay: {long.lines:,} lines, beside a reader that stalls")
        stalled.call(readers.stall, agent.server, "long")
        last = _replay(agent, worker, "long", long)
        peak = peak_memory(agent.pid)
    points = [
        (float(logs[loop].lines), spread([sample.cpu for sample in found]).median) for loop, found in rounds.items()
    ]
    points.append((float(long.lines), last.cpu))
    series = Series(
        key="replay.growth",
        text="replay: CPU of both sides per event",
        across="lines in the log",
        unit="µs",
        points=tuple(points),
    )
    figures = [
        figure("replay.agent_peak", peak / 1e6),
        figure("replay.long.rate", last.rate, "events/s", text=f"replay: {long.lines:,} lines"),
    ]
    return figures, series, sum((sample.tally for found in rounds.values() for sample in found), last.tally)
