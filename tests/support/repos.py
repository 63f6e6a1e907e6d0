"""A repo with the artifacts of one loop, written as the runtime writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LOOP = "demo"
MOMENT = "2026-01-02T03:04:05Z"
STANDIN = Path(__file__).parents[1] / "standin" / "superloop"

Json = dict[str, Any]


def event(name: str = "iteration_start", **members: Any) -> Json:
    """A raw event; each member can be given another value."""
    return {"timestamp": MOMENT, "event": name, "loop_id": LOOP, "run_id": "run-1", "iteration": 1, **members}


def line(document: Any) -> bytes:
    """A document as one line of a log."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def lines(document: Any) -> bytes:
    """A document pretty-printed over several lines of a log."""
    return json.dumps(document, indent=2).encode() + b"\n"


class LoopFiles:
    """The artifacts of one loop in a repo of its own; at first there is an empty log and nothing else."""

    def __init__(self, repo: Path) -> None:
        self.repo = repo
        self.runtime = repo / ".superloop"
        self.folder = self.runtime / "loops" / LOOP
        self.log = self.folder / "events.jsonl"
        self.run_summary = self.folder / "run-summary.json"
        self.approval = self.folder / "approval.json"
        self.heartbeat = self.folder / "heartbeat.v1.json"
        self.state = self.runtime / "state.json"
        self.active_run = self.runtime / "active-run.json"
        self.folder.mkdir(parents=True)
        self.log.touch()

    def append(self, *texts: bytes) -> None:
        """Adds to the log, each text in a write of its own."""
        with self.log.open("ab", buffering=0) as log:
            for text in texts:
                log.write(text)

    def rewrite(self, content: bytes) -> None:
        """Truncates the log and writes it anew: the same file."""
        self.log.write_bytes(content)

    def replace(self, content: bytes) -> None:
        """Puts another file in the log's place."""
        draft = self.log.with_suffix(".draft")
        draft.write_bytes(content)
        draft.replace(self.log)

    def truncate(self, size: int) -> None:
        """Cuts the log off."""
        os.truncate(self.log, size)

    def summarize(self, *entries: Any, **members: Any) -> None:
        """Writes the run summary with these entries."""
        put(self.run_summary, {"version": 1, "loop_id": LOOP, "updated_at": MOMENT, "entries": entries, **members})

    def ask_approval(self, **members: Any) -> None:
        """Writes a pending approval request; each member can be given another value."""
        put(self.approval, {"status": "pending", "loop_id": LOOP, "run_id": "run-1", "iteration": 1, **members})


def put(path: Path, document: Any) -> None:
    """Writes a document, given as a value or as its bytes."""
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode() + b"\n")
