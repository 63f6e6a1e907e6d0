"""The command that prints a shell's completion script: completion."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(*, shell: str) -> None:
    """Prints the script that makes a shell complete opsmgr's words: eval "$(opsmgr completion bash)"."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    from opsmgr.cli import main

    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    click.echo(kind(main, {}, "opsmgr", "_OPSMGR_COMPLETE").source())
