"""reference: the existing bash and jq adapters, and opsmgr beside them. Runs only where a checkout of them is given.

The version of jq decides the figures: an old one takes 16 ms to start and a newer one 2 ms, and
the adapters start it about eleven times for each event.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.logs import LOOP, add_loop
from tools.bench.plan import Sized
from tools.bench.results import Result, figure
from tools.bench.rounds import interleaved
from tools.bench.spreads import ratios

if TYPE_CHECKING:
    from tools.bench.plan import Plan

EVENTS = Sized(full=20, quick=2)
OPSMGR = str(Path(sys.executable).with_name("opsmgr"))
TIMEOUT = 120.0
"""Seconds for one start of a script."""


class ReferenceMissing(Exception):
    """The adapters can't be run here; the message says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """What the adapters are run with; all of it is there."""

    bash: str
    jq: str
    poll_events: Path
    snapshot: Path


def find(folder: Path, *, poll_events: str, snapshot: str) -> Adapters:
    """The adapters in a checkout; their scripts are named relative to it.

    Raises:
        ReferenceMissing: a script, bash or jq is not there.
    """
    return Adapters(
        bash=_program("bash"),
        jq=_program("jq"),
        poll_events=_script(folder, poll_events),
        snapshot=_script(folder, snapshot),
    )


def run(plan: Plan) -> Result:
    """Times their poll of new events, and their snapshot, in turn with a process of ours that does the same."""
    adapters = plan.adapters
    if adapters is None:
        raise ReferenceMissing("reference needs --reference DIR, a checkout of the existing adapters")
    events = plan.sized(EVENTS)
    repo = plan.folder / "reference"
    add_loop(repo, LOOP, plan.logs.log("small", events))
    where = ["--repo", str(repo), "--loop", LOOP]
    arms = {
        "poll": partial(_milliseconds, [adapters.bash, str(adapters.poll_events), *where, "--from-start"]),
        "snapshot": partial(_milliseconds, [adapters.bash, str(adapters.snapshot), *where]),
        "own poll": partial(_milliseconds, [OPSMGR, "events", *where]),
        "own snapshot": partial(_milliseconds, [OPSMGR, "snapshot", *where]),
    }
    rounds = interleaved(plan, "reference", arms)
    asked = subprocess.run([adapters.jq, "--version"], capture_output=True, text=True, check=True, timeout=10)
    version = asked.stdout.strip()
    per_event = [milliseconds / events for milliseconds in rounds["poll"]]
    return Result(
        figures=(
            figure("reference.poll", per_event, "ms", text=f"reference: poll, per event of {events}, {version}"),
            figure("reference.snapshot", rounds["snapshot"], "ms", text=f"reference: snapshot, {version}"),
            figure(
                "reference.poll_to_own",
                ratios(rounds["poll"], rounds["own poll"]),
                text=f"reference: poll of {events} events / opsmgr events, a process each",
            ),
            figure(
                "reference.snapshot_to_own",
                ratios(rounds["snapshot"], rounds["own snapshot"]),
                text="reference: snapshot / opsmgr snapshot, a process each",
            ),
        ),
        notes={"jq": version},
    )


def _program(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise ReferenceMissing(f"reference needs {program}, which is not on the path")
    return path


def _script(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ReferenceMissing(f"reference: there is no {path}; name the script by an option")
    return path


def _milliseconds(command: list[str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        try:
            _, complaint = script.communicate(timeout=TIMEOUT)
        except BaseException:
            os.killpg(script.pid, signal.SIGKILL)  # with what it has started
            raise
    if script.returncode:
        raise ReferenceMissing(f"reference: {' '.join(command)} ended with {script.returncode}: {complaint.strip()}")
    return (time.perf_counter() - began) * 1e3
