"""The manager remembers how far an agent's journal had got: a step back freezes control until somebody has looked."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.agent_memory import AgentMemory, load_memory, save_memory, unfreeze
from opsmgr.errors import AgentStateRolledBack, InputInvalid
from opsmgr.intents.control import send
from opsmgr.passes.reconcile import ReconcileOptions, reconcile
from opsmgr.store import LoopStore
from opsmgr.transport.local import LocalTransport
from sprite_agent.contract.agent_state import Finding, JournalHead
from support.repos import LOOP, STANDIN, event, line
from support.runtime import SKIPS, executions, request, this_python_first

if TYPE_CHECKING:
    from pathlib import Path

    from opsmgr.transport.base import Transport
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

FIRST = JournalHead("journal-1", 5, "a" * 64)


class _RolledBack(LocalTransport):
    """The local transport, whose journal is another one after a control, once that is wanted."""

    is_restored = False

    async def execute(self, request: ControlRequest) -> ControlResult:
        result = await super().execute(request)
        if self.is_restored and self.journal is not None:
            self.journal = self.journal._replace(id="restored")
        return result


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> LoopStore:
    return LoopStore(tmp_path / "manager")


def escalations(store: LoopStore) -> list[str]:
    found = store.escalations.read_text().splitlines() if store.escalations.exists() else []
    return [json.loads(text)["category"] for text in found]


def asked(number: int) -> Any:
    """A cancel with a key of its own."""
    return request("cancel", idempotencyKey=f"key-{number}", confirmation=SKIPS)


@pytest.mark.parametrize(
    "now",
    [
        JournalHead("journal-1", 4, "b" * 64),
        JournalHead("journal-1", 5, "b" * 64),
        JournalHead("journal-2", 9, "b" * 64),
    ],
    ids=["fewer entries", "another last entry", "another journal"],
)
def test_a_step_back_freezes_control_and_is_told_once(now: JournalHead) -> None:
    memory = AgentMemory(journal=FIRST)

    told = [*memory.look_at(now), *memory.look_at(now)]

    assert [category for category, _ in told] == ["agent_state_rolled_back"]
    assert told[0][1]["before"] == FIRST._asdict()
    with pytest.raises(AgentStateRolledBack, match="unfreeze"):
        memory.refuse_if_frozen()


@pytest.mark.parametrize("now", [None, FIRST, JournalHead("journal-1", 6, "b" * 64)])
def test_a_journal_that_goes_on_or_is_not_told_of_freezes_nothing(now: JournalHead | None) -> None:
    memory = AgentMemory(journal=FIRST)

    assert memory.look_at(now) == []
    memory.refuse_if_frozen()


def test_a_memory_is_saved_whole(store: LoopStore) -> None:
    memory = AgentMemory(journal=FIRST, frozen="because", findings=[Finding("ODD", "look")])

    save_memory(store, memory)

    assert load_memory(store) == memory


@pytest.mark.parametrize(
    "content", ["", "[]", '{"journal": {}}', '{"journal": {"id": 1, "sequence": 2, "head": ""}}', '{"frozen": true}']
)
def test_a_file_that_is_no_memory_is_not_taken_for_one_that_freezes_nothing(store: LoopStore, content: str) -> None:
    store.folder.mkdir()
    store.agent.write_text(content)

    with pytest.raises(InputInvalid, match=r"agent\.json"):
        load_memory(store)


def test_what_another_manager_has_saved_meanwhile_is_not_undone(store: LoopStore) -> None:
    save_memory(store, AgentMemory(journal=FIRST))
    slow = load_memory(store)
    quick = load_memory(store)
    quick.journal = FIRST._replace(sequence=7)
    save_memory(store, quick)

    slow.look_into([Finding("ODD", "look")])
    save_memory(store, slow)
    assert load_memory(store).journal == FIRST._replace(sequence=7)

    slow = load_memory(store)
    quick = load_memory(store)
    quick.look_at(FIRST)
    save_memory(store, quick)
    save_memory(store, slow)
    assert load_memory(store).frozen is not None

    unfreeze(store)
    assert load_memory(store).frozen is None
    save_memory(store, load_memory(store))
    assert load_memory(store).frozen is None


def test_an_unfreeze_is_not_undone_by_who_had_loaded_the_memory_before(store: LoopStore) -> None:
    save_memory(store, AgentMemory(journal=FIRST, frozen="because"))
    slow = load_memory(store)
    unfreeze(store)

    save_memory(store, slow)
    assert load_memory(store).frozen is None

    slow = load_memory(store)
    slow.look_at(FIRST._replace(sequence=4))
    unfreeze(store)
    save_memory(store, slow)
    assert load_memory(store).frozen is not None, "it had not been frozen for that"


def test_a_finding_is_told_when_it_is_new() -> None:
    memory = AgentMemory()
    finding = Finding("APPROVAL_UNATTRIBUTED", "who was that?")

    assert memory.look_into([finding]) == [("approval_unattributed", {"message": "who was that?"})]
    assert memory.look_into([finding]) == []
    assert memory.look_into([]) == []
    assert memory.look_into([finding]) != []


async def test_an_agent_that_was_rolled_back_is_noticed_before_the_next_control_is_sent(
    repo: LoopFiles, config: ServeConfig, store: LoopStore, tmp_path: Path
) -> None:
    """T28, C-rows: what a checkpoint forgets must not be run again."""
    repo.append(line(event()))
    repo.state.write_text('{"active": true}')
    local = LocalTransport(repo.repo, runtime=str(STANDIN), state_folder=config.state_folder)
    await send(local, store, asked(1))
    shutil.copytree(config.state_folder, tmp_path / "checkpoint")
    for number in (2, 3, 4):
        repo.state.write_text('{"active": true}')
        await send(local, store, asked(number))
    await local.close()
    shutil.rmtree(config.state_folder)
    (tmp_path / "checkpoint").rename(config.state_folder)
    repo.state.write_text('{"active": true}')
    restored = LocalTransport(repo.repo, runtime=str(STANDIN), state_folder=config.state_folder)

    with pytest.raises(AgentStateRolledBack):
        await send(restored, store, asked(2))
    with pytest.raises(AgentStateRolledBack):
        await send(restored, store, asked(5))

    assert len(executions(repo)) == 4
    assert escalations(store) == ["agent_state_rolled_back"]
    await restored.close()


async def test_an_agent_that_is_rolled_back_during_a_control_is_escalated_by_that(
    repo: LoopFiles, config: ServeConfig, store: LoopStore
) -> None:
    repo.append(line(event()))
    repo.state.write_text('{"active": true}')
    local = _RolledBack(repo.repo, runtime=str(STANDIN), state_folder=config.state_folder)
    await send(local, store, asked(1))
    repo.state.write_text('{"active": true}')
    local.is_restored = True

    result = await send(local, store, asked(2))
    await local.close()

    assert result["status"] == "executed_unconfirmed"
    assert escalations(store) == ["agent_state_rolled_back"]
    assert load_memory(store).frozen is not None


async def test_a_reconcile_escalates_a_rolled_back_agent_and_an_approval_that_was_not_ours(
    repo: LoopFiles, transport: Transport, store: LoopStore
) -> None:
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    await transport.info()
    approve: Any = request("approve", confirmation=SKIPS)
    result = await transport.execute(approve)  # so that there is a journal
    await reconcile(transport, store, ReconcileOptions(loop_id=LOOP))
    assert result["status"] == "executed_unconfirmed"
    assert "approval_unattributed" not in escalations(store)

    repo.ask_approval(run_id="run-2")
    command = [str(STANDIN), "approve", "--repo", str(repo.repo), "--loop", LOOP, "--by", result["command"][7]]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    memory = load_memory(store)
    assert memory.journal is not None
    memory.journal = memory.journal._replace(sequence=memory.journal.sequence + 10)
    save_memory(store, memory)
    for _ in range(2):
        await reconcile(transport, store, ReconcileOptions(loop_id=LOOP))

    told = escalations(store)
    assert (told.count("approval_unattributed"), told.count("agent_state_rolled_back")) == (1, 1)
    assert load_memory(store).frozen is not None
