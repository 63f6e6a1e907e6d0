"""The targets of a fleet at a glance: rows of a status document, of the daemon's or of the files alone, worst first."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from opsmgr import store as files
from opsmgr.agent_memory import load_memory
from opsmgr.cursors import Position, load_cursor
from sprite_agent.contract import clock, json_text
from sprite_agent.contract.json_text import member
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError, OpsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from opsmgr.targets import Target

FRESH_SECONDS = 10.0
"""A status file that is older was left by a daemon that no longer tells."""

Row = dict[str, Any]
"""One target, as schema/manager_status.schema.json says."""


def load_daemons(status_file: Path) -> dict[str, Any] | None:
    """What a daemon tells; None where none does now."""
    document = files.load_if_readable(status_file)
    if document is None:
        return None
    try:
        validate("manager_status", document)
        with contextlib.suppress(PermissionError):  # somebody else's daemon is one all the same
            os.kill(document["pid"], 0)
        age = (datetime.now(UTC) - datetime.fromisoformat(document["updatedAt"])).total_seconds()
    except (ContractError, ProcessLookupError, TypeError, ValueError, OverflowError):
        return None
    return document if abs(age) < FRESH_SECONDS else None


def read_status(targets: Iterable[Target]) -> dict[str, Any]:
    """The status document that the manager's files alone give: how each target was when it was worked on last."""
    document = {
        "schemaVersion": "v1",
        "updatedAt": clock.now(),
        "pid": None,
        "startedAt": None,
        "targets": [read_row(target) for target in targets],
    }
    validate("manager_status", document)
    return document


def read_row(target: Target) -> Row:
    """One target, as the files say."""
    error: OpsError | None = None
    state = health = frozen = None
    position = Position()
    try:
        store = target.store()
        state = files.load(store.state, "manager_state")
        health = files.load(store.health, "manager_health")
        frozen, position = load_memory(store).frozen, load_cursor(store.cursor, target.loop)
    except OpsError as unreadable:
        error = unreadable
    return build_row(
        target,
        state=state,
        health=health,
        frozen=frozen,
        error=error,
        cursor_line=position.line,
        updated_at=member(health, "updatedAt"),
    )


def build_row(
    target: Target,
    *,
    rung: str = "none",
    reach: str = "unknown",
    state: dict[str, Any] | None,
    health: dict[str, Any] | None,
    frozen: str | None,
    error: OpsError | None,
    cursor_line: int,
    behind_lines: int = 0,
    retries: int = 0,
    reconnects: int = 0,
    updated_at: str | None,
) -> Row:
    """A row of what is known of a target."""
    projection, run = member(state, "projection"), member(state, "run")
    return {
        "name": target.name,
        "loopId": target.loop,
        "transport": target.transport,
        "address": target.address,
        "rung": rung,
        "reach": reach,
        "lifecycle": member(projection, "status"),
        "health": member(health, "status"),
        "reasonCodes": member(health, "reasonCodes") or [],
        "runId": member(run, "runId"),
        "iteration": member(run, "iteration"),
        "lastEventAt": member(projection, "lastEventAt"),
        "lastEventName": member(projection, "lastEventName"),
        "hasPendingApproval": member(projection, "hasPendingApproval") is True,
        "cursorLine": cursor_line,
        "behindLines": behind_lines,
        "frozen": frozen,
        "error": None if error is None else {"reason": error.reason, "message": error.message},
        "retries": retries,
        "reconnects": reconnects,
        "updatedAt": updated_at,
    }


_TROUBLES: tuple[Callable[[Row], bool], ...] = (
    lambda row: row["health"] == "critical",
    lambda row: row["frozen"] is not None,
    lambda row: row["reach"] == "unreachable",
    lambda row: row["hasPendingApproval"],
    lambda row: row["health"] == "degraded" or row["error"] is not None,
    lambda row: row["reach"] in {"reconnecting", "starting"},
    lambda row: row["reach"] == "suspended",
)
"""Why somebody should look at a target, the most pressing first."""


def trouble(row: Row) -> int:
    """How much a target wants somebody to look at it; 0: not at all."""
    return next((len(_TROUBLES) - place for place, holds in enumerate(_TROUBLES) if holds(row)), 0)


def worst_first(rows: Iterable[Row]) -> list[Row]:
    """Rows by how much they want to be looked at; those alike by their names."""
    return sorted(rows, key=lambda row: (-trouble(row), row["name"]))


def last_records(path: Path, count: int) -> list[dict[str, Any]]:
    """The last records of a log of ours and of those before it, oldest first; lines that can't be read are left out."""
    found: list[dict[str, Any]] = []
    with files.unrotated(path):
        for log in reversed(files.logs(path)):
            for line in reversed(log.read_bytes().split(b"\n")):
                if len(found) == count:
                    return found[::-1]
                if line.strip():
                    with contextlib.suppress(ContractError):
                        record = json_text.parse(line, max_depth=json_text.DOCUMENT_DEPTH)
                        found += [record] if isinstance(record, dict) else []
    return found[::-1]
