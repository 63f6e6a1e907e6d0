"""How things are: all targets in a table, worst first, or one loop in depth."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import EXIT_FAILED, EXIT_NO_ANSWER, ago, for_people, note, print_json, printable, reported
from opsmgr.cli.targets import targets_options

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from opsmgr.config import Config
    from opsmgr.targets import Target

_COLORS = {"critical": "bold red", "degraded": "yellow", "healthy": "green"}
_PATIENCE = 4.0
"""Seconds until a loop that does not answer counts as out of reach."""
_EVERY = 1.0
"""Seconds between two looks of --watch."""


@click.command()
@targets_options
@click.option("--watch", "watches", is_flag=True, help="Go on looking, on a terminal, until interrupted.")
@click.option("--pretty", is_flag=True, help="Indented JSON.")
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def status(*, targets: list[Target], config: Config | None, watches: bool, pretty: bool, json: bool) -> None:
    """Says how the targets are: all of the config in a table, those in trouble first; one alone in depth.

    The table is what the daemon tells, where one is at work, else what the manager's files say. One loop is looked at
    now; when it can't be reached, its files tell how it was, and the command exits with 3.
    """
    with reported(json=json):
        people = for_people(json=json)
        if len(targets) == 1:
            document = _in_depth(targets[0], config)
            if people:
                _print(_depth_view(document))
            else:
                print_json(document, pretty=pretty)
            sys.exit(_code(document["error"]))
        if not (watches and people):
            document = _overview(targets, config)
            if people:
                _print(_table(document))
            else:
                print_json(document, pretty=pretty)
            return
        from rich.live import Live

        with Live(_table(_overview(targets, config)), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(_EVERY)
                live.update(_table(_overview(targets, config)), refresh=True)


def _code(error: dict[str, str] | None) -> int:
    """The exit code of a look that met with this: an agent that refuses has answered."""
    from opsmgr.errors import NoAnswer, NotReached

    if error is None:
        return 0
    return EXIT_NO_ANSWER if error["reason"] in {NoAnswer.reason, NotReached.reason} else EXIT_FAILED


def _overview(targets: list[Target], config: Config | None) -> dict[str, Any]:
    """The status document of these targets, worst first."""
    from opsmgr import overview
    from opsmgr.config import default_status_file

    status_file = default_status_file() if config is None else config.fleet.status_file
    document = overview.load_daemons(status_file)
    if document is None:
        document = overview.read_status(targets)
    else:
        told = {row["name"]: row for row in document["targets"]}
        document["targets"] = [told.get(target.name) or overview.read_row(target) for target in targets]
    document["targets"] = overview.worst_first(document["targets"])
    return document


def _in_depth(target: Target, config: Config | None) -> dict[str, Any]:
    """Everything that is known of one loop, and what can be read of it now."""
    import asyncio

    from opsmgr import overview
    from opsmgr import store as files
    from opsmgr.intents.outbox import Outbox
    from sprite_agent.errors import OpsError

    store = target.store()
    found: dict[str, Any] = {
        "row": _overview([target], config)["targets"][0],
        "snapshot": None,
        "events": [],
        "error": None,
        "health": files.load_if_readable(store.health),
        "intents": overview.last_records(store.intents, 3),
        "escalations": overview.last_records(store.escalations, 3),
        "unsettled": [row.key for row in Outbox(store).unsettled()],
    }
    try:
        found["snapshot"], found["events"] = asyncio.run(_look_in_time(target))
    except OpsError as error:
        found["error"] = {"reason": error.reason, "message": error.message}
        note(f"{error.message} [{error.reason}]; this is how it was when it was worked on last")
    return found


async def _look_in_time(target: Target) -> tuple[Any, list[Any]]:
    """Likewise, or NoAnswer: who looks at 3 a.m. does not wait for an agent that is silent."""
    import asyncio

    from opsmgr.errors import NoAnswer

    try:
        async with asyncio.timeout(_PATIENCE):
            return await _look(target)
    except TimeoutError as error:
        raise NoAnswer(f"no answer from {target.address or target.repo} within {_PATIENCE:g} s") from error


async def _look(target: Target) -> tuple[Any, list[Any]]:
    """A snapshot, and the last events before it."""
    from opsmgr.transport.retry import RetryPolicy
    from sprite_agent.contract.streaming import EventQuery

    last = 5
    transport = target.connect(policy=RetryPolicy(attempts=2, budget=5.0))
    try:
        snapshot = (await transport.snapshot(target.loop)).envelope
        line = snapshot["cursor"]["eventLineCount"]
        query = EventQuery(loop_id=target.loop, after_line=max(0, line - 4 * last), skip_malformed=True)
        events = [event async for batch in transport.events(query) for event in batch.events]
        return snapshot, events[-last:]
    finally:
        await transport.close()


def _table(document: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    daemon = document["pid"]
    if daemon is None:
        oldest = min((row["updatedAt"] for row in document["targets"] if row["updatedAt"]), default=None)
        told = "the manager's files" + ("" if oldest is None else f", the oldest of them {ago(oldest)}")
    else:
        told = f"the daemon, process {daemon}, {document['updatedAt']}"
    table = Table(caption=f"as told by {told}", caption_justify="left", box=None, pad_edge=False)
    for heading in ("target", "health", "reach", "by", "status", "run", "last event", "line", "why"):
        table.add_column(heading, overflow="fold")
    for row in document["targets"]:
        why = row["frozen"] or (row["error"] or {}).get("message") or ", ".join(row["reasonCodes"])
        waits = " (approval)" if row["hasPendingApproval"] and row["lifecycle"] != "awaiting_approval" else ""
        run = "" if row["runId"] is None else f"{row['runId']} #{row['iteration']}"
        behind = f" (-{row['behindLines']})" if row["behindLines"] else ""
        cells = (
            (row["name"], "bold"),
            (row["health"] or "-", _COLORS.get(row["health"] or "", "")),
            (row["reach"], "red" if row["reach"] == "unreachable" else ""),
            (row["rung"], ""),
            (f"{row['lifecycle'] or '-'}{waits}", "cyan" if row["hasPendingApproval"] else ""),
            (run, ""),
            (f"{row['lastEventName'] or '-'} {row['lastEventAt'] or ''}", ""),
            (f"{row['cursorLine']}{behind}", ""),
            (("frozen: " if row["frozen"] else "") + why, ""),
        )
        table.add_row(*(Text(printable(text), style=style) for text, style in cells))
    return table


def _depth_view(document: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from sprite_agent.contract.json_text import member

    row, snapshot, health = document["row"], document["snapshot"], document["health"]
    facts: dict[str, Any] = {"reach": f"{row['reach']}, by {row['rung']}; {row['transport']} {row['address'] or ''}"}
    if snapshot is not None:
        run, seen = snapshot["run"], snapshot["health"]
        heartbeat = member(snapshot["runtime"], "heartbeat")
        facts |= {
            "status": run["status"],
            "run": f"{run['runId']}, iteration {run['iteration']}",
            "gates": ", ".join(f"{name} {verdict}" for name, verdict in (seen["gates"] or {}).items()) or "-",
            "approval": _pending(snapshot["runtime"]["approval"]),
            "stuck": "-" if seen["stuck"] is None else f"{seen['stuck']['streak']} of {seen['stuck']['threshold']}",
            "heartbeat": _moment(member(heartbeat, "timestamp") or member(heartbeat, "updatedAt")),
            "log": f"{seen['eventCount']} lines, the last {seen['lastEventName']} at {seen['lastEventAt']}",
        }
    else:
        facts |= {
            "status": f"{row['lifecycle'] or '-'} (as it was)",
            "run": f"{row['runId']}, iteration {row['iteration']}",
        }
    reasons = ", ".join(f"{each['code']} ({each['observed']})" for each in member(health, "reasons") or [])
    facts |= {
        "health": f"{member(health, 'status') or '-'}, judged {_moment(member(health, 'updatedAt'))}  {reasons}",
        "cursor": f"line {row['cursorLine']}, {row['behindLines']} behind",
        "control": f"frozen: {row['frozen']}" if row["frozen"] else "not frozen",
    }
    if document["unsettled"]:
        facts["unknown"] = f"what became of {', '.join(document['unsettled'])}: see 'opsmgr control --resume'"
    table = Table(box=None, show_header=False, pad_edge=False, title=row["name"], title_justify="left")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, Text(printable(str(fact))))
    parts: list[RenderableType] = [table]
    lists = {
        "events": [_event(event) for event in document["events"]],
        "intents": [_intent(record) for record in document["intents"]],
        "escalations": [f"{each.get('timestamp')}  {each.get('category')}" for each in document["escalations"]],
    }
    for name, entries in lists.items():
        if entries:
            parts += [Text(f"last {name}", style="dim"), *(Text(f"  {printable(entry)}") for entry in entries)]
    return Group(*parts)


def _event(envelope: Any) -> str:
    event = envelope["event"]
    return f"{event['timestamp']}  #{envelope['cursor']['eventLineOffset']}  {event['name']} {event['message'] or ''}"


def _intent(record: dict[str, Any]) -> str:
    return f"{record.get('timestamp')}  {record.get('intent')} by {record.get('requestedBy')}: {record.get('status')}"


def _pending(approval: Any) -> str:
    from sprite_agent.contract.json_text import member

    if member(approval, "status") is None:
        return "not asked for"
    return f"{member(approval, 'status')}, asked for {_moment(member(approval, 'requested_at'))}"


def _moment(said: Any) -> str:
    return "-" if said is None else f"{ago(said)}, at {said}"


def _print(view: Any) -> None:
    _console().print(view)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)
