"""Confirming looks at fresh snapshots until the effect shows or the time is over, and runs nothing."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.intents.confirm import confirm
from opsmgr.transport.local import LocalTransport
from sprite_agent.errors import EventsNotFound
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from opsmgr.transport.base import Snapshot
    from sprite_agent.contract.envelopes import ConfirmationRecord, ControlEffect, Intent

RECORD_KEYS = {
    "intent",
    "confirmed",
    "reason",
    "attempts",
    "timeoutSeconds",
    "observedStatus",
    "observedLastEvent",
    "observedApprovalStatus",
    "observedActive",
    "observedAt",
}
ACTIVE = {"active": True, "current_loop_id": LOOP}


class _Changing(LocalTransport):
    """The local transport; before the given look something happens to the loop."""

    looks = 0
    change_before: tuple[int, Callable[[], Any]] | None = None

    async def snapshot(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> Snapshot:
        self.looks += 1
        if self.change_before is not None and self.looks == self.change_before[0]:
            self.change_before[1]()
        return await super().snapshot(loop_id, trace_id=trace_id, run_id=run_id)


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    loop = LoopFiles(tmp_path / "repo")
    loop.append(line(event("loop_start")))
    return loop


@pytest.fixture
async def transport(loop: LoopFiles, tmp_path: Path) -> AsyncIterator[_Changing]:
    transport = _Changing(loop.repo, state_folder=tmp_path / "state")
    yield transport
    await transport.close()


async def look(
    transport: _Changing, intent: Intent, *, seconds: float = 0, required: ControlEffect = "completed"
) -> ConfirmationRecord:
    record = await confirm(transport, LOOP, intent, timeout=seconds, interval=0.02, required=required)
    assert set(record) == RECORD_KEYS
    assert (record["intent"], record["timeoutSeconds"], record["attempts"]) == (intent, seconds, transport.looks)
    return record


async def test_a_loop_that_is_not_active_is_a_confirmed_cancel(transport: _Changing) -> None:
    record = await look(transport, "cancel")

    assert (record["confirmed"], record["reason"]) == (True, "inactive_not_running")
    assert (record["observedStatus"], record["observedActive"]) == ("unknown", None)


async def test_a_loop_that_is_active_is_no_confirmed_cancel(transport: _Changing, loop: LoopFiles) -> None:
    put(loop.state, ACTIVE)

    record = await look(transport, "cancel")

    assert (record["confirmed"], record["reason"]) == (False, "timeout")
    assert (record["observedStatus"], record["observedActive"]) == ("running", True)
    assert record["attempts"] == 1


async def test_a_runtime_that_is_active_with_another_loop_is_no_confirmed_cancel(
    transport: _Changing, loop: LoopFiles
) -> None:
    put(loop.state, {"active": True, "current_loop_id": "another"})

    assert (await look(transport, "cancel"))["confirmed"] is False


@pytest.mark.parametrize("sign", ["summary", "event"])
async def test_a_completion_confirms_an_approve(transport: _Changing, loop: LoopFiles, sign: str) -> None:
    if sign == "summary":
        loop.summarize({"run_id": "run-1", "iteration": 1, "completion_ok": True})
    else:
        loop.append(line(event("loop_complete")))

    record = await look(transport, "approve")

    assert (record["confirmed"], record["reason"]) == (True, "completion_observed")


async def test_a_recorded_decision_does_not_confirm_an_approve(transport: _Changing, loop: LoopFiles) -> None:
    loop.ask_approval(status="approved")

    record = await look(transport, "approve")

    assert (record["confirmed"], record["reason"]) == (False, "timeout")
    assert record["observedApprovalStatus"] == "approved"


async def test_a_recorded_decision_confirms_an_approve_where_it_is_to_count(
    transport: _Changing, loop: LoopFiles
) -> None:
    loop.ask_approval(status="approved")

    record = await look(transport, "approve", required="decision_recorded")

    assert (record["confirmed"], record["reason"]) == (True, "decision_observed")


async def test_a_pending_approval_confirms_neither_decision(transport: _Changing, loop: LoopFiles) -> None:
    loop.ask_approval()

    assert (await look(transport, "approve", required="decision_recorded"))["confirmed"] is False
    transport.looks = 0
    assert (await look(transport, "reject", required="decision_recorded"))["confirmed"] is False


@pytest.mark.parametrize("sign", ["approval", "event", "decision"])
async def test_a_rejection_confirms_a_reject(transport: _Changing, loop: LoopFiles, sign: str) -> None:
    if sign == "approval":
        loop.ask_approval(status="rejected")
    elif sign == "event":
        loop.append(line(event("approval_rejected")))
    else:
        loop.append(line(event("approval_decision", status="rejected")))

    record = await look(transport, "reject")

    assert (record["confirmed"], record["reason"]) == (True, "rejection_observed")


async def test_an_approval_does_not_confirm_a_reject(transport: _Changing, loop: LoopFiles) -> None:
    loop.ask_approval(status="approved")
    loop.append(line(event("approval_decision", status="approved")))

    assert (await look(transport, "reject"))["confirmed"] is False


@pytest.fixture
def rejected(loop: LoopFiles) -> None:
    """The stand-in has played the loop to its end, and rejected what it asked for."""
    for words in (["run"], ["approve", "--by", "ada", "--reject"]):
        command: list[str | Path] = [STANDIN, words[0], "--repo", str(loop.repo), "--loop", LOOP, *words[1:]]
        subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)


@pytest.mark.usefixtures("rejected")
async def test_what_the_real_decision_leaves_behind_confirms_it(transport: _Changing) -> None:
    record = await look(transport, "reject")

    assert record["confirmed"] is True
    assert (record["observedApprovalStatus"], record["observedLastEvent"]) == ("rejected", "approval_decision")


async def test_an_effect_that_shows_later_is_seen_at_the_next_look(transport: _Changing, loop: LoopFiles) -> None:
    put(loop.state, ACTIVE)
    transport.change_before = (3, loop.state.unlink)

    record = await look(transport, "cancel", seconds=DEADLINE)

    assert (record["confirmed"], record["attempts"]) == (True, 3)


async def test_looking_ends_when_the_time_is_over_and_looks_once_more_at_its_end(
    transport: _Changing, loop: LoopFiles
) -> None:
    put(loop.state, ACTIVE)
    began = time.monotonic()

    record = await look(transport, "cancel", seconds=0.1)

    assert time.monotonic() - began >= 0.1
    assert record["confirmed"] is False
    assert record["attempts"] >= 2


async def test_a_loop_that_can_not_be_read_ends_the_looking(transport: _Changing, loop: LoopFiles) -> None:
    put(loop.state, ACTIVE)
    transport.change_before = (2, loop.log.unlink)

    with pytest.raises(EventsNotFound):
        await confirm(transport, LOOP, "cancel", timeout=DEADLINE, interval=0.02)


async def test_looking_runs_and_writes_nothing(transport: _Changing, loop: LoopFiles, tmp_path: Path) -> None:
    loop.ask_approval()
    before = sorted(loop.repo.rglob("*"))

    await look(transport, "approve")

    assert sorted(loop.repo.rglob("*")) == before
    assert not (tmp_path / "state").exists()
