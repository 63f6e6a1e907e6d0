"""Commands for who looks after an agent's journal: print and verify the audit, check the journal, begin another one."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.control.audit import AuditEntry
    from sprite_agent.control.state_folder import StateFolder

EXIT_FAULTY = 1

_PATH = click.Path(path_type=Path)


def _of_a_repo(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--state-dir", type=_PATH, help="The agent's state folder. [default: that of --repo]"),
        click.option("--repo", type=_PATH, required=True, help="The repo the agent serves."),
    ):
        command = option(command)
    return command


@click.command()
@_of_a_repo
@click.option("--verify", is_flag=True, help="Say whether the chain is whole, and where it breaks; print no entries.")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Entries after this number only.")
@click.option("--kind", multiple=True, help="Entries of this kind only: begun, executed, done, released, refused, …")
@click.option("--loop", "loop_id", help="Entries of this loop only.")
@click.option("--key", help="Entries of this idempotency key only.")
@click.option("--json", is_flag=True, help="One JSON object a line, also on a terminal.")
def audit(
    *,
    repo: Path,
    state_dir: Path | None,
    verify: bool,
    after: int,
    kind: tuple[str, ...],
    loop_id: str | None,
    key: str | None,
    json: bool,
) -> None:
    """Prints what was asked of the agent, by whom and how it came out; or verifies that nothing of it was changed.

    Exits with 1 when the chain is broken.
    """
    from sprite_agent.contract import json_text
    from sprite_agent.control.audit import find_break
    from sprite_agent.control.journal_file import read_audit

    path = _folder(repo, state_dir).journal
    with _reported():
        entries = read_audit(path)
        if not path.exists():
            click.echo(f"sprite-agent: there is no journal at {path} yet", err=True)
        broken = find_break(entries)
        if verify:
            _print_verdict(entries, None if broken is None else f"entry {broken.sequence}: {broken.what}", json=json)
        else:
            for entry in entries:
                if entry.sequence > after and _is_asked_for(entry, kind, loop_id, key):
                    for_people = sys.stdout.isatty() and not json
                    click.echo(_line(entry) if for_people else json_text.encode(entry.document))
            if broken is not None:
                click.echo(f"sprite-agent: the chain breaks at entry {broken.sequence}: {broken.what}", err=True)
        sys.exit(EXIT_FAULTY if broken else 0)


@click.group()
def journal() -> None:
    """Looks after the journal that says which idempotency keys were run."""


@journal.command()
@_of_a_repo
@click.option("--json", is_flag=True, help="JSON, also on a terminal.")
def check(*, repo: Path, state_dir: Path | None, json: bool) -> None:
    """Says whether the journal can be trusted. Exits with 1 when not."""
    from sprite_agent.contract import json_text
    from sprite_agent.control.journal_file import find_faults

    path = _folder(repo, state_dir).journal
    with _reported():
        faults = find_faults(path)
        if json or not sys.stdout.isatty():
            click.echo(json_text.encode({"journal": str(path), "exists": path.exists(), "faults": faults}))
        else:
            sound = f"journal {path} is whole" if path.exists() else f"there is no journal at {path} yet"
            click.echo("\n".join(faults) or sound)
        sys.exit(EXIT_FAULTY if faults else 0)


@journal.command()
@_of_a_repo
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset(*, repo: Path, state_dir: Path | None, yes: bool) -> None:
    """Puts the journal aside and begins another one, with another id. No agent may be serving.

    The new one knows no key: a control that was sent before and is sent again will be run again. Managers notice the
    new id and freeze control until an operator has looked into it.
    """
    from sprite_agent.control.journal import Journal
    from sprite_agent.control.journal_file import put_aside

    folder = _folder(repo, state_dir)
    if not yes:
        click.confirm(f"Forget every key in {folder.journal}? The file is kept", abort=True, err=True)
    with _reported(), _nobody_else_in(folder):
        kept = put_aside(folder.journal)
        fresh = Journal(folder)
        click.echo(f"journal {fresh.id} begins" + (f"; the old one is kept as {kept}" if kept else ""))
        fresh.close()


def _folder(repo: Path, state_dir: Path | None) -> StateFolder:
    from sprite_agent.control.state_folder import StateFolder, default_path

    if state_dir is None and not repo.is_dir():  # with --state-dir, the journal of a repo that is gone can be looked at
        raise click.ClickException(f"no folder at {repo}")
    try:
        return StateFolder(state_dir or default_path(repo), repo)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@contextlib.contextmanager
def _nobody_else_in(folder: StateFolder) -> Iterator[None]:
    """Keeps agents and local control out."""
    try:
        with folder.agent_lock(), folder.lane(0):
            yield
    except BlockingIOError as error:
        raise click.ClickException(f"an agent uses {folder.path}: stop it first") from error


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    from sprite_agent.errors import OpsError

    try:
        yield
    except OpsError as error:
        raise click.ClickException(f"{error.message} [{error.reason}]") from error
    except BrokenPipeError:
        raise  # click ends quietly: whoever read has heard enough
    except OSError as error:
        raise click.ClickException(f"output can't be written: {error.strerror}") from error


def _print_verdict(entries: list[AuditEntry], fault: str | None, *, json: bool) -> None:
    from sprite_agent.contract import json_text

    last = entries[-1] if entries else None
    if json or not sys.stdout.isatty():
        head = None if last is None else {"sequence": last.sequence, "hash": last.hash}
        click.echo(json_text.encode({"entries": len(entries), "head": head, "fault": fault}))
    elif fault:
        click.echo(f"the chain is broken at {fault}")
    else:
        click.echo(f"{len(entries)} entries, whole" + (f"; head {last.sequence} {last.hash}" if last else ""))


def _is_asked_for(entry: AuditEntry, kinds: tuple[str, ...], loop_id: str | None, key: str | None) -> bool:
    from sprite_agent.contract.json_text import member

    body = entry.document["body"]
    return (
        (not kinds or entry.kind in kinds)
        and loop_id in (None, member(body, "loopId"))  # a tuple: who changed the body may have put a list there
        and key in (None, member(body, "idempotencyKey"))
    )


def _line(entry: AuditEntry) -> str:
    from sprite_agent.contract.json_text import member

    body = entry.document["body"]
    facts = {
        "loop": member(body, "loopId"),
        "intent": member(body, "intent"),
        "by": member(body, "requestedBy"),
        "from": member(member(body, "caller"), "identity"),
        "key": member(body, "idempotencyKey"),
        "status": member(body, "status"),
        "exit": member(body, "exitCode"),
        "reason": member(body, "reason"),
    }
    told = "  ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    text = f"{entry.sequence:>6}  {entry.at}  {entry.kind:<9} {told}"
    return "".join(char if char.isprintable() else " " for char in text)
