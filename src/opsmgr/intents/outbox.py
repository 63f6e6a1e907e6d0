"""The outbox: a row for each intent that was or will be sent, on disk before the first send.

A manager that dies, or hears no answer, does not have to remember which key it used and what it
asked for: whoever looks next finds the row, and asks by its key instead of sending anew.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

from opsmgr import store as files
from opsmgr.errors import InputInvalid
from sprite_agent.contract import clock
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from pathlib import Path

    from opsmgr.store import LoopStore
    from opsmgr.transport.base import TransportName
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult

State = Literal["pending", "unknown", "done", "refused"]
"""pending: about to be sent, or being worked on. unknown: no answer came. done: it has a result. refused: nothing was
run."""

KEPT = timedelta(days=7)
"""How long a settled row is kept. What became of a done one can still be asked of the agent after that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One key, what was asked with it, and how far that has got."""

    request: ControlRequest
    """The whole of it, as it was first sent: the same key is never sent with another one."""
    transport: TransportName
    address: str | None
    """Of the agent; None: none was named."""
    state: State = "pending"
    attempts: int = 0
    """Sends begun so far, each of which a transport may have tried several times."""
    created_at: str
    updated_at: str
    result: ControlResult | None = None
    error: dict[str, str] | None = None
    """Reason and message of the last send that brought no result."""

    @property
    def key(self) -> str:
        """The idempotency key."""
        return self.request["idempotencyKey"]

    def is_forgotten(self) -> bool:
        """Whether it is so old that an agent which does not know its key may have known it."""
        return datetime.fromisoformat(self.created_at) < datetime.now(UTC) - KEPT

    @property
    def settled(self) -> bool:
        """Whether it is known what became of it."""
        return self.state in ("done", "refused")


class Outbox:
    """The rows of one loop, a file each. Holds nothing: any number of managers may use it."""

    def __init__(self, store: LoopStore) -> None:
        self._folder = store.folder / "outbox"

    def load(self, key: str) -> Row | None:
        """The row of a key; None: there is none.

        Raises:
            InputInvalid: it can't be read, or is no row.
        """
        path = self._path(key)
        document = files.load(path)
        return None if document is None else _row(document, path)

    def save(self, row: Row) -> Row:
        """Writes a row; it is on disk when this returns. Gives it as it was written.

        One that is done stays so, whatever a manager that knows less makes of it.

        Raises:
            InputInvalid: it can't be written.
        """
        known = _readable(self._path(row.key))
        if known is not None and known.state == "done" and row.state != "done":
            return known
        row = replace(row, updated_at=clock.now())
        document = _document(row)
        validate("manager_outbox", document)
        files.save(self._path(row.key), document)
        return row

    def save_attempt(self, row: Row) -> Row:
        """Counts one more send, beside those of another manager that has begun with the key meanwhile; see `save`."""
        known = _readable(self._path(row.key))
        others = 0 if known is None or known.state == "refused" else known.attempts
        return self.save(replace(row, state="pending", attempts=max(row.attempts, others) + 1))

    def unsettled(self) -> list[Row]:
        """The rows of which it is not known what became of them, oldest first; what can't be read is passed over."""
        return sorted(
            (row for path in self._files() if (row := _readable(path)) is not None and not row.settled),
            key=lambda row: (row.created_at, row.key),
        )

    def prune(self) -> None:
        """Forgets settled rows after `KEPT`, and no others."""
        until = datetime.now(UTC) - KEPT
        for path in self._files():
            row = _readable(path)
            if row is not None and row.settled and datetime.fromisoformat(row.updated_at) < until:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[!.]*.json"))

    def _path(self, key: str) -> Path:
        # A key may differ from another in case only, or be "..": its digest is a name everywhere.
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _document(row: Row) -> dict[str, Any]:
    return {
        "schemaVersion": "v1",
        "key": row.key,
        "loopId": row.request["loopId"],
        "request": row.request,
        "transport": row.transport,
        "address": row.address,
        "state": row.state,
        "createdAt": row.created_at,
        "updatedAt": row.updated_at,
        "attempts": row.attempts,
        "result": row.result,
        "error": row.error,
    }


def _row(document: dict[str, Any], path: Path) -> Row:
    try:
        validate("manager_outbox", document)
        validate("control_request", document["request"])
        if document["result"] is not None:
            validate("control_result", document["result"])
    except ContractError as error:
        raise InputInvalid(f"{path} is no row of the outbox: {error}") from error
    return Row(
        request=cast("ControlRequest", document["request"]),
        transport=document["transport"],
        address=document["address"],
        state=document["state"],
        attempts=document["attempts"],
        created_at=document["createdAt"],
        updated_at=document["updatedAt"],
        result=document["result"],
        error=document["error"],
    )


def _readable(path: Path) -> Row | None:
    try:
        document = files.load(path)
        return None if document is None else _row(document, path)
    except InputInvalid:
        return None
