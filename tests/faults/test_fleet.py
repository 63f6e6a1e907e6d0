"""A fleet under one daemon: whatever befalls some agents, nothing is lost or doubled, and the others raise no alarm."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from support.figures import found, scaled
from support.fleet import Daemon, FleetAgent, Writer, serving
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.fleet import Loop

pytestmark = pytest.mark.alone

AGENTS = 12
LOOPS = 17
"""Of each agent."""
STREAMS = 8
"""What the third agent gives a caller while it is short of them: too few for its loops."""
FROZEN, TURN = 7, 10
"""Out of each 10 faults in a row, the second agent is frozen for 7: so long that reads of it are given up."""
SETTINGS = {"poll_seconds": 2.0, "settle_seconds": 2.0, "reproject_seconds": 4.0}
CONVERGED = 60.0
"""Seconds until everything that was written is handled, once the agents are well again."""


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[FleetAgent]]:
    """The first four are to suffer."""
    made = [FleetAgent(tmp_path / f"agent-{number:02}", loops=LOOPS) for number in range(AGENTS)]
    with serving(made):
        yield made


@pytest.fixture
def daemon(tmp_path: Path, agents: list[FleetAgent]) -> Iterator[Daemon]:
    """It supervises them all."""
    made = Daemon(tmp_path, agents, **SETTINGS)
    yield made
    made.end()


@pytest.mark.timeout(600)
def test_what_befalls_some_agents_loses_nothing_doubles_nothing_and_alarms_for_no_other(
    agents: list[FleetAgent], daemon: Daemon
) -> None:
    loops = [loop for agent in agents for loop in agent.loops]
    suffering, well = loops[: 4 * LOOPS], loops[4 * LOOPS :]
    until(lambda: all_is_well(daemon, loops), "every loop is followed", deadline=CONVERGED)
    with Writer(loops, rounds=scaled(55, 600), pause=0.5) as writer:
        seen, befallen = suffer(agents[:4], writer, daemon)
    began = time.monotonic()
    behind = list(loops)

    def all_covered() -> bool:
        behind[:] = [loop for loop in behind if not loop.is_covered()]
        return not behind

    until(all_covered, "all that was written is handled", deadline=CONVERGED)
    converged = time.monotonic() - began
    until(lambda: all_is_well(daemon, loops), "every loop is followed again", deadline=CONVERGED)
    usage = daemon.usage()
    assert daemon.drain() == 0, daemon.text

    for loop in loops:
        assert loop.handled() == [*range(1, loop.lines + 1)], loop.name
        assert sum(record["eventsIngested"] for record in loop.passes()) == loop.lines
    for loop in well:
        assert seen[loop.name] == {("connected", "healthy")}
        assert {(record["status"], record["healthStatus"]) for record in loop.passes()} == {("success", "healthy")}
        assert loop.escalations() == []
    for loop in suffering:
        assert set(loop.escalations()) <= {"health_degraded", "health_critical"}
    for agent in agents[:4]:
        assert any(seen[loop.name] != {("connected", "healthy")} for loop in agent.loops), (
            f"{agent.name} did not suffer"
        )
    events = sum(loop.lines for loop in loops)
    found(
        "fleet",
        f"{len(loops)} loops on {AGENTS} agents, {events} events, {befallen} faults and a frozen agent among"
        f" {len(suffering)} of the loops: 0 lost, 0 doubled, 0 alarms for the others, current {converged:.0f} s after"
        f" the last write; the manager took {usage.peak_mib:.0f} MiB and {usage.cpu_seconds:.0f} s of a core",
    )


def suffer(agents: list[FleetAgent], writer: Writer, daemon: Daemon) -> tuple[dict[str, set[tuple[str, str]]], int]:
    """Kills, freezes, limits and restarts until the writer has ended, and has all serve again.

    How each target was seen meanwhile, by reach and health, and how often something befell an agent.
    """
    killed, frozen, limited, restarted = agents

    def limit() -> None:
        limited.kill()
        limited.start("--max-streams-per-caller", str(STREAMS))

    def give() -> None:
        limited.kill()
        limited.start()

    steps = itertools.cycle([(killed.kill, killed.start), (limit, give), (restarted.drain, restarted.start)])
    seen: dict[str, set[tuple[str, str]]] = {}
    ended = False
    befallen = 0
    while not ended:
        if befallen % TURN == 0:
            frozen.freeze()
        befall, heal = next(steps)
        befall()
        ended = look_on(writer, daemon, seen, seconds=3.0)
        heal()
        ended = ended or look_on(writer, daemon, seen, seconds=1.0)
        befallen += 1
        if befallen % TURN == FROZEN:
            frozen.thaw()
    frozen.thaw()
    return seen, befallen


def look_on(writer: Writer, daemon: Daemon, seen: dict[str, set[tuple[str, str]]], *, seconds: float) -> bool:
    """Notes how the targets are for some seconds, or until the writer has ended; whether it has."""
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        for name, row in daemon.rows().items():
            seen.setdefault(name, set()).add((row["reach"], row["health"]))
        if writer.has_ended(within=0.25):
            return True
    return False


def all_is_well(daemon: Daemon, loops: list[Loop]) -> bool:
    """Whether the daemon follows every loop by a stream, and finds it healthy."""
    rows = daemon.rows()
    return len(rows) == len(loops) and all(
        (row["rung"], row["reach"], row["health"]) == ("stream", "connected", "healthy") for row in rows.values()
    )
