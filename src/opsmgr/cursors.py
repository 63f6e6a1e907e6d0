"""The cursor file: how far a loop's event log was handled, as a line offset and as a resume token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsmgr import store
from opsmgr.errors import InputInvalid
from sprite_agent.contract import clock
from sprite_agent.contract.validation import validate

if TYPE_CHECKING:
    from pathlib import Path

    from sprite_agent.contract.streaming import EventBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a loop's log was handled to."""

    line: int = 0
    line_count: int = 0
    resume_token: str | None = None
    """Beats the line where there is one: it notices when the log is another one."""

    def after(self, batch: EventBatch) -> Position:
        """The position once `batch` is handled; the line stays that of the last event."""
        line = batch.cursor["eventLineOffset"] if batch.events else self.line
        return Position(line=line, line_count=batch.cursor["eventLineCount"], resume_token=batch.resume_token)


def load_cursor(path: Path, loop_id: str) -> Position:
    """The position in a cursor file; the start of the log where there is none. Missing keys are taken as absent.

    Raises:
        InputInvalid: it can't be read, is of another loop, or its offset is no line.
    """
    document = store.load(path)
    if document is None:
        return Position()
    if document.get("loopId", loop_id) != loop_id:
        raise InputInvalid(f"cursor file {path} is of loop {document['loopId']}, not of {loop_id}")
    token = document.get("resumeToken")
    return Position(
        line=_count(document, "eventLineOffset", path),
        line_count=_count(document, "eventLineCount", path),
        resume_token=token if isinstance(token, str) else None,
    )


def save_cursor(path: Path, position: Position, *, repo_path: str, loop_id: str) -> None:
    """Replaces a cursor file."""
    document = {
        "schemaVersion": "v1",
        "repoPath": repo_path,
        "loopId": loop_id,
        "eventsFile": f".superloop/loops/{loop_id}/events.jsonl",
        "eventLineOffset": position.line,
        "eventLineCount": position.line_count,
        "resumeToken": position.resume_token,
        "updatedAt": clock.now(),
    }
    validate("manager_cursor", document)
    store.save(path, document)


class CursorFile:
    """A cursor file that moves with what was handled; without a path it only counts."""

    def __init__(self, path: Path | None, loop_id: str, *, from_start: bool) -> None:
        """Loads the file, unless told to start at the first line.

        Raises:
            InputInvalid: see `load_cursor`.
        """
        self._path = path
        self._loop_id = loop_id
        self.is_begun = path is not None and path.exists()
        """Whether there was a file to go on from."""
        self.position = Position() if path is None or from_start else load_cursor(path, loop_id)

    def begin(self, position: Position) -> None:
        """Goes on from elsewhere; the file says so with the next batch."""
        self.position = position

    def save_after(self, batch: EventBatch, repo_path: str) -> None:
        """Moves past `batch`, which has been handled."""
        self.position = self.position.after(batch)
        if self._path is not None:
            save_cursor(self._path, self.position, repo_path=repo_path, loop_id=self._loop_id)


def _count(document: dict[str, Any], name: str, path: Path) -> int:
    value = document.get(name)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < 2**63:
        raise InputInvalid(
            f"cursor file {path}: {name} is {value!r}, not a whole number >= 0; reset it or use --from-start"
        )
    return value
