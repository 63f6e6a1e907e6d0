"""The runtime as control sees it: the stand-in for its command, scripts in its place, and requests to run it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprite_agent.control import executor
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import ControlBusy, ControlNotFound
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.repo import Repo
    from support.repos import Json

LOOKS_ONCE = {"mode": "wait", "timeoutSeconds": 0}
WAITS = {"mode": "wait", "timeoutSeconds": DEADLINE}
SKIPS = {"mode": "skip"}

AGENT = """
import json, sys
from pathlib import Path
from sprite_agent.repo import Repo

repo = Repo(Path(sys.argv[1]), state_folder=Path(sys.argv[2]), runtime=sys.argv[3])
print(json.dumps(repo.execute(json.loads(sys.argv[4])) if len(sys.argv) > 4 else repo.recover()))
"""
"""A process of its own that runs a request, or without one recovers, as far as that needs no waiting."""


def this_python_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the stand-in run by the interpreter of the tests, whatever another `python3` would add to its environment."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


def asking_loop(repo: Path) -> LoopFiles:
    """A loop that waits for approval, in a new repo."""
    loop = LoopFiles(repo)
    loop.append(line(event("approval_requested")))
    loop.ask_approval()
    return loop


def made_folder(state: Path, loop: LoopFiles) -> StateFolder:
    """The repo's state folder, with nothing in it yet."""
    folder = StateFolder(state, loop.repo)
    folder.make()
    return folder


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


def executors_of(state: Path) -> list[int]:
    """The executors that wait for a command, or run one, of the agents with that state folder."""
    words = os.fsencode(state / "executions")
    return [pid for pid, found in commands() if words in found and os.fsencode(executor.__file__) in found]


def commands() -> Iterator[tuple[int, list[bytes]]]:
    """The pid and the words of each process."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended
                yield int(process.name), (process / "cmdline").read_bytes().split(b"\0")


def mark_in(result: ControlResult) -> str:
    """What the command of an approve or a reject was to record the decision under."""
    return result["command"][result["command"].index("--by") + 1]


def state_of(repo: Repo, key: str = "key-1") -> str | None:
    """How far a key has got."""
    try:
        return repo.get_control(LOOP, key)["state"]
    except ControlNotFound:
        return None


def patient(repo: Repo, document: dict[str, Any]) -> ControlResult:
    """Asks until it is not told to come back later."""
    while True:
        try:
            return repo.execute(document)
        except ControlBusy as busy:
            time.sleep((busy.retry_after or 0) / 20)


def again(result: ControlResult) -> ControlResult:
    """A result as it is answered later."""
    return {**result, "replayed": True}


def run(loop: LoopFiles, *words: str) -> None:
    """Has the stand-in run the loop to its end."""
    command = [str(STANDIN), "run", "--repo", str(loop.repo), "--loop", LOOP, *words]
    subprocess.run(command, check=True, timeout=DEADLINE, stdin=subprocess.DEVNULL, capture_output=True)


def script(path: Path, text: str, *, interpreter: str = "/bin/sh") -> str:
    """An executable script in the runtime's place; its path."""
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)
    return str(path)
