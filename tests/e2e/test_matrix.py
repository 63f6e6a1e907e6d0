"""The same loop tells the same, and does the same, by whichever way it is reached."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.intents.control import send
from opsmgr.passes.reconcile import ReconcileOptions, reconcile
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import OpsError
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.waiting import DEADLINE, until
from support.ways import LOCAL, WAYS, differences, reached

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from support.ways import Reached

Json = dict[str, Any]


# What is asked, whichever way.


async def look(at: Reached, *, lived: bool = False) -> Json:
    """The snapshot, and every event or malformed record of the log."""
    snapshot = await at.transport.snapshot(LOOP, trace_id="trace-1")
    query = EventQuery(loop_id=LOOP, trace_id="trace-1", skip_malformed=True)
    batches = [batch async for batch in at.transport.events(query)]
    seen = {
        "snapshot": snapshot.envelope,
        "findings": [str(finding) for finding in snapshot.findings],
        "events": [each for batch in batches for each in batch.events],
        "skipped": [str(record) for batch in batches for record in batch.skipped],
    }
    scrubbed: Json = at.scrub(seen, lived=lived)
    return scrubbed


async def passed(at: Reached) -> Json | None:
    """One reconcile; why it failed, if it did."""
    return await failure(at, reconcile(at.transport, at.store, ReconcileOptions(loop_id=LOOP, trace_id="trace-1")))


async def failure(at: Reached, attempt: Awaitable[object]) -> Json | None:
    """How an attempt fails, as the one who asked is told; None: it does not."""
    try:
        await attempt
    except OpsError as error:
        told = {"reason": error.reason, "message": error.message, "executed": error.executed, "details": error.details}
        scrubbed: Json = at.scrub(told)
        return scrubbed
    return None


async def controlled(at: Reached, intent: str, **members: Any) -> Json:
    """What comes of an intent, scrubbed."""
    request: Any = {
        "loopId": LOOP,
        "intent": intent,
        "requestedBy": "ada",
        "note": "looked at it",
        "traceId": "trace-2",
        "idempotencyKey": f"key-of-{intent}",
        "confirmation": {"mode": "wait", "timeoutSeconds": DEADLINE, "requiredEffect": "decision_recorded"},
        **members,
    }
    scrubbed: Json = at.scrub(await send(at.transport, at.store, request), lived=True)
    return scrubbed


# The loops.


@pytest.fixture(scope="module")
def awaiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo whose run has ended and asks for approval."""
    repo = tmp_path_factory.mktemp("awaiting")
    run(repo)
    return repo


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo whose run has ended, and needed no approval."""
    repo = tmp_path_factory.mktemp("complete")
    run(repo, "--no-approval")
    return repo


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo without a loop: scenarios write theirs."""
    return tmp_path_factory.mktemp("empty")


def started(repo: Path) -> LoopFiles:
    """A loop that has just begun, in a repo without one."""
    loop = LoopFiles(repo)
    loop.append(line(event("loop_start")))
    return loop


def run(repo: Path, *words: str) -> None:
    """Has the stand-in run a loop to its end."""
    command = [str(STANDIN), "run", "--repo", str(repo), "--loop", LOOP, "--run-id", "run-1", *words]
    subprocess.run(command, check=True, timeout=DEADLINE, stdin=subprocess.DEVNULL, capture_output=True)


class Matrix:
    """Copies of a repo, one for each way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def alike(self, original: Path, play: Callable[[Reached], Awaitable[Json]]) -> Json:
        """What a scenario gives; that it does so by each way has been asserted."""
        for way in WAYS:
            shutil.copytree(original, self._folder / way / "repo")
        accounts = dict(zip(WAYS, await asyncio.gather(*(self._played(way, play) for way in WAYS)), strict=True))
        for way in WAYS:
            unlike = differences(accounts[LOCAL], accounts[way], way)
            assert not unlike, "\n".join(unlike)
        return accounts[LOCAL]

    async def _played(self, way: str, play: Callable[[Reached], Awaitable[Json]]) -> Json:
        async with reached(way, self._folder / way) as at:
            return await play(at)


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    return Matrix(tmp_path)


# The scenarios.


async def test_an_approve_is_told_and_recorded_alike(matrix: Matrix, awaiting: Path) -> None:
    told = await matrix.alike(awaiting, decided_by("approve"))

    assert told["waiting"]["state.json"]["projection"]["hasPendingApproval"]
    assert told["result"]["status"] == "confirmed"
    assert told["again"] == {**told["result"], "replayed": True}
    assert told["after"]["findings"] == []
    assert told["after"]["events"][-1]["event"]["status"] == "approved"
    assert not told["written"]["state.json"]["projection"]["hasPendingApproval"]
    assert [record["status"] for record in told["written"]["intents.jsonl"]] == ["confirmed", "confirmed"]


async def test_a_reject_is_told_and_recorded_alike(matrix: Matrix, awaiting: Path) -> None:
    told = await matrix.alike(awaiting, decided_by("reject"))

    assert told["result"]["confirmation"]["reason"] == "rejection_observed"
    assert told["again"] == {**told["result"], "replayed": True}
    assert told["after"]["events"][-1]["event"]["status"] == "rejected"
    assert told["written"]["intents.jsonl"][0]["note"] == "looked at it"


async def test_a_cancel_of_what_runs_is_told_and_recorded_alike(
    matrix: Matrix, empty: Path, hanging: Callable[[Path], None]
) -> None:
    async def play(at: Reached) -> Json:
        await asyncio.to_thread(hanging, at.repo)
        seen = await look(at, lived=True)
        await passed(at)
        running = at.written(lived=True)
        result = await controlled(at, "cancel")
        await passed(at)
        after = await look(at, lived=True)
        return {"seen": seen, "running": running, "result": result, "after": after, "written": at.written(lived=True)}

    told = await matrix.alike(empty, play)

    assert told["running"]["state.json"]["projection"]["status"] == "running"
    assert told["result"]["confirmation"]["reason"] == "inactive_not_running"
    assert told["after"]["events"] == told["seen"]["events"]
    assert told["written"]["state.json"]["projection"]["status"] != "running"


async def test_refusals_are_told_and_recorded_alike(matrix: Matrix, complete: Path) -> None:
    async def play(at: Reached) -> Json:
        nobody_asks = await failure(at, controlled(at, "approve"))
        not_this_run = await failure(at, controlled(at, "cancel", expectedRunId="another"))
        no_such_loop = await failure(at, at.transport.snapshot("other"))
        no_such_key = await failure(at, at.transport.get_control(LOOP, "no-such-key"))
        return {
            "refusals": [nobody_asks, not_this_run, no_such_loop, no_such_key],
            "written": at.written(),
        }

    told = await matrix.alike(complete, play)

    assert [each["reason"] for each in told["refusals"]] == [
        "APPROVAL_NOT_PENDING",
        "RUN_MISMATCH",
        "LOOP_NOT_FOUND",
        "CONTROL_NOT_FOUND",
    ]
    assert [record["status"] for record in told["written"]["intents.jsonl"]] == ["failed_command"] * 2


async def test_a_loop_that_is_complete_is_told_alike(matrix: Matrix, complete: Path) -> None:
    told = await matrix.alike(complete, watched)

    assert told["written"]["state.json"]["projection"]["status"] == "complete"
    assert told["written"]["state.json"]["transition"]["triggeringSignal"] == "event:loop_complete"
    assert told["written"]["health.json"]["status"] == "healthy"


async def test_a_line_that_is_no_event_fails_alike(matrix: Matrix, empty: Path) -> None:
    async def play(at: Reached) -> Json:
        loop = started(at.repo)
        first = await watched(at)
        loop.append(b'{"event": "no time"}\n', line(event("loop_complete")))
        return {"first": first, **await watched(at)}

    told = await matrix.alike(empty, play)

    assert told["first"]["failure"] is None
    assert told["failure"]["reason"] == "EVENT_MALFORMED"
    assert len(told["seen"]["skipped"]) == 1
    assert [told["written"][name] for name in ("state.json", "cursor.json")] == [
        told["first"]["written"][name] for name in ("state.json", "cursor.json")
    ]
    assert "events_unavailable" in str(told["written"]["health.json"])
    assert [record["category"] for record in told["written"]["escalations.jsonl"]][-1].startswith("health_")


async def test_another_log_in_the_place_of_the_one_is_told_alike(matrix: Matrix, empty: Path) -> None:
    async def play(at: Reached) -> Json:
        loop = started(at.repo)
        first = await watched(at)
        loop.replace(line(event("loop_start", run_id="run-2")) + line(event("loop_complete", run_id="run-2")))
        return {"first": first, **await watched(at)}

    told = await matrix.alike(empty, play)

    assert told["failure"] is None
    assert "log_replaced" in [record["category"] for record in told["written"]["escalations.jsonl"]]
    assert told["written"]["state.json"]["run"]["runId"] == "run-2"


async def test_a_divergence_is_told_alike(matrix: Matrix, empty: Path) -> None:
    async def play(at: Reached) -> Json:
        loop = started(at.repo)
        loop.summarize({"run_id": "run-1", "iteration": 1, "completion_ok": True})
        loop.ask_approval()
        put(loop.state, {"active": False})
        return await watched(at)

    told = await matrix.alike(empty, play)

    assert told["written"]["state.json"]["divergence"]["flags"]["approvalCompletionConflict"]
    assert told["written"]["health.json"]["reasonCodes"] == ["divergence_detected", "ingest_stale"]
    assert [record["category"] for record in told["written"]["escalations.jsonl"]] == [
        "divergence_detected",
        "health_critical",
    ]


async def watched(at: Reached) -> Json:
    """What is seen, what a reconcile says and what it writes."""
    return {"seen": await look(at), "failure": await passed(at), "written": at.written()}


def decided_by(intent: str) -> Callable[[Reached], Awaitable[Json]]:
    """A decision on what awaits one, asked for twice."""

    async def play(at: Reached) -> Json:
        before = await look(at)
        await passed(at)
        waiting = at.written()
        result = await controlled(at, intent)
        await passed(at)
        return {
            "before": before,
            "waiting": waiting,
            "result": result,
            "again": await controlled(at, intent),
            "after": await look(at, lived=True),
            "written": at.written(lived=True),
        }

    return play


@pytest.fixture
def hanging() -> Iterator[Callable[[Path], None]]:
    """Starts runs that hang in their first role; they end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(repo: Path) -> None:
        command = [str(STANDIN), "run", "--repo", str(repo), "--loop", LOOP, "--run-id", "run-1", "--hang"]
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0))
        log = repo / ".superloop/loops" / LOOP / "events.jsonl"
        until(lambda: log.exists() and b"role_start" in log.read_bytes(), "the run is in its first role")

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE)
