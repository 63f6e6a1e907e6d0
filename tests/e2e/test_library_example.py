"""The example of docs/library.md is the file beside it, and does what it says against a real agent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import opsmgr
from support.repos import LOOP
from support.runtime import executions, run
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import AgentProgram

    from support.repos import LoopFiles

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "examples" / "approver.py"
TEXT = (DOCS / "library.md").read_text()


class Approver:
    """The example as a running program."""

    def __init__(self, folder: Path, address: str) -> None:
        token = folder / "token"
        token.write_text("token-of-the-tests")
        token.chmod(0o600)
        self.position = folder / "position"
        self.output = folder / "output"
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, EXAMPLE, address, LOOP, token, self.position],
                env={"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(folder / "manager"), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def text(self) -> str:
        """Everything printed so far, by it and those before."""
        return self.output.read_text()


@pytest.fixture
def approver(tmp_path: Path, start_agent: Callable[..., AgentProgram]) -> Iterator[Callable[[], Approver]]:
    """Starts the example, again and again, on one agent."""
    address = start_agent("--listen", f"unix:{tmp_path}/agent.sock").address()
    started: list[Approver] = []

    def start() -> Approver:
        started.append(Approver(tmp_path, address))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(DEADLINE)


def test_the_document_has_the_example_as_it_stands_in_its_file() -> None:
    assert f"\n```python\n{EXAMPLE.read_text()}```\n" in TEXT


def test_the_example_approves_once_and_goes_on_where_it_was_killed(
    repo: LoopFiles, approver: Callable[[], Approver]
) -> None:
    run(repo)
    first = approver()
    until(lambda: "approve confirmed: decision_observed" in first.text, f"it approves; it said: {first.text}")
    until(first.position.exists, "it stores its position")
    first.process.kill()
    first.process.wait(DEADLINE)
    stored = json.loads(first.position.read_text())["line"]
    run(repo)  # consumes the approval
    said = len(first.text)
    second = approver()

    assert second.process.wait(DEADLINE) == 0, second.text
    seen = [int(number) for number in re.findall(r"^line (\d+):", second.text[said:], re.MULTILINE)]
    assert seen[0] > stored
    assert seen == sorted(set(seen))
    assert len(executions(repo)) == 1
    assert json.loads(second.position.read_text())["line"] == seen[-1]


def test_every_name_that_the_document_imports_or_catches_is_public() -> None:
    named = set(re.findall(r"`([A-Z]\w+)`", TEXT)) - {"None", "True", "False"}

    assert {name for name in named if not name.isupper()} <= set(opsmgr.__all__)


def test_every_error_that_is_public_is_in_the_document() -> None:
    errors = {
        name for name in opsmgr.__all__ if isinstance(cls := getattr(opsmgr, name), type) and issubclass(cls, Exception)
    }

    assert errors <= set(re.findall(r"`(\w+)`", TEXT.partition("## Errors")[2]))
