"""`opsmgr`, with a note beside each cursor of the events that it was saved for: their numbers, in order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from opsmgr import cli
from opsmgr.cursors import save_cursor
from opsmgr.passes import reconcile
from opsmgr.passes.projection import project

if TYPE_CHECKING:
    from pathlib import Path

NOTE = "handled"
"""The note's name, in the folder of the manager's files."""

_projected = threading.local()
"""A pass projects and saves in one thread."""


def noting_project(loop_id: str, snapshot: Any, events: Any, previous: Any) -> Any:
    """Projects, and remembers what."""
    _projected.numbers = [event["event"]["payload"]["n"] for event in events]
    return project(loop_id, snapshot, events, previous)


def noting_save(path: Path, *args: Any, **options: Any) -> None:
    """Saves a cursor, and notes what was projected last: it will not be again."""
    save_cursor(path, *args, **options)
    with path.with_name(NOTE).open("a") as note:
        note.writelines(f"{number}\n" for number in _projected.numbers)


if __name__ == "__main__":
    with patch.multiple(reconcile, project=noting_project, save_cursor=noting_save):
        cli.main()
