"""T28: an agent's disk goes back to an earlier moment; the manager notices, and has nothing run again."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, cast

import pytest

from opsmgr.agent_memory import unfreeze
from opsmgr.errors import AgentStateRolledBack
from opsmgr.intents.control import send
from opsmgr.passes.reconcile import ReconcileOptions, reconcile
from opsmgr.store import LoopStore
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from support.driving import decision
from support.figures import found
from support.repos import LOOP, event, line
from support.runtime import SKIPS, executions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from conftest import AgentProgram

    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it


class Sprite:
    """A Sprite whose agent's disk can be put back to a checkpoint, and a manager of it."""

    def __init__(self, start: Callable[..., AgentProgram], repo: LoopFiles, place: Path) -> None:
        self._start = start
        self._repo = repo
        self._state = place / "state"
        self._checkpoint = place / "checkpoint"
        self.store = LoopStore(place / "manager")
        self._resume()

    def _resume(self) -> None:
        listen = f"unix:{self._state.with_name('agent.sock')}"
        self._program = self._start("--listen", listen, "--state-dir", str(self._state))
        self._transport = SpriteServiceTransport(
            self._program.address(), token=TOKEN, policy=RetryPolicy(attempts=10, budget=10.0)
        )

    async def _suspend(self) -> None:
        await self._transport.close()
        self._program.end()

    async def checkpoint(self) -> None:
        """Keeps the disk as it is."""
        await self._suspend()
        shutil.copytree(self._state, self._checkpoint)
        self._resume()

    async def restore(self) -> None:
        """Puts the disk back to what was kept."""
        await self._suspend()
        shutil.rmtree(self._state)
        shutil.copytree(self._checkpoint, self._state)
        self._resume()

    async def decide(self, key: str, *, store: LoopStore | None = None) -> str | None:
        """Has a manager approve with a key; what came of it."""
        self._repo.ask_approval(run_id=key)
        document = cast("Any", decision(idempotencyKey=key, confirmation=SKIPS))
        return (await send(self._transport, store or self.store, document))["status"]

    async def reconcile(self) -> list[str]:
        """One pass of the manager; every escalation so far."""
        await reconcile(self._transport, self.store, ReconcileOptions(loop_id=LOOP))
        return [json.loads(text)["category"] for text in self.store.escalations.read_text().splitlines()]

    async def close(self) -> None:
        """Ends it."""
        await self._suspend()


@pytest.fixture
async def sprite(start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path) -> AsyncIterator[Sprite]:
    repo.append(line(event("approval_requested")))
    sprite = Sprite(start_agent, repo, tmp_path)
    yield sprite
    await sprite.close()


async def rolled_back(sprite: Sprite) -> None:
    """Runs one control, keeps the disk, runs three more, and puts it back."""
    await sprite.decide("key-1")
    await sprite.checkpoint()
    for key in ("key-2", "key-3", "key-4"):
        assert await sprite.decide(key) == "executed_unconfirmed"
    await sprite.restore()


async def test_what_a_checkpoint_has_forgotten_is_not_run_again(sprite: Sprite, repo: LoopFiles) -> None:
    await rolled_back(sprite)

    for key in ("key-2", "key-5", "key-1"):
        with pytest.raises(AgentStateRolledBack):
            await sprite.decide(key)

    assert len(executions(repo)) == 4
    found("T28", "1 restore after 3 controls: AGENT_STATE_ROLLED_BACK, frozen, 0 executions")


async def test_a_reconcile_tells_of_it_once_and_freezes_control_until_an_operator_has_looked(
    sprite: Sprite, repo: LoopFiles
) -> None:
    await rolled_back(sprite)

    await sprite.reconcile()
    told = await sprite.reconcile()

    assert told.count("agent_state_rolled_back") == 1
    with pytest.raises(AgentStateRolledBack):
        await sprite.decide("key-5")
    assert len(executions(repo)) == 4
    unfreeze(sprite.store)
    assert await sprite.decide("key-5") == "executed_unconfirmed"


async def test_a_journal_that_has_caught_up_since_is_noticed_by_its_hash(
    sprite: Sprite, repo: LoopFiles, tmp_path: Path
) -> None:
    await rolled_back(sprite)
    another = LoopStore(tmp_path / "another manager")
    for key in ("key-6", "key-7", "key-8"):
        await sprite.decide(key, store=another)

    with pytest.raises(AgentStateRolledBack, match="another entry"):
        await sprite.decide("key-2")

    assert len(executions(repo)) == 7


async def test_an_agent_that_was_only_restarted_is_not_taken_for_one(sprite: Sprite, repo: LoopFiles) -> None:
    await sprite.decide("key-1")
    await sprite.checkpoint()
    await sprite.restore()

    assert await sprite.decide("key-2") == "executed_unconfirmed"
    assert len(executions(repo)) == 2
