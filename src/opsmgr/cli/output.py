"""What a command prints, and with which code it ends. It imports nothing that is slow to import."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.errors import OpsError

EXIT_FAILED = 1
EXIT_AMBIGUOUS = 2
EXIT_NO_ANSWER = 3
EXIT_USAGE = 64


def print_json(document: Any, *, pretty: bool = False) -> None:
    """One document on one line of stdout, or indented."""
    from sprite_agent.contract import json_text

    text = json_text.encode(document)
    click.echo(json_text.indented(text) if pretty else text)  # bytes: JSON is UTF-8 whatever the terminal speaks


def note(message: str) -> None:
    """One line on stderr, for people."""
    click.echo(f"opsmgr: {printable(message)}", err=True)


def printable(text: str) -> str:
    """`text` in one line and without control characters: some of it may have been written in the sandbox."""
    return "".join(char if char.isprintable() else " " for char in text)


def ago(moment: Any) -> str:
    """How long ago a moment was that the Sprite, or a file, tells; what is none is said to be unknown."""
    from datetime import UTC, datetime

    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(str(moment))).total_seconds()
    except (ValueError, TypeError):  # no moment, or one without a zone
        return "at an unknown moment"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} seconds ago"


def for_people(*, json: bool) -> bool:
    """Whether to print text: on a terminal, unless JSON was asked for."""
    return not json and sys.stdout.isatty()


def in_color() -> bool:
    """Whether text on a terminal may have colors: see no-color.org."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def reported(*, json: bool, trace_id: str | None = None, acts: bool = False) -> Iterator[None]:
    """Ends the command with a message and a code when something in the block fails.

    For a command that acts, an error that does not tell whether it did is no answer.
    """
    from opsmgr.errors import NoAnswer
    from sprite_agent.errors import OpsError

    try:
        yield
    except OpsError as error:
        if json:
            print_json(_writable(error_document(error, trace_id)))
        else:
            note(f"{error.message} [{error.reason}]")
        unknown = isinstance(error, NoAnswer) or (acts and error.executed is None)
        sys.exit(EXIT_NO_ANSWER if unknown else EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read has heard enough; nothing more can be told to them.
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    except OSError as error:
        note(f"output can't be written: {error.strerror}")
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def error_document(error: OpsError, trace_id: str | None) -> dict[str, Any]:
    """The error envelope, as schema/error.schema.json says."""
    return {
        "ok": False,
        "error": {
            "code": error.reason.lower(),
            "reason": error.reason,
            "status": error.status,
            "message": error.message,
            "phase": _phase(error),
            "retryable": error.retryable,
            "retryAfterMs": None if error.retry_after is None else round(error.retry_after * 1000),
            "executed": error.executed,
            "attempts": error.attempts,
            "errorId": error.error_id,
            "traceId": trace_id,
            "details": {**error.details, **({"violations": dict(error.violations)} if error.violations else {})},
        },
    }


def _writable(value: Any) -> Any:
    """`value` with what has no UTF-8 form escaped: a path may have any bytes in it."""
    if isinstance(value, dict):
        return {_writable(name): _writable(item) for name, item in value.items()}
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _phase(error: OpsError) -> str:
    if error.status == "UNAUTHENTICATED":
        return "auth"
    if error.reason == "CONTRACT_VIOLATION":
        return "decode"
    if error.details.get("grpcStatus") == "UNAVAILABLE":
        return "connect"
    return "execute"
