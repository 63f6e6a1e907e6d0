"""One reconcile brings a loop's files up to date, or leaves state and cursor alone and says why."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.errors import InputInvalid, LoopLocked, NoAnswer
from opsmgr.passes.feed import MOST_RECORDS
from opsmgr.passes.reconcile import ReconcileOptions, reconcile
from opsmgr.store import LoopStore, append, default_folder
from opsmgr.transport.local import LocalTransport
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract import clock
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError, CursorBeyondEnd, EventMalformed, EventsNotFound, LoopNotFound, OpsError
from support.repos import LOOP, LoopFiles, event, line, lines, put
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

    from opsmgr.transport.base import Snapshot, Transport, TransportName
    from sprite_agent.contract.streaming import EventBatch, EventQuery

Json = dict[str, Any]

TELEMETRY_KEYS = [
    "timestamp",
    "startedAt",
    "loopId",
    "traceId",
    "transport",
    "status",
    "failureCode",
    "failureMessage",
    "cursorOffsetBefore",
    "cursorOffsetAfter",
    "eventsIngested",
    "maxEvents",
    "fromStart",
    "retryAttempts",
    "retryBackoffSeconds",
    "thresholdProfile",
    "durationSeconds",
    "transportFailureStreak",
    "healthStatus",
    "healthReasonCodes",
]
TRANSPORT_HEALTH_KEYS = [
    "schemaVersion",
    "updatedAt",
    "traceId",
    "transport",
    "lastResult",
    "failureStreak",
    "lastFailureCode",
    "lastSuccessAt",
    "lastFailureAt",
]


class _Meanwhile(LocalTransport):
    """The local transport, with something that happens right after the next snapshot was taken."""

    happens: Callable[[], None] | None = None

    async def snapshot(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> Snapshot:
        found = await super().snapshot(loop_id, trace_id=trace_id, run_id=run_id)
        if self.happens is not None:
            self.happens()
            self.happens = None
        return found


AND_DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from opsmgr.passes.reconcile import ReconcileOptions, reconcile
from opsmgr.store import LoopStore
from opsmgr.transport.local import LocalTransport

repo, journal, folder, last = sys.argv[1:]
replace = Path.replace

def replace_and_die(source, target):
    replace(source, target)
    if target.name == last:
        os.kill(os.getpid(), signal.SIGKILL)

Path.replace = replace_and_die
transport = LocalTransport(Path(repo), state_folder=Path(journal))
asyncio.run(reconcile(transport, LoopStore(Path(folder)), ReconcileOptions(loop_id="demo")))
"""


def _reconcile_and_die(loop: LoopFiles, store: LoopStore, last: str) -> None:
    """Reconciles in a process of its own, which is killed right after it has saved the file `last`."""
    words = [loop.repo, loop.repo.parent / "journal", store.folder, last]
    killed = subprocess.run([sys.executable, "-c", AND_DIE, *map(str, words)], check=False, timeout=DEADLINE)
    assert killed.returncode == -signal.SIGKILL


class _Manager:
    """A manager of the one loop in a repo. What it has written is valid after every reconcile."""

    def __init__(self, loop: LoopFiles, transport: Transport) -> None:
        self.store = LoopStore(default_folder(loop.repo, LOOP))
        self.transport = transport

    async def reconcile(self, **options: Any) -> Json:
        before = self._documents()
        try:
            return await reconcile(self.transport, self.store, ReconcileOptions(loop_id=LOOP, **options))
        finally:
            for kind, content in self._documents().items() - before.items():
                validate(kind, json.loads(content))

    async def fails(self, error: type[OpsError], **options: Any) -> OpsError:
        with pytest.raises(error) as raised:
            await self.reconcile(**options)
        return raised.value

    def _documents(self) -> dict[str, bytes]:
        paths = {
            "manager_state": self.store.state,
            "manager_cursor": self.store.cursor,
            "manager_health": self.store.health,
            "manager_heartbeat": self.store.heartbeat,
            "manager_sequence": self.store.sequence,
        }
        return {kind: path.read_bytes() for kind, path in paths.items() if path.exists()}

    @property
    def state(self) -> Json:
        return dict(json.loads(self.store.state.read_bytes()))

    @property
    def cursor(self) -> Json:
        return dict(json.loads(self.store.cursor.read_bytes()))

    @property
    def health(self) -> Json:
        return dict(json.loads(self.store.health.read_bytes()))

    @property
    def transport_health(self) -> Json:
        return dict(json.loads(self.store.transport_health.read_bytes()))

    @property
    def telemetry(self) -> list[Json]:
        return read_log(self.store.reconcile_telemetry)

    @property
    def escalations(self) -> list[Json]:
        return read_log(self.store.escalations)

    @property
    def categories(self) -> list[str]:
        return [escalation["category"] for escalation in self.escalations]


def read_log(path: Path) -> list[Json]:
    return [json.loads(entry) for entry in path.read_text().splitlines()] if path.exists() else []


def fresh(name: str = "usage_check", **members: Any) -> bytes:
    """A line of the log that was written just now."""
    return line(event(name, **{"timestamp": clock.now(), **members}))


def old(name: str = "usage_check", *, seconds: int) -> bytes:
    return fresh(name, timestamp=(datetime.now(UTC) - timedelta(seconds=seconds)).isoformat())


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    """A loop at work that has said two things."""
    loop = LoopFiles(tmp_path / "repo")
    put(loop.state, {"active": True, "current_loop_id": LOOP, "iteration": 1})
    loop.append(fresh("loop_start"), fresh("iteration_start"))
    return loop


@pytest.fixture
async def transport(loop: LoopFiles, tmp_path: Path) -> AsyncIterator[_Meanwhile]:
    transport = _Meanwhile(loop.repo, state_folder=tmp_path / "state")
    yield transport
    await transport.close()


@pytest.fixture
def manager(loop: LoopFiles, transport: _Meanwhile) -> _Manager:
    return _Manager(loop, transport)


# What goes well.


async def test_a_first_reconcile_takes_everything_the_log_has(manager: _Manager, loop: LoopFiles) -> None:
    state = await manager.reconcile()

    assert state["transition"] == {
        "previousState": "none",
        "triggeringSignal": "event:iteration_start",
        "currentState": "running",
        "confidence": "high",
    }
    assert state["divergence"]["any"] is False
    assert state["sequence"]["status"] == "ok"
    assert (state["sequence"]["lastSnapshotSequence"], state["sequence"]["lastEventSequence"]) == (2, 2)
    assert manager.state == json.loads(json.dumps(state))
    assert manager.health == state["health"]
    assert manager.health["status"] == "healthy"
    assert manager.escalations == []


async def test_the_cursor_names_the_last_event_and_where_to_go_on(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()

    cursor = manager.cursor
    assert (cursor["eventLineOffset"], cursor["eventLineCount"]) == (2, 2)
    assert (cursor["repoPath"], cursor["loopId"]) == (str(loop.repo), LOOP)
    assert cursor["eventsFile"] == ".superloop/loops/demo/events.jsonl"
    assert cursor["resumeToken"].startswith("r1.")


async def test_a_second_reconcile_without_anything_new_brings_no_event(manager: _Manager) -> None:
    await manager.reconcile()

    state = await manager.reconcile()

    assert state["transition"]["previousState"] == "running"
    assert state["transition"]["triggeringSignal"] == "snapshot_status:running"
    assert state["transition"]["confidence"] == "medium"
    assert state["evidence"]["lastEventEnvelope"] is None
    assert state["sequence"]["violations"] == []
    assert manager.cursor["eventLineOffset"] == 2
    assert [entry["eventsIngested"] for entry in manager.telemetry] == [2, 0]


async def test_a_later_reconcile_takes_only_what_is_new(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()
    loop.append(fresh("role_start", role="planner"), b"\n", fresh("role_end", role="planner"))

    state = await manager.reconcile()

    assert state["evidence"]["lastEventEnvelope"]["event"]["name"] == "role_end"
    assert manager.cursor["eventLineOffset"] == 5
    assert [entry["eventsIngested"] for entry in manager.telemetry] == [2, 2]
    assert manager.escalations == []


async def test_an_empty_log_is_reconciled(manager: _Manager, loop: LoopFiles) -> None:
    loop.rewrite(b"")

    state = await manager.reconcile()

    assert state["cursor"] == {"eventLineOffset": 0, "eventLineCount": 0}
    assert manager.cursor["eventLineOffset"] == 0
    assert manager.health["metrics"]["ingestLagSeconds"] is None


async def test_a_log_of_many_batches_is_taken_whole(manager: _Manager, loop: LoopFiles) -> None:
    loop.append(*[fresh(iteration=number) for number in range(700)])

    state = await manager.reconcile()

    assert manager.telemetry[0]["eventsIngested"] == 702
    assert manager.cursor["eventLineOffset"] == 702
    assert state["sequence"]["violations"] == []


async def test_an_event_over_several_lines_is_taken_once_and_its_last_line_is_the_cursor(
    manager: _Manager, loop: LoopFiles
) -> None:
    usage = lines(event("usage_check", timestamp=clock.now()))
    loop.append(usage)

    await manager.reconcile()
    await manager.reconcile()

    assert [entry["eventsIngested"] for entry in manager.telemetry] == [3, 0]
    assert manager.cursor["eventLineOffset"] == 2 + usage.count(b"\n")


async def test_a_run_id_and_a_trace_id_are_passed_on(manager: _Manager) -> None:
    state = await manager.reconcile(run_id="run-9", trace_id="trace-9")

    assert state["run"]["runId"] == "run-9"
    assert state["trace"] == {"reconcileTraceId": "trace-9"}
    assert state["evidence"]["lastEventEnvelope"]["traceId"] == "trace-9"
    assert manager.health["traceId"] == "trace-9"
    assert manager.transport_health["traceId"] == "trace-9"
    assert manager.telemetry[0]["traceId"] == "trace-9"


async def test_a_cursor_of_the_old_adapters_is_gone_on_from(manager: _Manager) -> None:
    manager.store.folder.mkdir(parents=True)
    put(manager.store.cursor, {"schemaVersion": "v1", "loopId": LOOP, "eventLineOffset": 1})

    await manager.reconcile()

    assert manager.telemetry[0]["eventsIngested"] == 1
    assert manager.cursor["resumeToken"] is not None


async def test_the_checks_of_the_order_and_the_heartbeat_have_files_of_their_own(
    manager: _Manager, loop: LoopFiles
) -> None:
    put(loop.heartbeat, {"timestamp": clock.now(), "pid": 4711, "stage": "planner"})

    state = await manager.reconcile(trace_id="trace-1")

    assert json.loads(manager.store.sequence.read_bytes()) == state["sequence"]
    heartbeat = json.loads(manager.store.heartbeat.read_bytes())
    assert (heartbeat["status"], heartbeat["pid"], heartbeat["stage"]) == ("fresh", 4711, "planner")
    [entry] = read_log(manager.store.heartbeat_telemetry)
    assert list(entry) == [
        *("timestamp", "loopId", "traceId", "transport"),
        *("status", "heartbeatAt", "lagSeconds", "pid", "stage"),
    ]
    [entry] = read_log(manager.store.sequence_telemetry)
    assert list(entry) == [
        *("timestamp", "loopId", "traceId", "transport"),
        *("status", "reasonCode", "driftActive", "violations", "lastSnapshotSequence", "lastEventSequence"),
    ]
    assert (entry["traceId"], entry["lastEventSequence"]) == ("trace-1", 2)


async def test_each_reconcile_that_goes_well_adds_a_line_to_every_telemetry_and_one_that_fails_only_to_its_own(
    manager: _Manager, loop: LoopFiles
) -> None:
    await manager.reconcile()
    await manager.reconcile()
    loop.log.unlink()
    await manager.fails(EventsNotFound)

    assert len(manager.telemetry) == 3
    assert len(read_log(manager.store.sequence_telemetry)) == 2
    assert len(read_log(manager.store.heartbeat_telemetry)) == 2


@pytest.mark.parametrize("reconciles", [0, 1], ids=["at first", "later"])
@pytest.mark.parametrize("survivor", ["state.json", "cursor.json"])
async def test_a_kill_right_after_a_file_was_saved_is_no_drift_of_the_next_reconcile(
    manager: _Manager, loop: LoopFiles, reconciles: int, survivor: str
) -> None:
    for _ in range(reconciles):
        await manager.reconcile()
        loop.append(fresh("role_start"), fresh("role_end"))
    _reconcile_and_die(loop, manager.store, survivor)
    loop.append(fresh("tests_start"))

    state = await manager.reconcile()

    assert state["sequence"]["violations"] == []
    assert manager.cursor["eventLineOffset"] == (5 if reconciles else 3)
    assert "ordering_drift_detected" not in manager.categories


@pytest.mark.parametrize("last", ["state.json", "cursor.json", "sequence-state.json", "health.json"])
async def test_a_kill_right_after_a_file_was_saved_loses_no_escalation(
    manager: _Manager, loop: LoopFiles, last: str
) -> None:
    await manager.reconcile()
    loop.replace(b"".join(fresh(f"new_{number}") for number in range(5)))
    _reconcile_and_die(loop, manager.store, last)

    await manager.reconcile()

    assert "log_replaced" in manager.categories


async def test_a_kill_right_after_the_state_was_saved_loses_no_divergence(manager: _Manager, loop: LoopFiles) -> None:
    loop.append(*(fresh() for _ in range(10)))
    await manager.reconcile()
    loop.replace(fresh("new"))
    _reconcile_and_die(loop, manager.store, "state.json")

    await manager.reconcile()

    assert "divergence_detected" in manager.categories


async def test_a_kill_right_after_the_cursor_of_another_log_was_saved_is_no_drift(
    manager: _Manager, loop: LoopFiles
) -> None:
    loop.append(*(fresh() for _ in range(10)))
    await manager.reconcile()
    loop.replace(fresh("new"))
    _reconcile_and_die(loop, manager.store, "cursor.json")
    loop.append(fresh("role_start"))

    state = await manager.reconcile()

    assert state["sequence"]["violations"] == []
    assert "ordering_drift_detected" not in manager.categories


async def test_an_escalation_that_can_not_be_written_leaves_the_state_as_it_was(
    manager: _Manager, loop: LoopFiles
) -> None:
    loop.append(*(fresh() for _ in range(10)))
    await manager.reconcile()
    before = manager.state
    loop.replace(fresh("new"))
    manager.store.escalations.mkdir()
    await manager.fails(InputInvalid)

    assert manager.state == before
    manager.store.escalations.rmdir()
    await manager.reconcile()
    assert "divergence_detected" in manager.categories


async def test_both_transports_write_the_same_files(repo: LoopFiles, local: Transport, remote: Transport) -> None:
    put(repo.state, {"active": True, "current_loop_id": LOOP, "iteration": 1})
    put(repo.heartbeat, {"timestamp": clock.now(), "pid": 4711, "stage": "planner"})
    folders = {transport.name: repo.repo.parent / transport.name for transport in (local, remote)}
    steps: list[Callable[[], None]] = [
        lambda: repo.append(fresh("loop_start"), fresh("iteration_start")),
        lambda: repo.append(fresh("role_start"), b"[no event]\n"),
        lambda: repo.replace(old("role_start", seconds=4000)),
        repo.state.unlink,
    ]

    for step in steps:
        step()
        for transport in (local, remote):
            with contextlib.suppress(EventMalformed):
                await reconcile(transport, LoopStore(folders[transport.name]), ReconcileOptions(loop_id=LOOP))

    ours, theirs = (_written(folder) for folder in folders.values())
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert len(ours["escalations.jsonl"]) >= 3


def _written(folder: Path) -> dict[str, Any]:
    """What every file of a manager holds, but for times, the transport's name and the agent's journal."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json*")):
        if path.name != "agent.json":
            found[str(path.relative_to(folder))] = [_timeless(json.loads(entry)) for entry in _entries(path)]
    return found


def _entries(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]


def _timeless(value: Any) -> Any:
    varying = {"transport", "mode", "durationSeconds", "timestamp", "emittedAt"}
    if isinstance(value, dict):
        return {
            name: type(member).__name__
            if isinstance(member, str) and (name in varying or name.endswith("At"))
            else member
            for name, member in ((name, _timeless(member)) for name, member in value.items())
            if name not in {"durationSeconds", "lagSeconds", "ingestLagSeconds", "heartbeatLagSeconds", "observed"}
        }
    return [_timeless(member) for member in value] if isinstance(value, list) else value


# What happens between the snapshot and the events.


async def test_events_that_arrive_after_the_snapshot_wait_for_the_next_reconcile(
    manager: _Manager, loop: LoopFiles, transport: _Meanwhile
) -> None:
    transport.happens = lambda: loop.append(fresh("role_start"), fresh("role_end"))

    first = await manager.reconcile()
    cursor = manager.cursor
    second = await manager.reconcile()

    assert first["transition"]["triggeringSignal"] == "event:iteration_start"
    assert (cursor["eventLineOffset"], cursor["eventLineCount"]) == (2, 2)
    assert cursor["resumeToken"].startswith("r1.")
    assert second["transition"]["triggeringSignal"] == "event:role_end"
    assert [entry["eventsIngested"] for entry in manager.telemetry] == [2, 2]
    assert manager.escalations == []


async def test_when_all_events_arrived_after_the_snapshot_none_is_taken_and_none_is_lost(
    manager: _Manager, loop: LoopFiles, transport: _Meanwhile
) -> None:
    await manager.reconcile()
    transport.happens = lambda: loop.append(fresh("role_start"))

    state = await manager.reconcile()
    await manager.reconcile()

    assert state["transition"]["confidence"] == "medium"
    assert [entry["eventsIngested"] for entry in manager.telemetry] == [2, 0, 1]


async def test_a_run_that_ends_after_the_snapshot_is_no_contradiction(
    manager: _Manager, loop: LoopFiles, transport: _Meanwhile
) -> None:
    loop.state.unlink()
    loop.append(fresh("loop_stop"))
    transport.happens = lambda: loop.append(fresh("loop_start"), fresh("role_start"))

    state = await manager.reconcile()

    assert state["divergence"]["any"] is False


async def test_an_event_that_was_half_written_at_the_snapshot_is_taken_whole_by_the_next_reconcile(
    manager: _Manager, loop: LoopFiles, transport: _Meanwhile
) -> None:
    begun, rest = lines(event("usage_check", timestamp=clock.now())).split(b"\n", 1)
    loop.append(begun + b"\n")
    transport.happens = lambda: loop.append(rest)

    await manager.reconcile()
    state = await manager.reconcile()

    assert [entry["eventsIngested"] for entry in manager.telemetry] == [2, 1]
    assert state["transition"]["triggeringSignal"] == "event:usage_check"
    assert manager.escalations == []


async def test_a_malformed_record_right_after_the_snapshot_is_told_by_the_next_reconcile(
    manager: _Manager, loop: LoopFiles, transport: _Meanwhile
) -> None:
    transport.happens = lambda: loop.append(b"[no event]\n")

    await manager.reconcile(skip_malformed=True)
    before = manager.categories
    loop.append(fresh("role_start"))  # no snapshot is taken of a log that ends with such a record
    await manager.reconcile(skip_malformed=True)

    assert (before, manager.categories) == ([], ["event_malformed"])


async def test_a_log_replaced_right_after_the_snapshot_is_noticed_and_no_event_of_it_is_lost(
    manager: _Manager, loop: LoopFiles, transport: _Meanwhile
) -> None:
    await manager.reconcile()
    transport.happens = lambda: loop.replace(b"".join(fresh(f"new_{number}") for number in range(5)))

    await manager.reconcile()
    await manager.reconcile()

    assert "log_replaced" in manager.categories
    assert manager.cursor["eventLineOffset"] == 5
    assert manager.state["projection"]["lastEventName"] == "new_4"


async def test_of_a_log_replaced_while_it_was_read_only_the_new_one_is_taken(
    manager: _Manager, loop: LoopFiles, transport: _Meanwhile, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(*[fresh(f"old_{number}") for number in range(400)])
    whole = transport.events

    async def broken_off(query: EventQuery) -> AsyncGenerator[EventBatch, None]:
        monkeypatch.undo()
        async with contextlib.aclosing(whole(query)) as batches:
            yield await anext(batches)
        loop.replace(b"".join(fresh(f"new_{number}") for number in range(3)))
        raise NoAnswer("the connection broke")

    monkeypatch.setattr(transport, "events", broken_off)

    state = await manager.reconcile()

    assert "log_replaced" in manager.categories
    assert manager.telemetry[0]["eventsIngested"] == 3
    assert manager.telemetry[0]["retryAttempts"] == 1
    assert manager.cursor["eventLineOffset"] == 3
    assert state["sequence"]["violations"] == []


# Bounds.


async def test_no_more_events_are_taken_than_asked_for_and_the_rest_later(manager: _Manager, loop: LoopFiles) -> None:
    loop.append(*[fresh(f"event_{number}") for number in (3, 4, 5)])

    seen = []
    for _ in range(3):
        await manager.reconcile(max_events=2)
        seen.append((manager.telemetry[-1]["eventsIngested"], manager.cursor["eventLineOffset"]))

    assert seen == [(2, 2), (2, 4), (1, 5)]
    assert manager.telemetry[0]["maxEvents"] == 2
    assert "ordering_drift_detected" not in manager.categories


async def test_from_the_start_everything_is_taken_again_without_an_alarm(manager: _Manager) -> None:
    await manager.reconcile()

    state = await manager.reconcile(from_start=True)

    assert [entry["eventsIngested"] for entry in manager.telemetry] == [2, 2]
    assert [entry["fromStart"] for entry in manager.telemetry] == [False, True]
    assert state["sequence"]["violations"] == []
    assert manager.escalations == []


async def test_from_the_start_a_broken_cursor_does_not_matter(manager: _Manager) -> None:
    await manager.reconcile()
    manager.store.cursor.write_bytes(b"broken")

    await manager.reconcile(from_start=True)

    assert manager.cursor["eventLineOffset"] == 2


# A log that is not the one it was.


async def test_a_replaced_log_is_escalated_and_replayed_from_its_first_line(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile(trace_id="before")
    loop.replace(b"".join(fresh(f"new_{number}") for number in range(4)))

    state = await manager.reconcile(trace_id="after")

    [escalation] = manager.escalations
    del escalation["timestamp"]
    evidence = escalation.pop("evidence")
    assert escalation == {"loopId": LOOP, "traceId": "after", "category": "log_replaced", "transport": "local"}
    assert "replaced" in evidence["message"]
    assert evidence["line"] == "2"
    assert manager.telemetry[-1]["eventsIngested"] == 4
    assert (manager.telemetry[-1]["cursorOffsetBefore"], manager.telemetry[-1]["cursorOffsetAfter"]) == (2, 4)
    assert manager.cursor["eventLineOffset"] == 4
    assert state["sequence"]["violations"] == []
    assert state["divergence"]["any"] is False


async def test_a_replaced_log_of_the_same_length_is_noticed(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()
    loop.replace(fresh("loop_start", run_id="run-2") + fresh("iteration_start", run_id="run-2"))

    await manager.reconcile()

    assert manager.categories == ["log_replaced"]
    assert manager.telemetry[-1]["eventsIngested"] == 2


async def test_a_truncated_log_is_escalated_and_replayed_from_its_first_line(
    manager: _Manager, loop: LoopFiles
) -> None:
    await manager.reconcile()
    loop.truncate(len(loop.log.read_bytes().split(b"\n")[0]) + 1)

    state = await manager.reconcile()

    assert manager.categories[0] == "log_truncated"
    assert manager.telemetry[-1]["eventsIngested"] == 1
    assert manager.cursor["eventLineOffset"] == 1
    assert state["divergence"]["flags"]["cursorRegression"] is True


async def test_a_log_rewritten_after_its_first_line_is_escalated_as_such_and_replayed_from_its_first_line(
    manager: _Manager, loop: LoopFiles
) -> None:
    await manager.reconcile()
    first = loop.log.read_bytes().splitlines(keepends=True)[0]
    loop.rewrite(first + b"".join(fresh(f"new_{number}") for number in range(3)))

    state = await manager.reconcile()

    [escalation] = manager.escalations
    assert escalation["category"] == "history_rewritten"
    assert "rewritten" in escalation["evidence"]["message"]
    assert manager.telemetry[-1]["eventsIngested"] == 4
    assert manager.cursor["eventLineOffset"] == 4
    assert state["projection"]["lastEventName"] == "new_2"


async def test_a_log_emptied_in_place_is_a_truncated_one(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()
    loop.truncate(0)

    await manager.reconcile()

    assert manager.categories[0] == "log_truncated"
    assert manager.cursor["eventLineOffset"] == 0


async def test_a_replaced_log_is_escalated_once(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()
    loop.replace(b"".join(fresh(f"new_{number}") for number in range(4)))

    for _ in range(3):
        await manager.reconcile()

    assert manager.categories == ["log_replaced"]


async def test_a_cursor_beyond_the_log_fails_closed_and_says_what_to_do(manager: _Manager) -> None:
    manager.store.folder.mkdir(parents=True)
    put(manager.store.cursor, {"schemaVersion": "v1", "loopId": LOOP, "eventLineOffset": 99})

    error = await manager.fails(CursorBeyondEnd)

    assert "reset it or replay from the start" in error.message
    assert manager.health["transport"]["failureCode"] == "events_unavailable"
    await manager.reconcile(from_start=True)
    assert manager.cursor["eventLineOffset"] == 2


# Divergence and drift.


async def test_a_divergence_is_escalated_on_every_reconcile_that_diverges(manager: _Manager, loop: LoopFiles) -> None:
    loop.state.unlink()

    for _ in range(2):
        loop.append(fresh("role_start"))
        await manager.reconcile()
    loop.append(fresh("loop_stop"))
    await manager.reconcile()

    diverging = [entry for entry in manager.escalations if entry["category"] == "divergence_detected"]
    assert len(diverging) == 2
    assert diverging[0]["evidence"]["flags"]["activeMismatch"] is True
    assert "divergence_detected" not in manager.health["reasonCodes"]


async def test_a_drift_is_escalated_when_it_begins_and_not_while_it_lasts(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()

    async def go_on_after_line(number: int) -> Json:
        put(manager.store.cursor, {"schemaVersion": "v1", "loopId": LOOP, "eventLineOffset": number})
        return await manager.reconcile()

    def drifts() -> int:
        return manager.categories.count("ordering_drift_detected")

    begins = await go_on_after_line(1)
    assert begins["sequence"]["violations"] == ["event_sequence_regression"]
    assert begins["health"]["reasonCodes"] == ["ordering_drift_detected"]
    assert drifts() == 1

    lasts = await go_on_after_line(0)
    assert lasts["sequence"]["driftActive"] is True
    assert drifts() == 1

    ends = await manager.reconcile()
    assert ends["sequence"]["driftActive"] is False
    assert ends["health"]["status"] == "healthy"
    assert drifts() == 1

    await go_on_after_line(1)
    assert drifts() == 2


async def test_a_drift_is_told_with_what_was_violated(manager: _Manager) -> None:
    await manager.reconcile()
    put(manager.store.sequence, {"lastSnapshotSequence": 99, "lastEventSequence": 1})

    await manager.reconcile()

    [drift] = [entry for entry in manager.escalations if entry["category"] == "ordering_drift_detected"]
    assert drift["evidence"] == {"violations": ["snapshot_sequence_regression"]}


# Health.


async def test_health_is_escalated_when_it_changes_and_not_while_it_stays(manager: _Manager, loop: LoopFiles) -> None:
    loop.append(old(seconds=400))
    await manager.reconcile()
    await manager.reconcile()
    assert manager.categories == ["health_degraded"]
    assert manager.escalations[0]["evidence"]["reasons"][0]["code"] == "ingest_stale"

    loop.append(old(seconds=4000))
    await manager.reconcile()
    await manager.reconcile()
    assert manager.categories == ["health_degraded", "health_critical"]

    append(manager.store.intents, {"status": "ambiguous"})
    await manager.reconcile()
    assert manager.categories == ["health_degraded", "health_critical", "health_critical"]
    assert manager.health["reasonCodes"] == ["control_ambiguous", "ingest_stale"]


async def test_a_loop_that_gets_well_is_not_escalated_and_falling_ill_again_is(
    manager: _Manager, loop: LoopFiles
) -> None:
    for text in (old(seconds=400), fresh(), old(seconds=400)):
        loop.append(text)
        await manager.reconcile()

    assert manager.categories == ["health_degraded", "health_degraded"]


@pytest.mark.parametrize(
    ("status", "reasons"),
    [
        ("confirmed", []),
        ("executed_unconfirmed", []),
        ("ambiguous", ["control_ambiguous"]),
        ("failed_command", ["control_failed_command"]),
    ],
)
async def test_the_last_intents_status_is_part_of_the_health(
    manager: _Manager, status: str, reasons: list[str]
) -> None:
    append(manager.store.intents, {"status": "ambiguous"})
    append(manager.store.intents, {"status": status})

    await manager.reconcile()

    assert manager.health["metrics"]["lastControlStatus"] == status
    assert manager.health["reasonCodes"] == reasons


@pytest.mark.parametrize("name", ["timestamp", "updatedAt"])
async def test_a_heartbeat_that_is_old_degrades(manager: _Manager, loop: LoopFiles, name: str) -> None:
    moment = (datetime.now(UTC) - timedelta(seconds=200)).isoformat()
    put(loop.heartbeat, {name: moment, "pid": 1})

    await manager.reconcile()

    assert manager.health["reasonCodes"] == ["runtime_heartbeat_stale"]
    assert manager.health["evidence"]["lastHeartbeatAt"] == moment
    assert 200 <= manager.health["metrics"]["heartbeatLagSeconds"] < 300


@pytest.mark.parametrize("moment", [1771824606, 1771824606.5, True, None, [], {}, "", "soon"])
async def test_a_heartbeat_whose_time_is_none_is_as_good_as_no_heartbeat(
    manager: _Manager, loop: LoopFiles, moment: Any
) -> None:
    put(loop.heartbeat, {"timestamp": moment, "pid": 1})

    await manager.reconcile()

    assert manager.health["metrics"]["heartbeatLagSeconds"] is None
    assert manager.health["status"] == "healthy"


# What fails.


async def test_a_snapshot_that_fails_leaves_state_and_cursor_alone_and_is_told(
    manager: _Manager, loop: LoopFiles
) -> None:
    await manager.reconcile()
    before = (manager.store.state.read_bytes(), manager.store.cursor.read_bytes())
    loop.log.unlink()

    await manager.fails(EventsNotFound, trace_id="trace-2")

    assert (manager.store.state.read_bytes(), manager.store.cursor.read_bytes()) == before
    assert manager.health["transport"] == {
        "mode": "local",
        "ingestStatus": "failed",
        "failureCode": "snapshot_unavailable",
        "lastFailureCode": "snapshot_unavailable",
    }
    assert manager.health["reasonCodes"] == ["transport_unreachable"]
    assert manager.health["metrics"]["lifecycleState"] == "running"
    entry = manager.telemetry[-1]
    assert (entry["status"], entry["failureCode"]) == ("failed", "snapshot_unavailable")
    assert "events.jsonl" in entry["failureMessage"]
    assert (entry["cursorOffsetBefore"], entry["cursorOffsetAfter"], entry["eventsIngested"]) == (2, 2, 0)
    assert manager.categories == ["health_degraded"]


async def test_a_malformed_line_leaves_state_and_cursor_alone_and_is_told(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()
    before = (manager.store.state.read_bytes(), manager.store.cursor.read_bytes())
    loop.append(fresh("role_start"), b"not json\n", fresh("role_end"))

    error = await manager.fails(EventMalformed)

    assert "line 4 of the event log is malformed" in error.message
    assert (manager.store.state.read_bytes(), manager.store.cursor.read_bytes()) == before
    assert manager.health["transport"]["failureCode"] == "events_unavailable"
    entry = manager.telemetry[-1]
    assert (entry["failureCode"], entry["failureMessage"]) == ("events_unavailable", error.message)
    assert (entry["cursorOffsetAfter"], entry["eventsIngested"]) == (2, 0)


async def test_a_malformed_line_is_passed_over_and_told_where_that_is_asked_for(
    manager: _Manager, loop: LoopFiles
) -> None:
    loop.append(b"not json\n", fresh("role_end"))

    for _ in range(2):
        await manager.reconcile(skip_malformed=True)

    assert [entry["eventsIngested"] for entry in manager.telemetry] == [3, 0]
    assert manager.categories == ["event_malformed"]


async def test_of_many_malformed_lines_the_first_are_told_and_the_rest_together(
    manager: _Manager, loop: LoopFiles
) -> None:
    loop.append(b"x\n" * 5000, fresh("role_start"))

    await manager.reconcile(skip_malformed=True)

    told = [escalation["evidence"] for escalation in manager.escalations]
    assert [evidence["firstLine"] for evidence in told] == list(range(3, 3 + MOST_RECORDS + 1))
    assert (told[-1]["lastLine"], told[-1]["records"]) == (5002, 5000 - MOST_RECORDS)


async def test_a_first_reconcile_that_fails_writes_no_state_and_no_cursor(manager: _Manager, loop: LoopFiles) -> None:
    loop.log.unlink()

    await manager.fails(EventsNotFound)

    assert not manager.store.state.exists()
    assert not manager.store.cursor.exists()
    assert manager.health["metrics"]["lifecycleState"] is None
    assert len(manager.telemetry) == 1


async def test_failures_in_a_row_are_counted_up_to_the_next_success(manager: _Manager, loop: LoopFiles) -> None:
    log = loop.log.read_bytes()
    loop.log.unlink()
    severities = []
    for streak in (1, 2, 3, 4):
        await manager.fails(EventsNotFound)
        severities.append(manager.health["status"])
        assert manager.transport_health["failureStreak"] == streak
        assert manager.telemetry[-1]["transportFailureStreak"] == streak
        assert manager.health["metrics"]["transportFailureStreak"] == streak
    assert severities == ["degraded", "degraded", "degraded", "critical"]
    assert manager.categories == ["health_degraded", "health_critical"]

    loop.log.write_bytes(log)
    await manager.reconcile()

    assert manager.transport_health["failureStreak"] == 0
    assert manager.transport_health["lastResult"] == "success"
    assert manager.transport_health["lastFailureCode"] == "snapshot_unavailable"
    assert manager.health["status"] == "healthy"
    assert manager.health["transport"]["lastFailureCode"] == "snapshot_unavailable"


async def test_a_loop_that_is_not_there_fails_and_is_told(manager: _Manager, loop: LoopFiles) -> None:
    loop.log.unlink()
    loop.folder.rmdir()

    error = await manager.fails(LoopNotFound)

    assert "required artifact root missing" in error.message
    assert manager.telemetry[-1]["failureCode"] == "snapshot_unavailable"


async def test_a_snapshot_of_another_loop_is_a_failed_projection(manager: _Manager, loop: LoopFiles) -> None:
    class _Mistaken(_Meanwhile):
        async def snapshot(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> Snapshot:
            found = await super().snapshot(loop_id, trace_id=trace_id, run_id=run_id)
            found.envelope["source"] = {**found.envelope["source"], "loopId": "another"}
            return found

    manager.transport = _Mistaken(loop.repo, state_folder=loop.repo.parent / "state")

    await manager.fails(InputInvalid)
    await manager.transport.close()

    assert manager.health["reasonCodes"] == ["projection_failed"]
    assert manager.telemetry[-1]["failureCode"] == "projection_failed"
    assert not manager.store.state.exists()


async def test_an_agent_that_is_not_there_is_a_failed_request_with_its_retries(loop: LoopFiles, tmp_path: Path) -> None:
    policy = RetryPolicy(attempts=3, base=0.01)
    transport = SpriteServiceTransport(f"unix:{tmp_path}/no.sock", policy=policy)
    manager = _Manager(loop, transport)

    await manager.fails(NoAnswer)
    await transport.close()

    assert manager.health["transport"]["failureCode"] == "service_request_failed"
    assert manager.health["transport"]["mode"] == "sprite_service"
    assert manager.health["reasonCodes"] == ["transport_unreachable"]
    assert manager.telemetry[-1]["retryAttempts"] == 2
    assert manager.telemetry[-1]["transport"] == "sprite_service"


async def test_an_answer_that_breaks_the_contract_is_an_invalid_response(loop: LoopFiles, tmp_path: Path) -> None:
    class _Garbled(LocalTransport):
        name: TransportName = "sprite_service"

        async def snapshot(self, *_: Any, **__: Any) -> Snapshot:
            raise ContractError("sleeping is no status", path="run.status")

    transport = _Garbled(loop.repo, state_folder=tmp_path / "state")
    manager = _Manager(loop, transport)

    await manager.fails(ContractError)
    await transport.close()

    assert manager.health["transport"]["failureCode"] == "service_response_invalid"
    assert manager.health["reasonCodes"] == ["invalid_transport_payload"]


@pytest.mark.parametrize("name", ["state.json", "cursor.json", "health.json", "telemetry/transport-health.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"half":'])
async def test_however_a_file_of_ours_is_broken_the_telemetry_tells_how_it_went(
    manager: _Manager, name: str, content: bytes
) -> None:
    await manager.reconcile()
    (manager.store.folder / name).write_bytes(content)

    outcome = "success"
    try:
        await reconcile(manager.transport, manager.store, ReconcileOptions(loop_id=LOOP))
    except OpsError as error:
        outcome = error.message

    assert outcome == "success" or name in outcome
    assert [entry["failureCode"] for entry in manager.telemetry[1:]] == [
        None if outcome == "success" else "reconcile_failed"
    ]


@pytest.mark.parametrize(
    "previous",
    [
        {"transition": "running"},
        {"transition": {"currentState": 5}},
        {"cursor": 3},
        {"sequence": []},
        {"sequence": {"lastEventSequence": "2"}},
        {"projection": "running"},
    ],
)
async def test_a_previous_state_of_another_shape_is_refused_or_taken_as_absent(
    manager: _Manager, previous: Json
) -> None:
    manager.store.folder.mkdir(parents=True)
    put(manager.store.state, previous)

    with contextlib.suppress(InputInvalid):
        await reconcile(manager.transport, manager.store, ReconcileOptions(loop_id=LOOP))

    assert len(manager.telemetry) == 1


@pytest.mark.parametrize("is_gone", [False, True], ids=["success", "failure"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("telemetry/transport-health.json", {"lastFailureCode": 5, "failureStreak": -5}),
        ("sequence-state.json", {"status": 7, "updatedAt": 3, "lastEventSequence": -1, "lastSnapshotSequence": 2**64}),
    ],
)
async def test_a_file_of_ours_of_another_shape_keeps_no_pass_from_being_told(
    manager: _Manager, loop: LoopFiles, name: str, content: Json, *, is_gone: bool
) -> None:
    await manager.reconcile()  # the next one brings no event
    put(manager.store.folder / name, content)
    if is_gone:
        loop.log.unlink()

    with contextlib.suppress(EventsNotFound):
        await reconcile(manager.transport, manager.store, ReconcileOptions(loop_id=LOOP))

    assert [entry["failureCode"] for entry in manager.telemetry] == [None, "snapshot_unavailable" if is_gone else None]


async def test_a_record_of_the_intents_that_can_not_be_read_is_none(manager: _Manager) -> None:
    manager.store.intents.mkdir(parents=True)

    await manager.reconcile()

    assert manager.health["metrics"]["lastControlStatus"] is None


async def test_a_cursor_of_another_loop_is_refused_and_told(manager: _Manager) -> None:
    await manager.reconcile()
    put(manager.store.cursor, {**manager.cursor, "loopId": "another"})

    await manager.fails(InputInvalid)

    assert manager.telemetry[-1]["failureCode"] == "reconcile_failed"
    assert manager.health["reasonCodes"] == ["reconcile_failed"]


@pytest.mark.parametrize("name", ["state.json", "cursor.json", "health.json"])
async def test_a_file_that_can_not_be_saved_is_told_in_the_telemetry(
    manager: _Manager, transport: _Meanwhile, name: str
) -> None:
    transport.happens = (manager.store.folder / name).mkdir  # after it was found missing, before it is saved

    with pytest.raises(InputInvalid, match=name):
        await reconcile(transport, manager.store, ReconcileOptions(loop_id=LOOP))

    [entry] = manager.telemetry
    assert (entry["status"], entry["failureCode"]) == ("failed", "reconcile_failed")
    assert name in entry["failureMessage"]


# Two managers.


async def test_while_another_manager_is_at_work_nothing_is_written(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()
    loop.append(fresh("role_start"))
    before = {path: path.read_bytes() for path in manager.store.folder.rglob("*") if path.is_file()}

    with manager.store.locked():
        await manager.fails(LoopLocked)

    assert {path: path.read_bytes() for path in manager.store.folder.rglob("*") if path.is_file()} == before
    await manager.reconcile()
    assert manager.telemetry[-1]["eventsIngested"] == 1


async def test_a_reconcile_gives_the_lock_back_when_it_fails(manager: _Manager, loop: LoopFiles) -> None:
    loop.log.unlink()
    await manager.fails(EventsNotFound)

    with manager.store.locked():
        pass


# What is written.


async def test_the_telemetry_has_the_contracts_keys_whether_it_went_well_or_not(
    manager: _Manager, loop: LoopFiles
) -> None:
    await manager.reconcile()
    loop.log.unlink()
    await manager.fails(EventsNotFound)

    assert [list(entry) for entry in manager.telemetry] == [TELEMETRY_KEYS, TELEMETRY_KEYS]
    assert list(manager.transport_health) == TRANSPORT_HEALTH_KEYS


async def test_the_telemetry_of_a_reconcile_that_went_well_says_what_it_did(manager: _Manager) -> None:
    await manager.reconcile(max_events=1, trace_id="trace-1")

    [entry] = manager.telemetry
    for name in ("timestamp", "startedAt"):
        assert datetime.fromisoformat(entry.pop(name)).tzinfo is not None
    assert 0 <= entry.pop("durationSeconds") < 60
    assert entry == {
        "loopId": LOOP,
        "traceId": "trace-1",
        "transport": "local",
        "status": "success",
        "failureCode": None,
        "failureMessage": None,
        "cursorOffsetBefore": 0,
        "cursorOffsetAfter": 1,
        "eventsIngested": 1,
        "maxEvents": 1,
        "fromStart": False,
        "retryAttempts": 0,
        "retryBackoffSeconds": 0,
        "thresholdProfile": "balanced",
        "transportFailureStreak": 0,
        "healthStatus": "healthy",
        "healthReasonCodes": [],
    }


async def test_every_escalation_has_the_contracts_keys(manager: _Manager, loop: LoopFiles) -> None:
    await manager.reconcile()
    loop.state.unlink()
    loop.replace(old("role_start", seconds=4000))
    put(manager.store.state, {**manager.state, "sequence": {}})
    await manager.reconcile()

    assert manager.categories == ["log_replaced", "divergence_detected", "health_critical"]
    for entry in manager.escalations:
        assert list(entry) == ["timestamp", "loopId", "traceId", "category", "transport", "evidence"]


async def test_a_reconcile_leaves_no_draft_behind(manager: _Manager) -> None:
    for _ in range(2):
        await manager.reconcile()

    assert sorted(str(path.relative_to(manager.store.folder)) for path in manager.store.folder.rglob("*.*")) == [
        "cursor.json",
        "health.json",
        "heartbeat.json",
        "sequence-state.json",
        "state.json",
        "telemetry/heartbeat.jsonl",
        "telemetry/reconcile.jsonl",
        "telemetry/sequence.jsonl",
        "telemetry/transport-health.json",
    ]
