"""The command line of opsmgr."""

from __future__ import annotations

import gc
import os

import click

from opsmgr import __version__
from opsmgr.cli import (
    act,
    completion,
    config,
    cursor,
    doctor,
    escalations,
    loops,
    observe,
    reconcile,
    run,
    status,
    validate,
)
from opsmgr.cli.output import EXIT_USAGE

OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""An event is nine objects without a cycle: looking for cycles after every 700 takes a third of a replay's time."""

click.UsageError.exit_code = EXIT_USAGE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="opsmgr")
def main() -> None:
    """Sees, follows and controls Superloop runs, here or in a Sprite.

    Exit codes: 0 done, 1 failed or refused, 2 ambiguous (control, confirm), 3 no answer, 64 called wrongly.
    """
    # Before gRPC is imported: it writes lines of its own on stderr, where a failure is one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)


for command in (
    observe.snapshot,
    observe.events,
    observe.watch,
    reconcile.project,
    reconcile.reconcile,
    act.control,
    act.approve,
    act.reject,
    act.cancel,
    act.confirm,
    act.unfreeze,
    run.run,
    status.status,
    doctor.doctor,
    loops.loops,
    escalations.escalations,
    cursor.cursor,
    validate.validate,
    config.config,
    completion.completion,
):
    main.add_command(command)
