"""The runtime as control sees it: the stand-in for its command, scripts in its place, and requests to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.repos import LOOP, STANDIN, put
from support.waiting import DEADLINE

if TYPE_CHECKING:
    import pytest

    from support.repos import Json, LoopFiles

LOOKS_ONCE = {"mode": "wait", "timeoutSeconds": 0}
WAITS = {"mode": "wait", "timeoutSeconds": DEADLINE}
SKIPS = {"mode": "skip"}


def this_python_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the stand-in run by the interpreter of the tests, whatever another `python3` would add to its environment."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


def request(intent: str = "approve", **members: Any) -> Json:
    """A control request that looks once for the effect; each member can be given another value."""
    return {
        "loopId": LOOP,
        "intent": intent,
        "requestedBy": "ada",
        "idempotencyKey": "key-1",
        "confirmation": LOOKS_ONCE,
        **members,
    }


def turn(loop: LoopFiles, **knobs: Any) -> None:
    """Sets the stand-in's knobs; its docstring names them."""
    put(loop.runtime / "standin.json", knobs)


def executions(loop: LoopFiles) -> list[Json]:
    """What the stand-in's approve and cancel have been started with, one for each start."""
    log = loop.runtime / "standin-executions.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run(loop: LoopFiles, *words: str) -> None:
    """Has the stand-in run the loop to its end."""
    command = [str(STANDIN), "run", "--repo", str(loop.repo), "--loop", LOOP, *words]
    subprocess.run(command, check=True, timeout=DEADLINE, stdin=subprocess.DEVNULL, capture_output=True)


def script(path: Path, text: str, *, interpreter: str = "/bin/sh") -> str:
    """An executable script in the runtime's place; its path."""
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)
    return str(path)
