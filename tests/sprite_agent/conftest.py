"""What tests of control stand on: a loop that waits for approval, and its repo as one process has it."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

import pytest

from sprite_agent.control import conclusion
from sprite_agent.repo import Repo
from support.repos import STANDIN
from support.runtime import asking_loop, script, this_python_first
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]

SETTLE = 0.05
"""Seconds for which a cancel must show here, where a second is not the point."""


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    """A loop that waits for approval."""
    return asking_loop(tmp_path / "repo")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Where the repo's state folder is to be."""
    return tmp_path / "state"


@pytest.fixture
def make_repo(loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRepo]:
    """Makes the repo as another process would, with the stand-in for its runtime unless told otherwise."""
    this_python_first(monkeypatch)
    monkeypatch.setattr(conclusion, "SETTLE", SETTLE)
    made: list[Repo] = []

    def make(runtime: str | None = str(STANDIN)) -> Repo:
        made.append(Repo(loop.repo, state_folder=state, runtime=runtime))
        return made[-1]

    yield make
    for thread in threading.enumerate():
        if thread.name == "recovery":
            thread.join(DEADLINE)
    for repo in made:
        repo.close()


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A file in which scripts leave a line when they start and when they end."""
    marks = tmp_path / "marks"
    marks.touch()
    return marks


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """What a gated command waits at until something is written to it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    yield gate
    # Lets through whoever still waits; nobody may.
    with contextlib.suppress(OSError):
        os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def gated(tmp_path: Path, marks: Path, gate: Path) -> str:
    """A runtime that waits at the gate."""
    return script(tmp_path / "gated", f"echo began >> {marks}; read line < {gate}; echo told; echo ended >> {marks}")
