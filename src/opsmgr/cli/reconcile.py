"""Commands that keep the manager's view of a loop: project, reconcile."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import for_people, print_json, printable, reported
from opsmgr.cli.progress import counted, progress
from opsmgr.cli.target import target_options
from opsmgr.cli.threshold_options import threshold_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.passes.thresholds import Thresholds
    from opsmgr.targets import Target

_FILE = click.Path(path_type=Path)


@click.command()
@click.option("--repo", type=_FILE, help="The repo; where --state-file is in it unless given.")
@click.option("--loop", required=True, help="The loop's id.")
@click.option("--snapshot-file", type=_FILE, required=True, help="A snapshot envelope.")
@click.option(
    "--events-file", type=_FILE, required=True, help="The event envelopes of one poll, one a line; may be empty."
)
@click.option(
    "--state-file", type=_FILE, help="The previous state, replaced by the new one. [default: state.json of the loop]"
)
@click.option("--pretty", is_flag=True, help="Indented JSON.")
@click.option("--json", is_flag=True, help="JSON for errors too.")
def project(
    *,
    repo: Path | None,
    loop: str,
    snapshot_file: Path,
    events_file: Path,
    state_file: Path | None,
    pretty: bool,
    json: bool,
) -> None:
    """Projects a snapshot and events into the manager's state; prints and saves it."""
    if state_file is None and repo is None:
        raise click.UsageError("give --state-file, or --repo for the one in it")
    with reported(json=json):
        from opsmgr import store
        from opsmgr.passes import projection
        from sprite_agent.contract.loop_ids import check_loop_id

        check_loop_id(loop)
        manager = store.LoopStore(store.default_folder(repo or Path(), loop))
        target = state_file or manager.state
        snapshot: Any = store.load_document(snapshot_file)
        events: Any = store.load_lines(events_file)
        is_managers = target == manager.state and manager.folder.exists()
        with manager.locked() if is_managers else contextlib.nullcontext():
            state = projection.project(loop, snapshot, events, store.load(target))
            state["evidence"] |= {"snapshotFile": str(snapshot_file), "eventsFile": str(events_file)}
            store.save(target, state)
        print_json(state, pretty=pretty)


@click.command()
@target_options
@threshold_options
@click.option("--from-start", is_flag=True, help="Replay from the first line, whatever the cursor says.")
@click.option("--max-events", type=click.IntRange(min=0), default=0, help="Handle no more events; 0: all.")
@click.option("--trace-id", help="Passed on into envelopes, files and logs.")
@click.option("--run-id", help="Overrides the run id in the snapshot.")
@click.option("--pretty", is_flag=True, help="Indented JSON.")
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def reconcile(
    *,
    target: Target,
    thresholds: Callable[[Thresholds], Thresholds],
    from_start: bool,
    max_events: int,
    trace_id: str | None,
    run_id: str | None,
    pretty: bool,
    json: bool,
) -> None:
    """Brings the manager's files of the loop up to date: state, cursor, health, escalations, telemetry."""
    import asyncio

    async def run() -> dict[str, Any]:
        from opsmgr.passes.reconcile import ReconcileOptions, reconcile

        options = ReconcileOptions(
            loop_id=target.loop,
            trace_id=trace_id,
            run_id=run_id,
            from_start=from_start,
            max_events=max_events,
            thresholds=thresholds(target.thresholds),
        )
        async with target.connected() as transport:
            with progress(prints=False) as line:
                return await reconcile(counted(transport, line), target.store(), options)

    with reported(json=json, trace_id=trace_id):
        state = asyncio.run(run())
        if for_people(json=json):
            click.echo(printable(_summary(state)))
        else:
            print_json(state, pretty=pretty)


def _summary(state: dict[str, Any]) -> str:
    transition, health = state["transition"], state["health"]
    reasons = f" ({', '.join(health['reasonCodes'])})" if health["reasonCodes"] else ""
    return (
        f"{state['source']['loopId']}: {transition['previousState']} -> {transition['currentState']}"
        f" on {transition['triggeringSignal']}, confidence {transition['confidence']};"
        f" line {state['cursor']['eventLineOffset']}; health {health['status']}{reasons}"
    )
