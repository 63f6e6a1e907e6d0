"""Commands that look: snapshot, events, watch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opsmgr.cli.output import for_people, in_color, note, print_json, printable, reported
from opsmgr.cli.progress import counted, progress
from opsmgr.cli.target import target_options
from opsmgr.cli.targets import targets_options

if TYPE_CHECKING:
    from opsmgr.config import Config
    from opsmgr.targets import Target
    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.errors import OpsError

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
    import asyncio

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
    import asyncio

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
            async with contextlib.aclosing(subscribe(counted(transport, line), query)) as batches:
                async for batch in batches:
                    for event in batch.events:
                        print_json(event, pretty=pretty)
                    at.save_after(batch, repo_path)

    with reported(json=json, trace_id=trace_id), progress(prints=True) as line:
        asyncio.run(run())


@click.command()
@targets_options
@_CURSOR
@_FROM_START
@_MAX_EVENTS
@_TRACE
@_JSON
def watch(
    *,
    targets: list[Target],
    config: Config | None,
    cursor_file: Path | None,
    from_start: bool,
    max_events: int,
    trace_id: str | None,
    json: bool,
) -> None:
    """Follows the events of one loop or of several as they happen, until interrupted.

    Starts from now, from the cursor file, or from the first line. Connections that break are made anew and nothing is
    lost or repeated. Readable lines on a terminal, JSON envelopes otherwise; remarks go to stderr.
    """
    import asyncio

    del config
    if cursor_file is not None and len(targets) > 1:
        raise click.UsageError("--cursor-file is of one loop")
    watching = _Watching(
        cursor_file=cursor_file,
        from_start=from_start,
        max_events=max_events,
        trace_id=trace_id,
        people=for_people(json=json),
        names=len(targets) > 1,
    )
    with reported(json=json, trace_id=trace_id):
        asyncio.run(watching.all(targets) if watching.names else watching.one(targets[0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Watching:
    """How loops are watched."""

    cursor_file: Path | None
    from_start: bool
    max_events: int
    trace_id: str | None
    people: bool
    """Readable lines, no JSON."""
    names: bool
    """Whether lines have to say which loop they are of."""

    async def one(self, target: Target) -> None:
        """Watches a loop.

        Raises:
            OpsError: it can't be watched.
        """
        from opsmgr.cursors import CursorFile
        from opsmgr.watch import follow

        def tell(remark: str) -> None:
            note(f"{target.name}: {remark}" if self.names else remark)

        at = CursorFile(self.cursor_file, target.loop, from_start=self.from_start)
        start = at.position if self.from_start or at.is_begun else None
        with progress(prints=True) as line:
            async with target.connected() as transport:
                repo_path = (await transport.info()).repo_path if self.cursor_file else ""
                replayed = counted(transport, line) if self.from_start and not self.names else transport
                followed = follow(
                    replayed,
                    target.loop,
                    start=start,
                    tell=tell,
                    max_events=self.max_events,
                    trace_id=self.trace_id,
                    begun=at.begin,
                )
                async with contextlib.aclosing(followed):
                    async for batch in followed:
                        for event in batch.events:
                            if self.people:
                                click.echo(_readable(event, target.name if self.names else None))
                            else:
                                print_json(event)
                        for record in batch.skipped:
                            tell(
                                f"line {record.first_line} of the log is malformed and was passed over: {record.reason}"
                            )
                        at.save_after(batch, repo_path)

    async def all(self, targets: list[Target]) -> None:
        """Watches several loops, each on its own.

        Raises:
            OpsError: one can't be watched, and the others have ended.
        """
        import asyncio

        failures = [found for found in await asyncio.gather(*map(self._unless_failed, targets)) if found is not None]
        if failures:
            raise failures[0]

    async def _unless_failed(self, target: Target) -> OpsError | None:
        from sprite_agent.errors import OpsError

        try:
            await self.one(target)
        except OpsError as error:  # the others go on
            note(f"{target.name}: {error.message} [{error.reason}]")
            return error
        return None


def _readable(envelope: EventEnvelope, name: str | None) -> str:
    """An event in one line for people; `name` where there are several loops."""
    event, run = envelope["event"], envelope["run"]
    who = f" {event['role']}" if event["role"] else ""
    how = f" {event['status']}" if event["status"] else ""
    text = f"  {event['message']}" if event["message"] else ""
    where = f"{name}  " if name else ""
    line = f"{event['timestamp']}  {where}#{envelope['cursor']['eventLineOffset']:<6} {run['iteration']:>3}  "
    line += f"{event['name']}{who}{how}{text}"
    color = _color(envelope)
    return click.style(printable(line), fg=color) if color and in_color() else printable(line)


def _color(envelope: EventEnvelope) -> str | None:
    """What stands out on a terminal: what went wrong, what waits, what is done."""
    event = envelope["event"]
    if event["status"] in {"error", "timeout", "blocked", "rate_limited"}:
        return "red"
    return {"approval_requested": "cyan", "loop_complete": "green", "loop_stop": "yellow"}.get(event["name"])
