"""snapshot: GetSnapshot and a resume on a long log, against a short one and against a call that does nothing."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tools.bench import calls, floors
from tools.bench.logs import add_loop
from tools.bench.plan import Sized
from tools.bench.processes import Agent, Worker
from tools.bench.results import Result, Series, figure
from tools.bench.rounds import interleaved
from tools.bench.spreads import noise, quantile, ratios, spread

if TYPE_CHECKING:
    from tools.bench.plan import Plan

SHORT = 100
"""Lines, as the next."""
LONG = Sized(full=1_000_000, gate=100_000, quick=2_000)
CALLS = Sized(full=50, gate=30, quick=5)
"""Of each kind in a round."""
NAMES = {
    "short": "GetSnapshot at 100 lines",
    "long": "GetSnapshot on the long log",
    "noop": "no-op unary, back to back",
    "by line": "resume before the last line, by line, to its first event",
    "by token": "resume before the last line, by token, to its first event",
}


def run(plan: Plan) -> Result:
    """All calls by raw stubs, in random order; each round gives the median of each."""
    short, long = (plan.logs.log("small", lines) for lines in (SHORT, plan.sized(LONG)))
    repo = plan.folder / "snapshot"
    add_loop(repo, "short", short)
    add_loop(repo, "long", long)
    chance = random.Random(f"{plan.seed} calls")  # noqa: S311  # the same order each time
    with Agent(repo) as agent, Worker() as worker, floors.floor() as floor:
        token = worker.call(calls.token_after, agent.server, "long", long.lines - 1)

        def one_round() -> dict[str, float]:
            order = [*NAMES, "short again", "noop again"] * plan.sized(CALLS)
            chance.shuffle(order)
            where = long.lines - 1, token
            found = worker.call(calls.reads, agent.server, floor, ("short", "long"), where, order)
            return {name: quantile(times, 0.5) for name, times in found.items()}

        rounds = interleaved(plan, "snapshot", {"calls": one_round}, plan.rounds * 2)["calls"]
    medians = {name: [found[name] for found in rounds] for name in rounds[0]}
    snapshot_noise = noise(medians["short again"], medians["short"])
    noop_noise = noise(medians["noop again"], medians["noop"])
    to_noop = {name: ratios(medians[name], medians["noop"]) for name in ("long", "by line", "by token")}
    return Result(
        figures=(
            figure("snapshot.growth", ratios(medians["long"], medians["short"]), noise=snapshot_noise),
            figure("snapshot.to_noop", to_noop["long"], noise=noop_noise),
            figure("snapshot.resume_to_noop", to_noop["by line"], noise=noop_noise),
            figure("snapshot.resume_token_to_noop", to_noop["by token"], noise=noop_noise),
            *(figure(f"snapshot.{name}", medians[name], "ms", text=text) for name, text in NAMES.items()),
            figure(
                "snapshot.a_a", ratios(medians["short again"], medians["short"]), text="GetSnapshot, against itself"
            ),
        ),
        series=(
            Series(
                key="snapshot.growth",
                text="GetSnapshot",
                across="lines in the log",
                unit="ms",
                points=tuple(
                    (float(log.lines), spread(medians[name]).median) for name, log in (("short", short), ("long", long))
                ),
            ),
        ),
        notes={"client": "raw generated stub over one channel, not validated; the floor by a raw call likewise"},
    )
