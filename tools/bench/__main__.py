"""Runs benchmarks and reports what they found, as ratios that can be measured again anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from tools.bench import reference, report
from tools.bench.gates import GATED, gates
from tools.bench.logs import LogStore
from tools.bench.measuring import BENCHMARKS, measure
from tools.bench.plan import Plan, Size

if TYPE_CHECKING:
    from types import FrameType

EXIT_FAILED = 1
EXIT_USAGE = 64


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("what", nargs=-1, metavar="[WHAT]...")
@click.option(
    "--quick",
    "size",
    flag_value=Size.QUICK.value,
    default=Size.FULL.value,
    help="Few and small rounds, to see that everything works. No verdicts.",
)
@click.option(
    "--gate", "size", flag_value=Size.GATE.value, help="What `make check` measures; exits with 1 if a gate is broken."
)
@click.option("--seed", type=int, help="Of logs, orders and gaps. [default: a new one, which is told]")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write everything there as JSON; -: to stdout, with no table."
)
@click.option(
    "--chart", "chart_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the main figures: SVG."
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where to make the folder for logs and state; its disk is what fdatasync is measured on. [default: $TMPDIR]",
)
@click.option(
    "--reference",
    "reference_folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkout of the existing bash and jq adapters, to compare with.",
)
@click.option(
    "--reference-poll", default="scripts/poll-events.sh", show_default=True, help="Its poll, below that folder."
)
@click.option(
    "--reference-snapshot", default="scripts/snapshot.sh", show_default=True, help="Its snapshot, below that folder."
)
def main(
    what: tuple[str, ...],
    *,
    size: str,
    seed: int | None,
    json_file: str | None,
    chart_file: Path | None,
    folder: Path | None,
    reference_folder: Path | None,
    reference_poll: str,
    reference_snapshot: str,
) -> None:
    """Measures opsmgr and its agent; WHAT is one or more of:

    \b
      gen        make the logs of a seed, tell their digests
      micro      microseconds of each step of an event
      replay     a whole log, agent to manager, against raw lines and orjson.loads
      live       append to validated event; 1, 10, 100 followers; a hurried writer; idle
      snapshot   GetSnapshot and resume on a long log, against a no-op call
      control    ExecuteControl against its command and fdatasync; one key 16 times
      fanin      100, 500, 2,000 streams of one manager; memory, delay
      start      start of both programs
      reference  the existing adapters; only with --reference

    Without WHAT: all of them, or with --gate those that have gates. Each verdict is met, missed,
    or not resolved: the target lies where the same code, measured twice, may differ. A gate is
    a target with a margin that noise can't use up; the better quartile of the rounds must keep it.

    Exits with 0 when everything was measured, whatever the verdicts; 1 when a benchmark failed
    (the others' figures are told all the same) or, with --gate, a gate is broken; 64 when it was
    called wrongly. What it started and wrote is gone by then. Killed by SIGKILL, it leaves the
    folder opsmgr-bench-* behind, to be removed by hand; its processes end even so.
    """  # noqa: D301, D415  # \b keeps click from filling the list
    if unknown := [name for name in what if name not in BENCHMARKS]:
        raise click.UsageError(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    _check_writable(json_file, chart_file)
    if "reference" in what and reference_folder is None:
        raise click.UsageError("reference needs --reference DIR")
    adapters = None
    if reference_folder is not None:
        adapters = reference.find(reference_folder, poll_events=reference_poll, snapshot=reference_snapshot)
    if size == Size.GATE and (ungated := [name for name in what if name not in GATED]):
        raise click.UsageError(f"no gates in {', '.join(ungated)}; there are some in {', '.join(GATED)}")
    usual = GATED if size == Size.GATE else [name for name in BENCHMARKS if name != "reference" or reference_folder]
    told = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="opsmgr-bench-", dir=folder) as scratch:
        place = Path(scratch).resolve()
        seed = random.SystemRandom().randrange(10**6) if seed is None else seed
        told.print(f"seed {seed}, in {place}")
        plan = Plan(
            seed=seed,
            size=Size(size),
            folder=place,
            logs=LogStore(place, seed),
            say=lambda text: told.print(text, style="dim", markup=False),
            adapters=adapters,
        )
        found = measure(plan, what or usual)
    if json_file == "-":
        click.echo(json.dumps(report.document(found), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(report.table(found))
        if json_file is not None:
            Path(json_file).write_text(json.dumps(report.document(found), indent=2) + "\n")
    if chart_file is not None:
        from tools.bench import chart  # noqa: PLC0415  # takes a second to load

        chart.draw(found, chart_file)
    if complaints := _complaints(found):
        raise Complaints("\n".join(complaints))


def _check_writable(*files: str | Path | None) -> None:
    """Before anything is measured: afterwards it would be lost."""
    for file in files:
        if file not in (None, "-") and not os.access(Path(str(file)).absolute().parent, os.W_OK):
            raise click.UsageError(f"{file} can't be written: look at its folder")


class Complaints(Exception):
    """The report is out, and not everything in it is as it should be; a line for each."""


def _complaints(found: report.Report) -> list[str]:
    failures = [f"{name} failed: {failure}" for name, failure in found.failures.items()]
    if found.size is not Size.GATE:
        return failures
    judged = [gate for name, result in found.results.items() for gate in gates(name, result)]
    return failures + [f"gate broken: {gate}" for gate in judged if not gate.kept]


def _end(number: int, _frame: FrameType | None) -> Any:
    raise SystemExit(128 + number)


def run(words: list[str] | None = None) -> int:
    """Does what the words say; the exit code."""
    try:
        main.main(words, prog_name="python -m tools.bench", standalone_mode=False)
    except click.ClickException as wrong:
        wrong.show()
        return EXIT_USAGE
    except (reference.ReferenceMissing, Complaints) as failed:
        for line in str(failed).splitlines():
            print(f"bench: {line}", file=sys.stderr)
        return EXIT_FAILED
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, _end)  # so that the processes are ended
    sys.exit(run())
