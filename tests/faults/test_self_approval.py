"""T29: sandbox code decides on its own approval request; that can't be prevented inside, and is seen from outside."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprite_agent.contract.agent_state import APPROVAL_UNATTRIBUTED
from support.driving import RUNTIME, decision
from support.figures import found
from support.repos import LOOP, event, line, put
from support.runtime import SKIPS, this_python_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.transport.base import Transport
    from support.repos import LoopFiles


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


@pytest.fixture
def asking(repo: LoopFiles) -> LoopFiles:
    """A loop that waits for approval."""
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    return repo


def decide_inside(repo: LoopFiles, by: str, *words: str) -> None:
    """Has the runtime's own command decide, as sandbox code can."""
    command = [RUNTIME, "approve", "--repo", str(repo.repo), "--loop", LOOP, "--by", by, *words]
    subprocess.run(command, check=True, capture_output=True)


async def decide_through_us(transport: Transport, intent: str = "approve") -> str:
    """Has the agent decide; the mark of it."""
    result = await transport.execute(cast("Any", decision(intent, confirmation=SKIPS)))
    assert result["exitCode"] == 0
    return result["command"][result["command"].index("--by") + 1]


def edit(repo: LoopFiles, by: str) -> None:
    """Writes a decision into the approval request itself."""
    approval = json.loads(repo.approval.read_bytes())
    put(repo.approval, {**approval, "status": "approved", "decision": {"by": by, "status": "approved"}})


async def findings(transport: Transport) -> list[str]:
    """What the snapshot wants looked into."""
    return [found.reason for found in (await transport.snapshot(LOOP)).findings]


FORGERIES: dict[str, Callable[[LoopFiles, str], None]] = {
    "a name": lambda repo, _mark: decide_inside(repo, "alice@corp"),
    "a name, rejecting": lambda repo, _mark: decide_inside(repo, "alice@corp", "--reject"),
    "a mark made up": lambda repo, _mark: decide_inside(repo, "ada#0123456789abcdef"),
    "the mark of an earlier decision": decide_inside,
    "that mark, rejecting": lambda repo, mark: decide_inside(repo, mark, "--reject"),
    "the execution of an earlier decision": lambda repo, mark: decide_inside(repo, f"eve#{mark.rpartition('#')[2]}"),
    "a file that was edited": lambda repo, _mark: edit(repo, "alice@corp"),
    "a file that was edited, with a mark": edit,
    "nobody": lambda repo, _mark: edit(repo, ""),
}


async def test_a_decision_that_was_not_made_through_the_agent_is_seen(transport: Transport, asking: LoopFiles) -> None:
    mark = await decide_through_us(transport)
    for number, (name, forge) in enumerate(FORGERIES.items()):
        asking.ask_approval(run_id=f"run-{number + 2}", iteration=number + 2)
        assert await findings(transport) == []

        await asyncio.to_thread(forge, asking, mark)

        assert await findings(transport) == [APPROVAL_UNATTRIBUTED], name
    found("T29", f"{len(FORGERIES)} ways to decide inside, over {transport.name}: each {APPROVAL_UNATTRIBUTED}")


@pytest.mark.parametrize("intent", ["approve", "reject"])
async def test_a_decision_that_was_made_through_the_agent_is_ours(
    transport: Transport, asking: LoopFiles, intent: str
) -> None:
    await decide_through_us(transport, intent)

    assert await findings(transport) == []


async def test_a_decision_of_ours_that_was_turned_round_afterwards_is_seen(
    transport: Transport, asking: LoopFiles
) -> None:
    await decide_through_us(transport, "reject")
    edited = asking.approval.read_text().replace("rejected", "approved")
    put(asking.approval, edited.encode())

    assert await findings(transport) == [APPROVAL_UNATTRIBUTED]
