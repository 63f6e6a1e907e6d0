"""Commands for who gives out credentials: make, list and revoke bearer tokens and managers' keys."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sprite_agent.face.credentials import CONTROL, READ, SCOPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DAY = 86_400

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", is_flag=True, help="One JSON object.")
_DAYS = click.option(
    "--days", type=click.IntRange(1, 36_500), help="How long it counts. [default: until it is revoked]"
)
_WHAT_FOR = "What it is good for; once for each."


def _in_files(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--trusted-keys", type=_PATH, help="The agent's file of trusted keys."),
        click.option("--token-file", type=_PATH, help="The agent's token file."),
    ):
        command = option(command)
    return command


@click.group()
def keys() -> None:
    """Makes, lists and revokes what callers prove with who they are.

    An agent notices within a second that its files have changed, and at once when it is sent SIGHUP.
    """


@keys.command()
@click.option("--id", "token_id", required=True, metavar="NAME", help="What logs and limits call its bearer.")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, required=True, help=_WHAT_FOR)
@_DAYS
@click.option("--file", type=_PATH, help="The agent's token file: the line for it is put there, not printed.")
@_JSON
def token(*, token_id: str, scopes: tuple[str, ...], days: int | None, file: Path | None, json: bool) -> None:
    """Makes a bearer token and prints it, this once: an agent knows its digest only.

    Without --file the line for the agent's token file is printed below it.
    """
    from sprite_agent.face.credential_edits import add_token
    from sprite_agent.face.credential_text import check_token_id, token_line
    from sprite_agent.face.credentials import new_token

    try:
        check_token_id(token_id)
    except ValueError as error:
        raise click.UsageError(f"--id {token_id[:80]!r} {error}") from error
    text, made = new_token(token_id, scopes, until=_end(days))
    if file is not None:
        with _reported():
            add_token(file, made)
    with _reported():
        if json:
            named = None if file is None else str(file)
            _print({"id": token_id, "token": text, "line": token_line(made), "file": named})
        else:
            click.echo(text if file is not None else f"{text}\n{token_line(made)}")


@keys.command()
@click.option("--kid", "key_id", required=True, metavar="NAME", help="What the key is called; never reused.")
@click.option("--issuer", required=True, metavar="NAME", help="The manager that signs with it.")
@click.option("--out", type=_PATH, required=True, help="Where its private half goes, mode 600; it is never printed.")
@click.option(
    "--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help=f"{_WHAT_FOR} [default: read, control]"
)
@_DAYS
@click.option("--sprite-id", metavar="NAME", help="The Sprite it is for, where that is one only.")
@click.option("--trusted-keys", type=_PATH, help="The agent's file: the public half is put there, not printed.")
@_JSON
def pair(
    *,
    key_id: str,
    issuer: str,
    out: Path,
    scopes: tuple[str, ...],
    days: int | None,
    sprite_id: str | None,
    trusted_keys: Path | None,
    json: bool,
) -> None:
    """Makes a key for a manager: the private half into --out, the public half for agents to trust.

    Asked again, it leaves what is there and prints the same.
    """
    from sprite_agent.face.credential_edits import WantedKey, add_key
    from sprite_agent.face.credential_text import check_key_names, key_entry

    if sprite_id == "":
        raise click.UsageError("--sprite-id is empty: no Sprite is called so; leave it out for any")
    try:
        check_key_names(key_id, issuer)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    wanted = WantedKey(
        key_id=key_id,
        issuer=issuer,
        audience=sprite_id,
        scopes=frozenset(scopes or (READ, CONTROL)),
        until=_end(days),
    )
    with _reported():
        entry = key_entry(add_key(wanted, private_file=out, trusted_file=trusted_keys))
        if json:
            _print({"key": entry, "out": str(out), "file": None if trusted_keys is None else str(trusted_keys)})
        elif trusted_keys is None:
            _print(entry)
        else:
            click.echo(f"key {key_id} of {issuer}: private half in {out}, public half in {trusted_keys}")


@keys.command("list")
@_in_files
@_JSON
def list_(*, token_file: Path | None, trusted_keys: Path | None, json: bool) -> None:
    """Lists tokens and keys: what they are good for, and how long. The files have no secrets."""
    from sprite_agent.face.credential_edits import read_keys, read_tokens

    _need_one(token_file, trusted_keys)
    with _reported():
        tokens = () if token_file is None else read_tokens(token_file)
        trusted = {} if trusted_keys is None else read_keys(trusted_keys)
    rows = [_row("token", each.id, each, until=each.until) for each in tokens]
    rows += [
        _row("key", each.key_id, each, issuer=each.issuer, begins=each.not_before, until=each.not_after)
        for each in trusted.values()
    ]
    with _reported():
        if json:
            _print({"credentials": rows})
        else:
            click.echo("\n".join(map(_line, rows)) or "none")


@keys.command()
@click.argument("name", metavar="ID")
@_in_files
@_JSON
def revoke(*, name: str, token_file: Path | None, trusted_keys: Path | None, json: bool) -> None:
    """Takes a token or a key out of an agent's files. Exits with 1 when nothing has the id: was it another one?"""
    from sprite_agent.face.credential_edits import read_keys, revoke_key, revoke_token

    _need_one(token_file, trusted_keys)
    gone = []
    with _reported():
        if trusted_keys is not None:
            read_keys(trusted_keys)  # if that fails, nothing was changed
        if token_file is not None and revoke_token(token_file, name):
            gone.append(f"token {name} is no longer in {token_file}")
        if trusted_keys is not None and revoke_key(trusted_keys, name):
            gone.append(f"key {name} is no longer in {trusted_keys}")
    if not gone:
        raise click.ClickException(f"nothing has the id {name[:80]!r}; nothing was changed")
    with _reported():
        if json:
            _print({"revoked": name})
        else:
            click.echo("\n".join(gone))


def _end(days: int | None) -> float | None:
    return None if days is None else float(int(time.time()) + days * DAY)


def _need_one(*files: Path | None) -> None:
    if not any(files):
        raise click.UsageError("give --token-file, --trusted-keys, or both")


def _row(
    kind: str, name: str, found: Any, *, until: float | None, issuer: str | None = None, begins: float | None = None
) -> dict[str, Any]:
    from sprite_agent.face.credential_text import in_order, rfc3339

    return {
        "kind": kind,
        "id": name,
        "issuer": issuer,
        "scopes": in_order(found.scopes),
        "from": None if begins is None else rfc3339(begins),
        "until": None if until is None else rfc3339(until),
        "valid": found.is_valid(time.time()),
    }


def _line(row: dict[str, Any]) -> str:
    whose = f"{row['kind']} {row['id']}" + (f" of {row['issuer']}" if row["issuer"] else "")
    times = [f"{name} {row[name]}" for name in ("from", "until") if row[name]]
    return "  ".join([whose, ",".join(row["scopes"]), *times, *([] if row["valid"] else ["not valid now"])])


def _print(document: dict[str, Any]) -> None:
    from sprite_agent.contract import json_text

    click.echo(json_text.encode(document))


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # click ends quietly: whoever read has heard enough
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(": ".join(filter(None, (error.filename, error.strerror)))) from error
