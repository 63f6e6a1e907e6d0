"""Documents against the schema: a verdict each."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from opsmgr.cli.output import EXIT_FAILED, for_people, print_json, printable, reported

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True))
@click.option("--schema", help="What they are, as in schema/. [default: as each says in its envelopeType]")
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def validate(*, files: tuple[Path, ...], schema: str | None, json: bool) -> None:
    """Holds envelopes against the schema: those in FILES, one a line or one a file, or those on stdin.

    Prints a verdict for each; ends with 1 when one is not valid.
    """
    if not files and sys.stdin.isatty():
        raise click.UsageError("give files, or envelopes on stdin")
    with reported(json=json):
        from sprite_agent.contract.validation import schemas

        if schema is not None and schema not in schemas():
            raise click.UsageError(f"there is no schema {schema!r}; there are {', '.join(sorted(schemas()))}")
        people, count, wrong = for_people(json=json), 0, 0
        for path in files or (Path("-"),):
            name = "stdin" if str(path) == "-" else str(path)
            with click.open_file(str(path), "rb") as file:
                for line, content in _documents(file):
                    verdict = {"file": name, "line": line, **_verdict(content, schema)}
                    count += 1
                    wrong += not verdict["ok"]
                    if people:
                        click.echo(printable(_sentence(verdict)))
                    else:
                        print_json(verdict)
        if count == 0:
            raise click.UsageError("there is nothing to read; give files, or envelopes on stdin")
        sys.exit(EXIT_FAILED if wrong else 0)


def _documents(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Line and content of each document: every line is one, unless the first line alone is none."""
    from sprite_agent.contract import json_text
    from sprite_agent.errors import ContractError

    first = file.readline()
    try:
        json_text.parse(first, max_depth=json_text.DOCUMENT_DEPTH)
    except ContractError:
        if first.lstrip()[:1] in {b"{", b"["} and first.rstrip()[-1:] in {b"{", b"[", b","}:
            yield 1, first + file.read()  # one document over several lines
            return
    for line, content in enumerate(itertools.chain([first], file), 1):
        if content.strip():
            yield line, content


def _verdict(content: bytes, schema: str | None) -> dict[str, Any]:
    from sprite_agent.contract import json_text
    from sprite_agent.contract.json_text import member
    from sprite_agent.contract.validation import schemas, violations
    from sprite_agent.errors import ContractError

    kind = schema
    try:
        document = json_text.parse(content.strip(), max_depth=json_text.DOCUMENT_DEPTH)
    except ContractError as error:
        found = [("", f"is not JSON: {error.message}")]
    else:
        named = member(document, "envelopeType")
        kind = schema or (named if isinstance(named, str) and named in schemas() else None)
        found = (
            violations(kind, document)
            if kind is not None
            else [("envelopeType", f"{named!r} is no schema; say what it is by --schema")]
        )
    return {
        "ok": not found,
        "schema": kind,
        "violations": [{"path": path, "message": message} for path, message in found],
    }


def _sentence(verdict: dict[str, Any]) -> str:
    where = f"{verdict['file']}:{verdict['line']}: "
    if verdict["ok"]:
        return f"{where}ok, {verdict['schema']}"
    told = "; ".join(f"{each['path'] or 'the document'}: {each['message']}" for each in verdict["violations"])
    return f"{where}invalid: {told}"
