"""However an intent comes out, three lines say so, each by its schema, with the figures of this one call."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.errors import NoAnswer
from opsmgr.intents.control import send
from opsmgr.intents.control_records import control_telemetry, invocation_telemetry
from opsmgr.store import LoopStore
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ControlBusy, RunMismatch
from support.repos import event, line
from support.runtime import SKIPS, asking_loop, request, turn

if TYPE_CHECKING:
    from pathlib import Path

    from opsmgr.transport.base import Transport
    from sprite_agent.errors import OpsError
    from support.repos import LoopFiles

Json = dict[str, Any]


@pytest.fixture
def repo(tmp_path: Path) -> LoopFiles:
    """A loop that waits for approval."""
    return asking_loop(tmp_path / "repo")


@pytest.fixture
def store(tmp_path: Path) -> LoopStore:
    return LoopStore(tmp_path / "manager")


def lines(path: Path) -> list[Json]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def last(store: LoopStore) -> tuple[Json, Json, Json]:
    """The last line of each of the three, by its schema and without a null key."""
    found = [lines(path)[-1] for path in (store.intents, control_telemetry(store), invocation_telemetry(store))]
    for kind, document in zip(("manager_intent", "manager_control", "manager_control_invocation"), found, strict=True):
        validate(kind, document)
        assert None not in document.values()
    return found[0], found[1], found[2]


def asked(intent: str = "reject", **members: Any) -> Any:
    return request(intent, **members)


async def test_a_confirmed_intent_has_the_figures_of_its_call(transport: Transport, store: LoopStore) -> None:
    await send(transport, store, asked(note="not yet", traceId="trace-1"))

    _, control, invocation = last(store)
    for document in (control, invocation):
        assert (document["traceId"], document["transport"]) == ("trace-1", transport.name)
        assert document["startedAt"] <= document["timestamp"]
    judged = {name: control[name] for name in ("status", "reasonCode", "exitCode", "confirmExitCode", "confirmed")}
    assert judged == {
        "status": "confirmed",
        "reasonCode": "rejection_observed",
        "exitCode": 0,
        "confirmExitCode": 0,
        "confirmed": True,
    }
    assert control["durationSeconds"] > 0
    assert (control["retryAttempts"], control["retryBackoffSeconds"]) == (0, 0)
    assert invocation["note"] == "not yet"
    assert invocation["request"]["doConfirm"] is True
    assert (invocation["execution"]["status"], invocation["execution"]["replayed"]) == ("success", False)
    assert (invocation["confirmation"]["attempted"], invocation["confirmation"]["status"]) == (True, "confirmed")
    assert invocation["outcome"]["durationSeconds"] == control["durationSeconds"]


@pytest.mark.parametrize(("required", "status"), [("completed", "ambiguous"), ("decision_recorded", "confirmed")])
async def test_an_approve_tells_of_both_effects_whichever_is_to_count(
    transport: Transport, store: LoopStore, required: str, status: str
) -> None:
    wait = {"mode": "wait", "timeoutSeconds": 0, "requiredEffect": required}

    await send(transport, store, asked("approve", confirmation=wait))

    intent, control, invocation = last(store)
    assert (intent["status"], control["status"]) == (status, status)
    for confirm in (intent["confirm"], invocation["confirmation"]["outcome"]):
        assert (confirm["effect"], confirm["requiredEffect"]) == ("decision_recorded", required)


async def test_what_was_not_to_be_confirmed_says_that_nobody_looked(transport: Transport, store: LoopStore) -> None:
    await send(transport, store, asked(confirmation=SKIPS))

    intent, control, invocation = last(store)
    assert not {"confirm", "confirmExitCode"} & intent.keys()
    assert "confirmExitCode" not in control
    assert invocation["request"]["doConfirm"] is False
    assert invocation["confirmation"] == {"attempted": False, "status": "not_attempted"}


async def test_a_command_that_fails_is_recorded_with_its_exit_code(
    transport: Transport, store: LoopStore, repo: LoopFiles
) -> None:
    turn(repo, exit_code=7, skip_effect=True)

    await send(transport, store, asked())

    _, control, invocation = last(store)
    assert (control["status"], control["reasonCode"], control["exitCode"]) == ("failed_command", "command_failed", 7)
    assert invocation["execution"]["status"] == "failed_command"


async def test_what_was_answered_before_is_recorded_as_replayed(transport: Transport, store: LoopStore) -> None:
    await send(transport, store, asked())
    await send(transport, store, asked())

    assert [entry["execution"]["replayed"] for entry in lines(invocation_telemetry(store))] == [False, True]


async def test_a_refusal_has_its_reason_and_no_exit_code(transport: Transport, store: LoopStore) -> None:
    with pytest.raises(RunMismatch):
        await send(transport, store, asked(expectedRunId="another"))

    _, control, invocation = last(store)
    assert (control["status"], control["reasonCode"]) == ("failed_command", "run_mismatch")
    assert "exitCode" not in control
    assert invocation["execution"].keys() == {"status", "output"}


class _Retried:
    """A transport that has tried twice more in each call, and fails."""

    def __init__(self, real: Transport, error: OpsError) -> None:
        self.name, self.attempts, self.journal = real.name, real.attempts, None
        self._error = error

    async def execute(self, *_: Any) -> Any:
        self.attempts.failed("NO_ANSWER", wait=0.25)
        self.attempts.failed("CONTROL_BUSY", wait=0.5)
        raise self._error

    async def get_control(self, *_: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status"), [(NoAnswer("no answer"), "ambiguous"), (ControlBusy("busy"), "failed_command")]
)
async def test_retries_are_counted_for_the_call_and_not_over_the_transports_life(
    transport: Transport, store: LoopStore, error: OpsError, status: str
) -> None:
    retried: Any = _Retried(transport, error)
    for key in ("key-1", "key-2"):
        with pytest.raises(type(error)):
            await send(retried, store, asked(idempotencyKey=key))

    intent, control, invocation = last(store)
    assert intent["attemptCodes"] == ["NO_ANSWER", "CONTROL_BUSY"]
    for figures in (intent, control, invocation["request"]):
        assert (figures["retryAttempts"], figures["retryBackoffSeconds"]) == (2, 0.75)
    assert (control["status"], control["reasonCode"]) == (status, error.reason.lower())
    assert invocation["outcome"]["status"] == status


async def test_a_record_that_cant_be_written_is_told_and_changes_nothing(
    transport: Transport, store: LoopStore, repo: LoopFiles
) -> None:
    repo.append(line(event("approval_requested")))
    store.intents.mkdir(parents=True)
    told: list[str] = []

    result = await send(transport, store, asked(), tell=told.append)

    assert result["status"] == "confirmed"
    assert [text.partition(":")[0] for text in told] == ["the intent is not recorded"]
