"""A journal as engines use it, and as somebody does who gets at its file."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from typing import TYPE_CHECKING, Any, cast

from sprite_agent.callers import THIS_USER
from sprite_agent.contract.confirmation import Evidence
from sprite_agent.contract.requests import fingerprint
from sprite_agent.control.evidence import Baseline
from sprite_agent.control.journal import Journal, NewRow
from sprite_agent.control.processes import this_boot
from sprite_agent.control.results import executing_result
from sprite_agent.control.state_folder import StateFolder
from support.repos import MOMENT
from support.runtime import request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sprite_agent.callers import Caller
    from sprite_agent.contract.envelopes import ControlRequest
    from sprite_agent.control.journal_rows import Entry

GONE = f"{this_boot()}:{2**22 + 1}:1/00000000"
"""An engine whose process has ended: its pid is above the highest that Linux gives."""

BEFORE = Evidence(
    status="awaiting_approval",
    active=False,
    lines=10,
    last_event="approval_requested",
    last_event_status=None,
    approval_status="pending",
    approval_digest="a" * 64,
    completion_ok=False,
    summary={"iteration": 1},
    observed_at=MOMENT,
)
"""A loop that waits for approval."""


@contextlib.contextmanager
def opened(state: Path) -> Iterator[Journal]:
    """The journal of a state folder, which is made where there is none."""
    folder = StateFolder(state, state.with_name("a repo beside it"))
    folder.make()
    journal = Journal(folder)
    try:
        yield journal
    finally:
        journal.close()


def new_row(
    *,
    owner: str = GONE,
    boot_id: str | None = None,
    execution_id: str | None = None,
    caller: Caller = THIS_USER,
    baseline: dict[str, Any] | None = None,
    **members: Any,
) -> NewRow:
    """The row of a request whose command is about to start; `members` are the request's."""
    document = cast("ControlRequest", request(**members))
    return NewRow(
        request=document,
        fingerprint=fingerprint(document),
        caller=caller,
        baseline=Baseline(evidence=BEFORE, resume_token="").document() if baseline is None else baseline,
        boot_id=this_boot() if boot_id is None else boot_id,
        execution_id=uuid.uuid4().hex[:16] if execution_id is None else execution_id,
        owner=owner,
        result=executing_result(document, ["superloop"]),
    )


def begun(journal: Journal, key: str = "key-1", **members: Any) -> Entry:
    """A new row of a command about to start; `members` as for `new_row`."""
    return journal.begin(new_row(idempotencyKey=key, **members))


def sql(path: Path, statement: str, *values: Any) -> list[Any]:
    """What a statement gives, run by a connection of its own."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, values).fetchall()
