"""What an intent would act on is what its agent would hold an expectation against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.intents.at_hand import look
from opsmgr.intents.control import send
from opsmgr.store import LoopStore
from support.repos import LOOP, event, line, put
from support.runtime import SKIPS, request

if TYPE_CHECKING:
    from pathlib import Path

    from opsmgr.transport.base import Transport
    from support.repos import LoopFiles

NO_EVENT = pytest.mark.parametrize(
    "tail",
    [b"\n", b'{\n  "timestamp": "2026-01-02T03:04:05Z",\n', b'{"run_id":"run-2"}\n', b"\n" * 300],
    ids=["a blank line", "an object that is not closed yet", "a record without a name", "many blank lines"],
)
"""What a log may have after its last event."""


@NO_EVENT
async def test_a_cancel_expects_the_run_of_the_last_event(transport: Transport, repo: LoopFiles, tail: bytes) -> None:
    repo.summarize({"run_id": "run-1", "iteration": 5})
    repo.append(line(event("loop_start", run_id="run-2")), tail)

    assert (await look(transport, LOOP, "cancel")).run_id == "run-2"


async def test_without_any_event_a_cancel_expects_no_run(transport: Transport, repo: LoopFiles) -> None:
    repo.append(b"\n" * 3)

    assert (await look(transport, LOOP, "cancel")).run_id is None


@NO_EVENT
async def test_a_cancel_of_what_is_at_hand_is_run(
    transport: Transport, repo: LoopFiles, tmp_path: Path, tail: bytes
) -> None:
    repo.summarize({"run_id": "run-1", "iteration": 5})
    put(repo.state, {"active": True, "current_loop_id": LOOP, "iteration": 1})
    repo.append(line(event("loop_start", run_id="run-2")), tail)
    at_hand = await look(transport, LOOP, "cancel")

    document: Any = request("cancel", confirmation=SKIPS, **at_hand.preconditions())
    result = await send(transport, LoopStore(tmp_path / "manager"), document)

    assert result["state"] == "done"


@pytest.mark.parametrize("iteration", [3, "3", 3.0], ids=repr)
async def test_the_iteration_of_an_approval_request_is_a_number_however_it_is_written(
    transport: Transport, repo: LoopFiles, iteration: Any
) -> None:
    repo.summarize({"run_id": "run-1", "iteration": 2})
    repo.append(line(event()))
    repo.ask_approval(iteration=iteration)

    assert (await look(transport, LOOP, "approve")).iteration == 3
