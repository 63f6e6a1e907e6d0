"""What a Sprite has: its loops, and how each is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import for_people, print_json, printable, reported
from opsmgr.cli.target import loopless_options

if TYPE_CHECKING:
    from opsmgr.targets import Target
    from opsmgr.transport.base import Transport

_COLUMNS = {
    "loopId": "loop",
    "status": "status",
    "runId": "run",
    "iteration": "iteration",
    "hasPendingApproval": "approval",
    "lastEventName": "last event",
    "lastEventAt": "at",
    "error": "why not",
}


@click.command()
@loopless_options
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def loops(*, target: Target, json: bool) -> None:
    """Lists the loops of a repo, here or in a Sprite. One that can't be read is listed with the reason."""
    import asyncio

    async def run() -> dict[str, Any]:
        async with target.connected() as transport:
            info = await transport.info()
            rows = [await _row(transport, loop) for loop in info.loops]
        return {
            "repoPath": info.repo_path,
            "spriteId": info.sprite_id,
            "agentVersion": info.agent_version,
            "loops": rows,
        }

    with reported(json=json):
        found = asyncio.run(run())
        if not for_people(json=json):
            print_json(found)
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for heading in _COLUMNS.values():
            table.add_column(heading, overflow="fold")
        for row in found["loops"]:
            cells = {**row, "hasPendingApproval": "pending" if row["hasPendingApproval"] else None}
            table.add_row(*(Text(printable("" if cells[key] is None else str(cells[key]))) for key in _COLUMNS))
        Console(highlight=False, markup=False, emoji=False).print(table)


async def _row(transport: Transport, loop: str) -> dict[str, Any]:
    from opsmgr.errors import NoAnswer
    from sprite_agent.errors import OpsError

    row: dict[str, Any] = {"loopId": loop, **dict.fromkeys(list(_COLUMNS)[1:])}
    try:
        seen = (await transport.snapshot(loop)).envelope
    except NoAnswer:
        raise
    except OpsError as error:
        return {**row, "error": f"{error.message} [{error.reason}]"}
    return {
        **row,
        "status": seen["run"]["status"],
        "runId": seen["run"]["runId"],
        "iteration": seen["run"]["iteration"],
        "hasPendingApproval": seen["health"]["hasPendingApproval"],
        "lastEventName": seen["health"]["lastEventName"],
        "lastEventAt": seen["health"]["lastEventAt"],
    }
