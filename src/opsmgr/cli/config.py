"""The command that checks a config: config check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opsmgr.cli.output import EXIT_FAILED, for_people, print_json, printable, reported

if TYPE_CHECKING:
    from opsmgr.config import Config
    from opsmgr.targets import Target


@click.group()
def config() -> None:
    """Looks at the config."""


@config.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="The config. [default: $OPSMGR_CONFIG, ./opsmgr.toml, else opsmgr/opsmgr.toml below $XDG_CONFIG_HOME]",
)
@click.option("--json", is_flag=True, help="Print JSON.")
def check(*, config_file: Path | None, json: bool) -> None:
    """Tells all mistakes of a config, or the targets that it has. Nothing is connected."""
    from opsmgr.config import find_config, load_config
    from opsmgr.errors import InputInvalid

    with reported(json=json):
        try:
            found = load_config(find_config(config_file))
            _check_credentials(found)
        except InputInvalid as error:
            if json or "mistakes" not in error.details:
                raise
            for mistake in str(error.details["mistakes"]).splitlines():
                click.echo(printable(mistake), err=True)
            sys.exit(EXIT_FAILED)
        if for_people(json=json):
            _print_table(found)
        else:
            print_json({"path": str(found.path), "targets": [_row(target) for target in found.targets]})


def _check_credentials(found: Config) -> None:
    """Reads what the targets show their agents.

    Raises:
        InputInvalid: some of it can't be used.
    """
    from opsmgr.errors import InputInvalid

    mistakes = []
    for target in found.targets:
        if target.address is not None:
            try:
                target.credentials().read_tls(target.address)
            except InputInvalid as error:
                mistakes.append(f"{found.path}: target {target.name}: {error.message}")
    if mistakes:
        more = f" (and {len(mistakes) - 1} more)" if mistakes[1:] else ""
        raise InputInvalid(f"{mistakes[0]}{more}", details={"mistakes": "\n".join(mistakes)})


def _row(target: Target) -> dict[str, str | None]:
    return {
        "name": target.name,
        "loopId": target.loop,
        "transport": target.transport,
        "address": target.address,
    }


def _print_table(found: Config) -> None:
    rows = [(each.name, each.loop, each.transport, each.address or str(each.repo)) for each in found.targets]
    cells = [("NAME", "LOOP", "TRANSPORT", "WHERE"), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
