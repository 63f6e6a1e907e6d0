"""T3, T4, T5: the same key asked for at once, a key used for something else, and decisions that race each other."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract import clock
from sprite_agent.control.journal_file import read_audit
from sprite_agent.errors import ControlNotFound, IdempotencyKeyReused
from sprite_agent.face.server import running
from sprite_agent.repo import Repo
from support.control_history import ControlHistory
from support.driving import RUNTIME, Controlled, Driver, decision
from support.figures import found, scaled
from support.repos import LOOP, event, line, put
from support.runtime import SKIPS, executions, request, script, this_python_first, turn
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.contract.envelopes import ControlRequest
    from sprite_agent.face.config import ServeConfig
    from support.control_history import Call
    from support.repos import Json, LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
LONG = pytest.mark.timeout(scaled(240, 7200))


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


# T3

CALLERS = 64


@LONG
async def test_of_many_callers_at_once_one_has_a_key_run_and_all_get_its_result(
    config: ServeConfig, repo: LoopFiles
) -> None:
    rounds = scaled(20, 1_000)
    repo.append(line(event("approval_requested")))
    history = ControlHistory()
    config = dataclasses.replace(config, max_control_rate=CALLERS * rounds)

    async def ask(transport: SpriteServiceTransport, document: Json) -> bool:
        attempt = history.attempt(document)
        answer = await transport.execute(cast("ControlRequest", attempt))
        history.answered(attempt, answer)
        return answer["replayed"]

    async with running(config) as address, contextlib.AsyncExitStack() as stack:
        managers = [
            SpriteServiceTransport(address, token=TOKEN, policy=RetryPolicy(attempts=1)) for _ in range(CALLERS // 4)
        ]
        for manager in managers:
            stack.push_async_callback(manager.close)
        for number in range(rounds):
            repo.ask_approval(iteration=number)
            document = decision()
            replayed = await asyncio.gather(*[ask(managers[caller // 4], document) for caller in range(CALLERS)])
            assert Counter(replayed) == {True: CALLERS - 1, False: 1}

    ran = executions(repo)
    history.check(ran, read_audit(config.state_folder / "journal.sqlite3"))
    found("T3", f"{CALLERS} callers x {rounds} rounds: {len(ran)} executions, {CALLERS - 1} replayed in each round")
    assert len(ran) == rounds


# T4

EXECUTING, EXECUTED, DONE = "executing", "executed", "done"


def everything(approval: Path) -> Json:
    """A request that says all that one can say."""
    return request(
        note="well done",
        traceId="trace-1",
        confirmation={"mode": "wait", "timeoutSeconds": 2, "requiredEffect": "completed"},
        provenance={"managerId": "manager-1", "host": "host-1", "attempt": 1},
        expectedRunId="run-1",
        expectedIteration=1,
        expectedApprovalDigest=hashlib.sha256(approval.read_bytes()).hexdigest(),
        requestedAt=clock.now(),
    )


MEANING: dict[str, Callable[[Json], Json]] = {
    "intent": lambda base: {**base, "intent": "reject"},
    "requestedBy": lambda base: {**base, "requestedBy": "eve"},
    "note": lambda base: {**base, "note": "well done "},
    "no note": lambda base: _without(base, "note"),
    "expectedRunId": lambda base: {**base, "expectedRunId": "run-2"},
    "no expectedRunId": lambda base: _without(base, "expectedRunId"),
    "expectedIteration": lambda base: {**base, "expectedIteration": 2},
    "no expectedIteration": lambda base: _without(base, "expectedIteration"),
    "expectedApprovalDigest": lambda base: {**base, "expectedApprovalDigest": "0" * 64},
    "no expectedApprovalDigest": lambda base: _without(base, "expectedApprovalDigest"),
    "confirmation.mode": lambda base: {**base, "confirmation": SKIPS},
    "confirmation.requiredEffect": lambda base: _confirming(base, requiredEffect="decision_recorded"),
}
"""Changes that make another request of it."""
CIRCUMSTANCES: dict[str, Callable[[Json], Json]] = {
    "traceId": lambda base: {**base, "traceId": "trace-2"},
    "no traceId": lambda base: _without(base, "traceId"),
    "provenance": lambda base: {**base, "provenance": {"managerId": "manager-2", "host": "host-2", "attempt": 2}},
    "no provenance": lambda base: _without(base, "provenance"),
    "requestedAt": lambda base: {**base, "requestedAt": "2026-01-02T03:04:06Z"},
    "no requestedAt": lambda base: _without(base, "requestedAt"),
    "confirmation.timeoutSeconds": lambda base: _confirming(base, timeoutSeconds=1),
    "no confirmation": lambda base: _without(base, "confirmation"),
}
"""Changes after which it is the same request."""
PLACE = {"loopId", "idempotencyKey"}
"""What says which row is meant; with another value it is another row."""


def _without(base: Json, member: str) -> Json:
    return {name: value for name, value in base.items() if name != member}


def _confirming(base: Json, **members: Any) -> Json:
    return {**base, "confirmation": {**base["confirmation"], **members}}


def test_no_member_of_a_request_is_left_out_here() -> None:
    schema = json.loads((Path(__file__).parents[2] / "schema/control_request.schema.json").read_text())
    members = set(schema["properties"]) - {"confirmation"}
    members |= {f"confirmation.{name}" for name in schema["properties"]["confirmation"]["properties"]}

    assert {name for name in {*MEANING, *CIRCUMSTANCES} if not name.startswith("no ")} | PLACE == members


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Holds up the command until something is written to it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    return gate


@pytest.fixture
def core(repo: LoopFiles, gate: Path, tmp_path: Path) -> Iterator[Repo]:
    """The repo with a command that has no effect."""
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    runtime = script(tmp_path / "superloop", f"echo ran >> {tmp_path}/ran; read line < {gate}")
    core = Repo(repo.repo, state_folder=tmp_path / "state", runtime=runtime)
    yield core
    core.close()


@pytest.mark.parametrize("state", [EXECUTING, EXECUTED, DONE])
def test_a_key_is_of_one_request_however_far_it_has_got(
    core: Repo, repo: LoopFiles, gate: Path, tmp_path: Path, state: str
) -> None:
    base = everything(repo.approval)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(core.execute, base)
        if state != EXECUTING:
            gate.write_text("go on\n")
        until(lambda: state_of(core) == state, f"it is {state}")

        for change in MEANING.values():
            with pytest.raises(IdempotencyKeyReused) as reused:
                core.execute(change(base))
            assert reused.value.executed is False
        same = [pool.submit(core.execute, change(base)) for change in CIRCUMSTANCES.values()]

        if state == EXECUTING:
            gate.write_text("go on\n")
        for answer in same:
            assert answer.result() == {**asked.result(), "replayed": True}
    assert (tmp_path / "ran").read_text() == "ran\n"
    found(
        "T4",
        f"{len(MEANING)} changes of the request of a key that is {state}: refused, 0 executions; {len(same)}: answered",
    )


def state_of(core: Repo) -> str:
    """How far key-1 has got."""
    with contextlib.suppress(ControlNotFound):
        return core.get_control(LOOP, "key-1")["state"]
    return "unknown"


# T5


def decided(loop: LoopFiles) -> list[Json]:
    """Every decision that the runtime has recorded."""
    return [json.loads(text) for text in (loop.folder / "decisions.jsonl").read_text().splitlines()]


def last_words(controlled: Controlled, asked: list[Json]) -> list[Call]:
    """What became of each; who was told to come again, as it is on a slow machine, did."""
    for document in asked:
        while latest(controlled, document).reason == "CONTROL_BUSY":
            controlled.ask(document)
    return [latest(controlled, document) for document in asked]


def latest(controlled: Controlled, document: Json) -> Call:
    """The last attempt at it."""
    key = document["idempotencyKey"]
    return next(call for call in reversed(controlled.history.calls) if call.request["idempotencyKey"] == key)


def check_round(controlled: Controlled, calls: list[Call]) -> None:
    """Fails unless one decision was made, that one is recorded, the other was refused, and the cancel was run."""
    by_intent = {call.request["intent"]: call for call in calls}
    cancelled = by_intent.pop("cancel").answer
    assert cancelled is not None
    assert (cancelled["executed"], cancelled["exitCode"]) == (True, 0)
    assert not controlled.loop.state.exists()

    (winner,) = [call.answer for call in by_intent.values() if call.answer is not None]
    (loser,) = [call for call in by_intent.values() if call.answer is None]
    assert (loser.reason, loser.executed) == ("APPROVAL_NOT_PENDING", False)
    assert (winner["status"], winner["reason"], winner["exitCode"]) == ("confirmed", REASONS[winner["intent"]], 0)
    approval = json.loads(controlled.loop.approval.read_bytes())
    assert approval["decision"]["by"] in winner["command"]
    assert approval["status"] == {"approve": "approved", "reject": "rejected"}[winner["intent"]]
    assert decided(controlled.loop)[-1]["by"] == approval["decision"]["by"]


REASONS = {"approve": "decision_observed", "reject": "rejection_observed"}


@LONG
def test_of_an_approve_and_a_reject_one_is_made_whatever_is_cancelled_meanwhile(tmp_path: Path) -> None:
    rounds = scaled(40, 200)
    chance = random.Random(5)  # noqa: S311  # the same order each time
    won: Counter[str] = Counter()
    with Driver() as first, Driver() as second, Driver() as third, ThreadPoolExecutor() as pool:
        drivers = (first, second, third)
        controlled = Controlled(tmp_path, first)
        controlled.runtime = RUNTIME
        turn(controlled.loop)
        for number in range(rounds):
            controlled.loop.ask_approval(iteration=number)
            put(controlled.loop.state, {"active": True, "current_loop_id": LOOP})
            asked = [decision("approve"), decision("reject"), decision("cancel", confirmation=SKIPS)]
            chance.shuffle(asked)
            if number % 2:
                controlled.ask(*asked)
            else:
                list(pool.map(lambda document, driver: controlled.ask(document, driver=driver), asked, drivers))

            calls = last_words(controlled, asked)
            check_round(controlled, calls)
            won.update(call.request["intent"] for call in calls if call.answer is not None)

    assert len(decided(controlled.loop)) == rounds
    found("T5", f"{rounds} races, half of them of 3 processes: {won['approve']} approved, {won['reject']} rejected")
