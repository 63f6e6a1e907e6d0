"""However an intent comes out, intents.jsonl says so in one line, by the contract's keys."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance import documents
from opsmgr.agent_memory import AgentMemory, save_memory
from opsmgr.errors import AgentStateRolledBack, InputInvalid, NoAnswer, NotReached, TransportRefused
from opsmgr.intents.control import SENDS, exit_code, new_key, resume, row_to_resume, send
from opsmgr.intents.outbox import Outbox, Row
from opsmgr.store import LoopStore, default_folder
from opsmgr.transport.base import Attempts
from opsmgr.transport.local import LocalTransport
from sprite_agent.contract.validation import validate
from sprite_agent.errors import (
    ActorInvalid,
    ApprovalNotPending,
    ControlBusy,
    IdempotencyKeyReused,
    InternalError,
    OpsError,
    RequestTooOld,
    RunMismatch,
    RuntimeMissing,
)
from support.repos import LOOP, STANDIN, put
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from opsmgr.transport.base import AgentInfo, Snapshot, Transport, TransportName
    from sprite_agent.contract.agent_state import JournalHead
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from sprite_agent.contract.streaming import EventBatch

Json = dict[str, Any]

KEYS = {
    "timestamp",
    "loopId",
    "intent",
    "traceId",
    "requestedBy",
    "note",
    "transport",
    "status",
    "command",
    "idempotencyKey",
    "exitCode",
    "confirmExitCode",
    "confirmed",
    "commandOutput",
    "confirm",
    "retryAttempts",
    "retryBackoffSeconds",
    "attemptCodes",
}


class _Failing:
    """A transport whose every control ends in the same error."""

    name: TransportName = "sprite_service"
    journal: JournalHead | None = None

    def __init__(self, error: OpsError) -> None:
        self.attempts = Attempts()
        self._error = error

    async def info(self) -> AgentInfo:
        raise self._error

    async def snapshot(self, *_: Any, **__: Any) -> Snapshot:
        raise self._error

    def events(self, *_: Any) -> AsyncGenerator[EventBatch, None]:
        raise self._error

    async def execute(self, request: ControlRequest) -> ControlResult:  # noqa: ARG002  # the Protocol's
        raise self._error

    async def get_control(self, *_: Any) -> ControlResult:
        raise self._error

    async def close(self) -> None:
        pass


def request(intent: str = "reject", **members: Any) -> Any:
    """A request that looks once for its effect; each member can be given another value."""
    return {
        "loopId": LOOP,
        "intent": intent,
        "requestedBy": "ada",
        "idempotencyKey": "key-1",
        "confirmation": {"mode": "wait", "timeoutSeconds": 0},
        **members,
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("played")
    subprocess.run([STANDIN, "run", "--repo", repo, "--loop", LOOP], check=True, timeout=DEADLINE)
    return repo


@pytest.fixture
def repo(played: Path, tmp_path: Path) -> Path:
    """A repo whose loop has come to its end and asks for approval."""
    return Path(shutil.copytree(played, tmp_path / "repo"))


@pytest.fixture
def store(repo: Path) -> LoopStore:
    return LoopStore(default_folder(repo, LOOP))


@pytest.fixture
async def transport(repo: Path, tmp_path: Path) -> AsyncIterator[LocalTransport]:
    transport = LocalTransport(repo, runtime=str(STANDIN), state_folder=tmp_path / "state")
    yield transport
    await transport.close()


def records(store: LoopStore) -> list[Json]:
    return [json.loads(entry) for entry in store.intents.read_text().splitlines()] if store.intents.exists() else []


def record(store: LoopStore) -> Json:
    """The one record there is; its keys are the contract's, and none is null."""
    [found] = records(store)
    assert found.keys() <= KEYS
    assert None not in found.values()
    validate("manager_intent", found)
    return found


def executions(repo: Path) -> int:
    log = repo / ".superloop" / "standin-executions.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


# An outcome.


async def test_a_confirmed_intent_is_recorded_whole(transport: LocalTransport, store: LoopStore, repo: Path) -> None:
    result = await send(transport, store, request(note="not yet", traceId="trace-1"))

    found = record(store)
    del found["timestamp"]
    confirmation = found.pop("confirm")
    mark = found["command"][7]
    assert mark.startswith("ada#")
    assert found == {
        "loopId": LOOP,
        "intent": "reject",
        "traceId": "trace-1",
        "requestedBy": "ada",
        "note": "not yet",
        "transport": "local",
        "status": "confirmed",
        "command": [
            str(STANDIN),
            "approve",
            "--repo",
            str(repo),
            "--loop",
            LOOP,
            "--by",
            mark,
            "--reject",
            "--note",
            "not yet",
        ],
        "idempotencyKey": "key-1",
        "exitCode": 0,
        "confirmExitCode": 0,
        "confirmed": True,
        "commandOutput": f"rejected by {mark}\n",
        "retryAttempts": 0,
        "retryBackoffSeconds": 0.0,
        "attemptCodes": [],
    }
    assert confirmation == {**result["confirmation"], "effect": "completed", "requiredEffect": "completed"}  # type: ignore[dict-item]  # not None
    assert confirmation["reason"] == "rejection_observed"
    assert exit_code(result) == 0


async def test_an_effect_that_did_not_show_in_time_is_recorded_as_ambiguous(
    transport: LocalTransport, store: LoopStore
) -> None:
    result = await send(transport, store, request("approve"))

    found = record(store)
    assert (found["status"], found["confirmed"], found["confirmExitCode"]) == ("ambiguous", False, 2)
    assert found["exitCode"] == 0
    assert found["confirm"]["reason"] == "timeout"
    assert exit_code(result) == 2


async def test_a_decision_that_was_asked_to_count_is_confirmed(transport: LocalTransport, store: LoopStore) -> None:
    wait = {"mode": "wait", "timeoutSeconds": 0, "requiredEffect": "decision_recorded"}

    result = await send(transport, store, request("approve", confirmation=wait))

    assert record(store)["status"] == "confirmed"
    assert exit_code(result) == 0


async def test_an_intent_that_was_not_to_be_confirmed_is_recorded_without_a_confirmation(
    transport: LocalTransport, store: LoopStore
) -> None:
    result = await send(transport, store, request(confirmation={"mode": "skip"}))

    found = record(store)
    assert (found["status"], found["confirmed"]) == ("executed_unconfirmed", False)
    assert not {"confirm", "confirmExitCode"} & found.keys()
    assert exit_code(result) == 0


async def test_a_command_that_exits_otherwise_is_recorded_as_failed_with_its_output(
    transport: LocalTransport, store: LoopStore, repo: Path
) -> None:
    put(repo / ".superloop" / "standin.json", {"exit_code": 7, "output": "went wrong", "skip_effect": True})

    result = await send(transport, store, request())

    found = record(store)
    assert (found["status"], found["exitCode"], found["confirmed"]) == ("failed_command", 7, False)
    assert "went wrong" in found["commandOutput"]
    assert not {"confirm", "confirmExitCode"} & found.keys()
    assert exit_code(result) == 1


async def test_what_was_so_already_is_recorded_as_confirmed_without_a_command(
    transport: LocalTransport, store: LoopStore, repo: Path
) -> None:
    result = await send(transport, store, request("cancel"))

    found = record(store)
    assert (found["status"], found["exitCode"], found["command"]) == ("confirmed", 0, [])
    assert found["confirm"]["reason"] == "not_needed"
    assert exit_code(result) == 0
    assert executions(repo) == 0


async def test_the_same_key_again_runs_nothing_and_is_recorded_again(
    transport: LocalTransport, store: LoopStore, repo: Path
) -> None:
    first = await send(transport, store, request())
    again = await send(transport, store, request())

    assert executions(repo) == 1
    assert (first["replayed"], again["replayed"]) == (False, True)
    assert [entry["status"] for entry in records(store)] == ["confirmed", "confirmed"]


async def test_a_key_whose_outcome_is_on_disk_is_answered_while_the_agent_is_away(
    transport: LocalTransport, store: LoopStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> AgentInfo:
        raise NoAnswer("no answer: connection refused")

    first = await send(transport, store, request())
    monkeypatch.setattr(transport, "info", away)

    again = await send(transport, store, request())

    assert again == {**first, "replayed": True}
    assert [entry["status"] for entry in records(store)] == ["confirmed", "confirmed"]


async def test_a_key_whose_outcome_is_on_disk_is_not_in_doubt_while_control_is_frozen(
    transport: LocalTransport, store: LoopStore
) -> None:
    await send(transport, store, request())
    save_memory(store, AgentMemory(frozen="its journal went back"))

    with pytest.raises(AgentStateRolledBack) as refused:
        await send(transport, store, request())

    assert refused.value.executed is False


async def test_every_intent_adds_one_line(transport: LocalTransport, store: LoopStore) -> None:
    await send(transport, store, request("approve", idempotencyKey="key-1"))
    with pytest.raises(ApprovalNotPending):
        await send(transport, store, request("reject", idempotencyKey="key-2"))
    await send(transport, store, request("cancel", idempotencyKey="key-3"))

    assert [(entry["idempotencyKey"], entry["status"]) for entry in records(store)] == [
        ("key-1", "ambiguous"),
        ("key-2", "failed_command"),
        ("key-3", "confirmed"),
    ]


async def test_who_sent_it_from_where_goes_along(store: LoopStore) -> None:
    class _Listening(_Failing):
        heard: Any = None

        async def execute(self, request: ControlRequest) -> ControlResult:
            self.heard = request
            return documents.RESULT  # type: ignore[return-value]  # a valid one

    transport = _Listening(NoAnswer("unused"))

    await send(transport, store, request())

    validate("control_request", transport.heard)
    assert transport.heard["provenance"]["managerId"] == "opsmgr"
    assert transport.heard["provenance"]["host"]
    assert transport.heard["provenance"]["attempt"] == 1


# No outcome.


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request("approve", expectedRunId="another"), RunMismatch),
        (request("approve", requestedBy="two\nlines"), ActorInvalid),
    ],
)
async def test_a_refusal_is_recorded_as_failed_with_its_reason_and_raised(
    transport: LocalTransport, store: LoopStore, repo: Path, asked: Any, error: type[OpsError]
) -> None:
    with pytest.raises(error) as refused:
        await send(transport, store, asked)

    found = record(store)
    assert (found["status"], found["confirmed"]) == ("failed_command", False)
    assert found["commandOutput"] == f"{error.reason}: {refused.value}"
    assert not {"command", "exitCode", "confirmExitCode", "confirm", "note", "traceId"} & found.keys()
    assert executions(repo) == 0


async def test_without_a_runtime_nothing_is_run_and_that_is_recorded(
    repo: Path, store: LoopStore, tmp_path: Path
) -> None:
    transport = LocalTransport(repo, runtime=None, state_folder=tmp_path / "state")

    with pytest.raises(RuntimeMissing):
        await send(transport, store, request())
    await transport.close()

    assert record(store)["status"] == "failed_command"


async def test_a_key_of_another_request_is_refused_and_that_is_recorded(
    transport: LocalTransport, store: LoopStore, repo: Path
) -> None:
    await send(transport, store, request())
    with pytest.raises(IdempotencyKeyReused):
        await send(transport, store, request(requestedBy="grace"))

    assert [entry["status"] for entry in records(store)] == ["confirmed", "failed_command"]
    assert executions(repo) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoAnswer("no answer from unix:a.sock"), "ambiguous"),
        (InternalError("internal error", error_id="e1"), "ambiguous"),
        (ControlBusy("another command runs", retry_after=1.0), "failed_command"),
        (TransportRefused("no such method"), "failed_command"),
    ],
)
async def test_what_may_have_run_is_recorded_as_ambiguous_and_what_did_not_as_failed(
    store: LoopStore, error: OpsError, status: str
) -> None:
    transport: Transport = _Failing(error)

    with pytest.raises(type(error)):
        await send(transport, store, request())

    found = record(store)
    assert (found["status"], found["confirmed"], found["transport"]) == (status, False, "sprite_service")
    assert found["commandOutput"] == f"{error.reason}: {error}"


async def test_an_error_whose_trailer_says_it_may_have_run_is_recorded_as_ambiguous(store: LoopStore) -> None:
    error = ControlBusy("still being worked on")
    error.executed = None

    with pytest.raises(ControlBusy):
        await send(_Failing(error), store, request())

    assert record(store)["status"] == "ambiguous"


async def test_no_error_says_that_nothing_was_run_when_something_was(
    transport: LocalTransport, store: LoopStore, repo: Path
) -> None:
    store.intents.mkdir(parents=True)  # so that the record can't be written

    try:
        await send(transport, store, request())
    except OpsError as error:
        assert executions(repo) == 0 or error.executed is not False  # noqa: PT017  # either way is right


# The outbox.


class _Losing(LocalTransport):
    """The local transport, which loses answers on the way back, or requests on the way there."""

    def __init__(self, repo: Path, state: Path, *lost: str) -> None:
        super().__init__(repo, runtime=str(STANDIN), state_folder=state)
        self.lost = list(lost)
        self.sent: list[Any] = []

    async def execute(self, request: ControlRequest) -> ControlResult:
        self.sent.append(request)
        lost = self.lost.pop(0) if self.lost else None
        if lost == "request":
            raise NoAnswer("no answer: the request was lost")
        result = await super().execute(request)
        if lost == "answer":
            raise NoAnswer("no answer: the answer was lost")
        return result

    async def get_control(self, loop_id: str, key: str) -> ControlResult:
        if self.lost and self.lost[0] == "all":
            raise NoAnswer("no answer: the line is down")
        if self.lost and self.lost[0] == "agent":
            raise NotReached("no answer: connection refused", details={})
        return await super().get_control(loop_id, key)


@pytest.fixture
async def losing(repo: Path, tmp_path: Path) -> AsyncIterator[_Losing]:
    transport = _Losing(repo, tmp_path / "state")
    yield transport
    await transport.close()


def row_of(store: LoopStore, key: str = "key-1") -> Row:
    row = Outbox(store).load(key)
    assert row is not None
    return row


async def test_the_row_is_there_before_the_first_send(store: LoopStore) -> None:
    class _Looking(_Failing):
        found: Row | None = None

        async def execute(self, request: ControlRequest) -> ControlResult:
            self.found = row_of(store)
            assert self.found.request == request
            return documents.RESULT  # type: ignore[return-value]  # a valid one

    transport = _Looking(NoAnswer("unused"))

    await send(transport, store, request(), address="unix:a.sock")

    assert transport.found is not None
    assert (transport.found.state, transport.found.attempts) == ("pending", 1)
    assert (transport.found.transport, transport.found.address) == ("sprite_service", "unix:a.sock")
    assert row_of(store).state == "done"


async def test_without_a_row_on_disk_nothing_is_sent(losing: _Losing, store: LoopStore, repo: Path) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / "outbox").touch()

    with pytest.raises(InputInvalid) as refused:
        await send(losing, store, request())

    assert refused.value.executed is False
    assert losing.sent == []
    assert executions(repo) == 0


async def test_a_frozen_loop_gets_no_row(losing: _Losing, store: LoopStore) -> None:
    save_memory(store, AgentMemory(frozen="the journal went back"))

    with pytest.raises(AgentStateRolledBack):
        await send(losing, store, request())

    assert losing.sent == []
    assert Outbox(store).load("key-1") is None


async def test_a_lost_answer_is_asked_for_by_the_key(losing: _Losing, store: LoopStore, repo: Path) -> None:
    losing.lost = ["answer"]

    result = await send(losing, store, request())

    assert (result["status"], len(losing.sent)) == ("confirmed", 1)
    assert executions(repo) == 1
    assert record(store)["status"] == "confirmed"
    assert row_of(store).state == "done"


async def test_a_lost_request_is_sent_again_the_same_but_for_its_attempt(
    losing: _Losing, store: LoopStore, repo: Path
) -> None:
    losing.lost = ["request"]

    await send(losing, store, request())

    first, again = losing.sent
    assert first == {**again, "provenance": {**again["provenance"], "attempt": 1}}
    assert again["provenance"]["attempt"] == 2
    assert executions(repo) == 1


async def test_a_line_that_stays_down_leaves_a_row_that_is_resumed(
    losing: _Losing, store: LoopStore, repo: Path
) -> None:
    losing.lost = ["answer", "all"]
    with pytest.raises(NoAnswer):
        await send(losing, store, request())
    left = row_of(store)
    assert (left.state, left.error) == (
        "unknown",
        {"reason": "NO_ANSWER", "message": "no answer: the answer was lost"},
    )
    losing.lost = []

    result = await resume(losing, store, left)

    assert (result["status"], len(losing.sent), executions(repo)) == ("confirmed", 1, 1)
    assert row_of(store).state == "done"
    assert [entry["status"] for entry in records(store)] == ["ambiguous", "confirmed"]


async def test_when_the_agent_is_gone_it_is_not_said_that_nothing_was_sent(
    losing: _Losing, store: LoopStore, repo: Path
) -> None:
    losing.lost = ["answer", "agent"]
    with pytest.raises(NoAnswer) as first:
        await send(losing, store, request())

    with pytest.raises(NoAnswer) as resumed:
        await resume(losing, store, row_of(store))

    for caught in (first, resumed):
        assert (caught.value.reason, caught.value.executed) == ("NO_ANSWER", None)
        assert "nothing was sent" not in caught.value.message
    assert executions(repo) == 1


async def test_after_so_many_lost_requests_it_is_given_up(losing: _Losing, store: LoopStore, repo: Path) -> None:
    losing.lost = ["request"] * 10

    with pytest.raises(NoAnswer):
        await send(losing, store, request())

    assert len(losing.sent) == row_of(store).attempts == SENDS
    assert row_of(store).state == "unknown"
    assert executions(repo) == 0


async def test_a_refusal_leaves_a_row_that_is_not_resumed_and_whose_key_is_free(
    losing: _Losing, store: LoopStore, repo: Path
) -> None:
    with pytest.raises(RunMismatch):
        await send(losing, store, request(expectedRunId="another"))
    assert row_of(store).state == "refused"
    with pytest.raises(InputInvalid, match=r"RUN_MISMATCH.*nothing was run"):
        row_to_resume(store, "key-1")

    await send(losing, store, request())

    assert executions(repo) == 1


async def test_what_the_agent_may_have_forgotten_is_not_said_to_have_run_nothing(
    transport: LocalTransport, store: LoopStore
) -> None:
    long_ago = "2026-01-02T03:04:05Z"
    asked: Any = {**request(requestedAt=long_ago), "provenance": {"managerId": "opsmgr", "host": "here", "attempt": 1}}
    row = Row(request=asked, transport="local", address=None, attempts=1, created_at=long_ago, updated_at=long_ago)
    Outbox(store).save(replace(row, state="unknown"))

    with pytest.raises(RequestTooOld) as refused:
        await resume(transport, store, row)

    assert refused.value.executed is None
    kept = Outbox(store).load("key-1")
    assert kept is not None
    assert kept.state == "unknown"


async def test_what_is_sent_again_is_sent_with_the_expectations_of_its_row(
    losing: _Losing, store: LoopStore, repo: Path
) -> None:
    run_id = json.loads((repo / ".superloop" / "loops" / LOOP / "approval.json").read_bytes())["run_id"]
    losing.lost = ["request", "all"]
    with pytest.raises(NoAnswer):
        await send(losing, store, request(expectedRunId=run_id))
    losing.lost = []

    await send(losing, store, request())

    assert [sent["expectedRunId"] for sent in losing.sent] == [run_id, run_id]


async def test_what_is_not_known_elsewhere_is_not_sent_there(
    losing: _Losing, transport: LocalTransport, store: LoopStore, repo: Path
) -> None:
    losing.lost = ["request", "all"]
    with pytest.raises(NoAnswer):
        await send(losing, store, request(), address="unix:a.sock")

    with pytest.raises(InputInvalid, match="find out there") as refused:
        await resume(transport, store, row_of(store), address="unix:b.sock")

    assert refused.value.executed is None
    assert row_of(store).state == "unknown"
    assert executions(repo) == 0


async def test_an_intent_without_an_outcome_is_named_by_the_next_control_of_the_loop(
    losing: _Losing, store: LoopStore
) -> None:
    losing.lost = ["request", "all"]
    with pytest.raises(NoAnswer):
        await send(losing, store, request())
    losing.lost = []
    told: list[str] = []

    await send(losing, store, request(idempotencyKey="key-2"), tell=told.append)

    [warning] = told
    assert "opsmgr control --resume key-1" in warning


async def test_who_interrupts_it_is_told_the_key(store: LoopStore) -> None:
    begun, told = asyncio.Event(), list[str]()

    class _Hanging(_Failing):
        async def execute(self, request: ControlRequest) -> ControlResult:  # noqa: ARG002  # the Protocol's
            begun.set()
            await asyncio.Event().wait()
            raise AssertionError

    sending = asyncio.create_task(send(_Hanging(NoAnswer("unused")), store, request(), tell=told.append))
    await begun.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending

    assert "opsmgr control --resume key-1" in told[0]
    assert row_of(store).state == "pending"


# Keys and codes.


def test_every_new_key_is_another_one_that_the_contract_accepts() -> None:
    keys = {new_key("approve") for _ in range(100)}

    assert len(keys) == 100
    for key in keys:
        validate("control_request", request(idempotencyKey=key))


@pytest.mark.parametrize(
    ("status", "code"),
    [("confirmed", 0), ("executed_unconfirmed", 0), ("ambiguous", 2), ("failed_command", 1), (None, 2)],
)
def test_the_exit_code_is_the_contracts_for_the_status(status: str | None, code: int) -> None:
    result: Any = {**documents.RESULT, "status": status}

    assert exit_code(result) == code
