"""The command that names the broken layer: doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from opsmgr.cli.output import EXIT_FAILED, EXIT_NO_ANSWER, for_people, print_json, printable, reported
from opsmgr.cli.target import target_options

if TYPE_CHECKING:
    from opsmgr.doctor import Check
    from opsmgr.targets import Target

_UNREACHED = {"address", "connect", "tls", "http2"}


@click.command()
@target_options
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def doctor(*, target: Target, json: bool) -> None:
    """Looks at each layer between here and a loop, and names the one that is broken. Changes nothing.

    Exits with 0 when all are well, 1 when one is broken, 3 when it is one on the way to the agent.
    """
    import asyncio

    people = for_people(json=json)

    async def run() -> list[Check]:
        from opsmgr.doctor import diagnose

        found = []
        async for check in diagnose(target):
            found.append(check)
            if people:
                click.echo(printable(_line(check)))
        return found

    with reported(json=json):
        checks = asyncio.run(run())
        broken = next((check for check in checks if check.status == "failed"), None)
        if people:
            click.echo(printable(f"broken: {broken.layer}: {broken.detail}" if broken else "all is well"))
        else:
            print_json({"ok": broken is None, "broken": broken and broken.layer, "checks": [asdict(c) for c in checks]})
        if broken is not None:
            sys.exit(EXIT_NO_ANSWER if broken.layer in _UNREACHED else EXIT_FAILED)


def _line(check: Check) -> str:
    advice = f"; {check.advice}" if check.advice else ""
    return f"{check.status:<7}  {check.layer:<9}  {check.detail}{advice}"
