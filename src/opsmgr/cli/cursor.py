"""Commands on a loop's cursor: cursor show, cursor set, cursor reset."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opsmgr.cli.output import for_people, print_json, reported
from opsmgr.cli.target import target_options

if TYPE_CHECKING:
    from opsmgr.store import LoopStore
    from opsmgr.targets import Target
    from sprite_agent.contract.envelopes import SnapshotEnvelope

_CURSOR = click.option(
    "--cursor-file", type=click.Path(path_type=Path), help="The cursor. [default: cursor.json of the loop]"
)
_YES = click.option("--yes", is_flag=True, help="Do not ask, on a terminal.")
_JSON = click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")


@click.group()
def cursor() -> None:
    """Looks at a loop's cursor, or moves it: how far its log has been handled."""


@cursor.command()
@target_options
@_CURSOR
@_JSON
def show(*, target: Target, cursor_file: Path | None, json: bool) -> None:
    """Says how far the log has been handled. Reaches for no agent."""
    with reported(json=json):
        _show(target, cursor_file, json=json)


@cursor.command("set")
@target_options
@_CURSOR
@click.option("--line", type=click.IntRange(min=0), required=True, help="The last line that counts as handled.")
@_YES
@_JSON
def set_(*, target: Target, cursor_file: Path | None, line: int, yes: bool, json: bool) -> None:
    """Moves the cursor to a line, which must be one of the log. What is before it counts as handled."""
    import asyncio

    async def look() -> SnapshotEnvelope:
        async with target.connected() as transport:
            return (await transport.snapshot(target.loop)).envelope

    with reported(json=json):
        from opsmgr.cursors import Position, save_cursor
        from opsmgr.errors import InputInvalid

        now = asyncio.run(look())
        count = now["cursor"]["eventLineCount"]
        if line > count:
            raise InputInvalid(f"the log has {count} lines; the cursor can't be at line {line}")
        store = target.store()
        path = cursor_file or store.cursor
        _ask(target, path, line, yes=yes)
        with store.locked():
            position = Position(line=line, line_count=count)
            save_cursor(path, position, repo_path=now["source"]["repoPath"], loop_id=target.loop)
            if path == store.cursor:
                _forget_order_after(store, line)
        _show(target, cursor_file, json=json)


@cursor.command()
@target_options
@_CURSOR
@_YES
@_JSON
def reset(*, target: Target, cursor_file: Path | None, yes: bool, json: bool) -> None:
    """Moves the cursor to the start: the whole log is handled again. Reaches for no agent."""
    with reported(json=json):
        store = target.store()
        path = cursor_file or store.cursor
        _ask(target, path, 0, yes=yes)
        with store.locked():
            path.unlink(missing_ok=True)
            if path == store.cursor:
                _forget_order_after(store, 0)
        _show(target, cursor_file, json=json)


def _forget_order_after(store: LoopStore, line: int) -> None:
    """Has the ordering checks expect the events after a line once more: seen again they are no regression."""
    from opsmgr.store import load, save

    memory = load(store.sequence)
    if memory is not None and memory.get("lastEventSequence") is not None:
        save(store.sequence, {**memory, "lastEventSequence": line or None})


def _show(target: Target, cursor_file: Path | None, *, json: bool) -> None:
    from opsmgr.cursors import load_cursor

    path = cursor_file or target.store().cursor
    position = load_cursor(path, target.loop)
    document = {
        "path": str(path),
        "exists": path.exists(),
        "eventLineOffset": position.line,
        "eventLineCount": position.line_count,
        "hasResumeToken": position.resume_token is not None,
    }
    if not for_people(json=json):
        print_json(document)
    elif not document["exists"]:
        click.echo(f"{path} is not there: the log is handled from its first line")
    else:
        bound = "bound to the log by a token" if position.resume_token else "a line only"
        click.echo(f"line {position.line} of {position.line_count}, {bound}  {path}")


def _ask(target: Target, path: Path, line: int, *, yes: bool) -> None:
    """Returns if it may be done; on a terminal somebody is asked."""
    from opsmgr.cursors import load_cursor
    from opsmgr.errors import InputInvalid

    if yes or not sys.stdin.isatty():
        return
    try:
        now = f"line {load_cursor(path, target.loop).line}"
    except InputInvalid:
        now = "where it can't be read"
    click.confirm(f"Move the cursor from {now} to line {line}", abort=True, err=True)
