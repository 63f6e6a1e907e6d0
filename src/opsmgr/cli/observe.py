"""Commands that look: snapshot, events, watch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opsmgr.cli.output import for_people, note, print_json, printable, reported
from opsmgr.cli.target import target_options

if TYPE_CHECKING:
    from opsmgr.cli.target import Target
    from sprite_agent.contract.envelopes import EventEnvelope

_TRACE = click.option("--trace-id", help="Passed on into envelopes and logs.")
_PRETTY = click.option("--pretty", is_flag=True, help="Indented JSON.")
_JSON = click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
_CURSOR = click.option(
    "--cursor-file", type=click.Path(path_type=Path), help="Where to go on; saved after what it covers."
)
_FROM_START = click.option("--from-start", is_flag=True, help="Start at the first line, whatever the cursor says.")
_MAX_EVENTS = click.option(
    "--max-events", type=click.IntRange(min=0), default=0, help="Stop after so many; 0: no limit."
)


@click.command()
@target_options
@_TRACE
@click.option("--run-id", help="Overrides the run id in the envelope.")
@_PRETTY
@_JSON
def snapshot(*, target: Target, trace_id: str | None, run_id: str | None, pretty: bool, json: bool) -> None:
    """Prints a snapshot of the loop as a JSON envelope."""

    async def run() -> None:
        async with target.connected() as transport:
            found = await transport.snapshot(target.loop, trace_id=trace_id, run_id=run_id)
        print_json(found.envelope, pretty=pretty)

    with reported(json=json, trace_id=trace_id):
        asyncio.run(run())


@click.command()
@target_options
@_CURSOR
@_FROM_START
@_MAX_EVENTS
@_TRACE
@_PRETTY
@_JSON
def events(
    *,
    target: Target,
    cursor_file: Path | None,
    from_start: bool,
    max_events: int,
    trace_id: str | None,
    pretty: bool,
    json: bool,
) -> None:
    """Prints the events after the cursor as JSON envelopes, one a line, and moves the cursor.

    A malformed record ends it with an error; what comes before it is printed, and the cursor covers that.
    """

    async def run() -> None:
        from opsmgr.cursors import CursorFile
        from opsmgr.subscription import subscribe
        from sprite_agent.contract.streaming import EventQuery

        at = CursorFile(cursor_file, target.loop, from_start=from_start)
        query = EventQuery(
            loop_id=target.loop,
            after_line=at.position.line,
            resume_token=at.position.resume_token,
            max_events=max_events,
            trace_id=trace_id,
        )
        async with target.connected() as transport:
            repo_path = (await transport.info()).repo_path
            async for batch in subscribe(transport, query):
                for event in batch.events:
                    print_json(event, pretty=pretty)
                at.save_after(batch, repo_path)

    with reported(json=json, trace_id=trace_id):
        asyncio.run(run())


@click.command()
@target_options
@_CURSOR
@_FROM_START
@_MAX_EVENTS
@_TRACE
@_JSON
def watch(
    *,
    target: Target,
    cursor_file: Path | None,
    from_start: bool,
    max_events: int,
    trace_id: str | None,
    json: bool,
) -> None:
    """Follows the loop's events as they happen, until interrupted.

    Starts from now, from the cursor file, or from the first line. Connections that break are made anew and nothing is
    lost or repeated. Readable lines on a terminal, JSON envelopes otherwise; remarks go to stderr.
    """

    async def run() -> None:
        from opsmgr.cursors import CursorFile
        from opsmgr.watch import follow

        people = for_people(json=json)
        at = CursorFile(cursor_file, target.loop, from_start=from_start)
        start = at.position if from_start or at.is_begun else None
        async with target.connected() as transport:
            repo_path = (await transport.info()).repo_path
            async for batch in follow(
                transport, target.loop, start=start, tell=note, max_events=max_events, trace_id=trace_id
            ):
                for event in batch.events:
                    if people:
                        click.echo(_readable(event))
                    else:
                        print_json(event)
                for record in batch.skipped:
                    note(f"line {record.first_line} of the log is malformed and was passed over: {record.reason}")
                at.save_after(batch, repo_path)

    with reported(json=json, trace_id=trace_id):
        asyncio.run(run())


def _readable(envelope: EventEnvelope) -> str:
    """An event in one line for people."""
    event, run = envelope["event"], envelope["run"]
    who = f" {event['role']}" if event["role"] else ""
    how = f" {event['status']}" if event["status"] else ""
    text = f"  {event['message']}" if event["message"] else ""
    line = f"{event['timestamp']}  #{envelope['cursor']['eventLineOffset']:<6} {run['iteration']:>3}  "
    line += f"{event['name']}{who}{how}{text}"
    return printable(line)
