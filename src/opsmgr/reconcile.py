"""One reconcile: snapshot, events after the cursor, project, persist, judge, escalate, telemetry.

The cursor is saved after what it covers. A reconcile that fails leaves state and cursor
as they were, and still writes health and telemetry.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from opsmgr import store as files
from opsmgr.agent_memory import load_memory, save_memory
from opsmgr.cursors import Position, load_cursor, save_cursor
from opsmgr.errors import NoAnswer
from opsmgr.health import BALANCED, Figures, judge
from opsmgr.projection import project
from opsmgr.sequence import check_sequence
from opsmgr.subscription import subscribe
from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError, HistoryRewritten, LogReplaced, LogTruncated, OpsError

if TYPE_CHECKING:
    from opsmgr.agent_memory import AgentMemory, Escalation
    from opsmgr.health import Thresholds
    from opsmgr.store import LoopStore
    from opsmgr.transport.base import Snapshot, Transport
    from sprite_agent.contract.envelopes import EventEnvelope


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconcileOptions:
    """What one reconcile was asked for."""

    loop_id: str
    trace_id: str | None = None
    run_id: str | None = None
    from_start: bool = False
    """Start at the first line, whatever the cursor says."""
    max_events: int = 0
    """Handle no more events than this; 0: all."""
    thresholds: Thresholds = BALANCED


@dataclass(kw_only=True, slots=True)
class _Pass:
    """What one reconcile has found so far."""

    before: Position
    after: Position
    stage: str = "reconcile_failed"
    """What it means if it fails now."""
    snapshot: Snapshot | None = None
    events: list[EventEnvelope] = field(default_factory=list)
    state: dict[str, Any] | None = None
    lost: OpsError | None = None
    """Why the cursor no longer fitted the log, where it did not."""
    memory: AgentMemory | None = None
    """What is remembered of the agent, after this pass."""
    agent: list[Escalation] = field(default_factory=list)
    """What the memory finds wrong with what the agent says now."""


async def reconcile(transport: Transport, store: LoopStore, options: ReconcileOptions) -> dict[str, Any]:
    """Brings the manager's files of a loop up to date. Gives the new state.

    Raises:
        LoopLocked: another manager works on the loop; nothing was written.
        OpsError: it failed; health and telemetry say so.
    """
    with store.locked():
        started, began = clock.now(), time.monotonic()
        now = Position()
        done = _Pass(before=now, after=now)
        failure: OpsError | None = None
        previous: dict[str, Any] | None = None
        try:
            previous = files.load(store.state)
            done.memory = load_memory(store)
            if not options.from_start:
                done.before = done.after = load_cursor(store.cursor, options.loop_id)
            await _ingest(transport, options, done)
            done.stage = "projection_failed"
            assert done.snapshot is not None  # noqa: S101  # ingested
            done.state = project(options.loop_id, done.snapshot.envelope, done.events, previous)
            done.stage = "reconcile_failed"
        except OpsError as error:
            failure = error
        verdict = _judge(transport, store, options, done, previous=previous, failure=failure)
        try:
            _persist(transport, store, options, done, verdict)
        except OpsError as error:
            failure = failure or error
            done.stage, done.state = "reconcile_failed", None
            verdict = _judge(transport, store, options, done, previous=previous, failure=failure)
            with contextlib.suppress(OpsError):  # what could not be written once may still not be; telemetry tells
                _persist(transport, store, options, done, verdict)
        health = verdict.health
        files.append(
            store.reconcile_telemetry,
            {
                "timestamp": clock.now(),
                "startedAt": started,
                "loopId": options.loop_id,
                "traceId": options.trace_id,
                "transport": transport.name,
                "status": "success" if failure is None else "failed",
                "failureCode": health["transport"]["failureCode"],
                "failureMessage": None if failure is None else str(failure),
                "cursorOffsetBefore": done.before.line,
                "cursorOffsetAfter": done.after.line if failure is None else done.before.line,
                "eventsIngested": len(done.events) if failure is None else 0,
                "maxEvents": options.max_events,
                "fromStart": options.from_start,
                "retryAttempts": transport.attempts.retries,
                "retryBackoffSeconds": round(transport.attempts.waited_seconds, 3),
                "thresholdProfile": options.thresholds.profile,
                "durationSeconds": round(time.monotonic() - began, 3),
                "transportFailureStreak": health["metrics"]["transportFailureStreak"],
                "healthStatus": health["status"],
                "healthReasonCodes": health["reasonCodes"],
            },
        )
    if failure is not None:
        raise failure
    assert done.state is not None  # noqa: S101  # no failure
    return done.state


async def _ingest(transport: Transport, options: ReconcileOptions, done: _Pass) -> None:
    """Takes the snapshot, and the events after the cursor up to where the snapshot was taken.

    Later events wait for the next reconcile: held against an older snapshot they would look like a contradiction.
    """
    done.stage = "snapshot_unavailable"
    done.snapshot = await transport.snapshot(options.loop_id, trace_id=options.trace_id, run_id=options.run_id)
    if done.memory is not None:
        done.agent = [*done.memory.look_at(transport.journal), *done.memory.look_into(done.snapshot.findings)]
    done.stage = "events_unavailable"
    try:
        await _read_events(transport, options, done, done.snapshot)
    except (LogReplaced, LogTruncated, HistoryRewritten) as error:
        done.lost = error
        done.events.clear()
        done.after = Position()
        await _read_events(transport, options, done, done.snapshot)


async def _read_events(transport: Transport, options: ReconcileOptions, done: _Pass, snapshot: Snapshot) -> None:
    query = EventQuery(
        loop_id=options.loop_id,
        after_line=done.after.line,
        resume_token=done.after.resume_token,
        max_events=options.max_events,
        trace_id=options.trace_id,
    )
    end = snapshot.envelope["cursor"]["eventLineCount"]
    async for batch in subscribe(transport, query):
        within = [event for event in batch.events if event["cursor"]["eventLineOffset"] <= end]
        done.events += within
        if len(within) < len(batch.events):
            line = done.events[-1]["cursor"]["eventLineOffset"] if done.events else done.after.line
            done.after = Position(line=line, line_count=end, resume_token=snapshot.resume_token)
            return
        done.after = done.after.after(batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What is to be written of a pass."""

    health: dict[str, Any]
    transport_health: dict[str, Any]
    escalations: list[Escalation]


def _judge(
    transport: Transport,
    store: LoopStore,
    options: ReconcileOptions,
    done: _Pass,
    *,
    previous: dict[str, Any] | None,
    failure: OpsError | None,
) -> _Verdict:
    """Judges a pass; writes nothing."""
    failure_code = None if failure is None else _failure_code(transport, done.stage, failure)
    transport_health = _transport_health(transport, store, options, failure_code)
    envelope = done.snapshot.envelope if done.snapshot else None
    last_state = done.state or previous
    sequence = member(previous, "sequence")
    drifted_before = member(sequence, "driftActive") is True
    if failure is None and envelope is not None:
        sequence = check_sequence(envelope, done.events, None if done.lost or options.from_start else sequence)
    heartbeat = member(member(envelope, "runtime"), "heartbeat")
    health = judge(
        Figures(
            transport=transport.name,
            failure_code=failure_code,
            last_failure_code=transport_health["lastFailureCode"],
            failure_streak=transport_health["failureStreak"],
            last_event_at=_text(member(member(last_state, "projection"), "lastEventAt")),
            last_heartbeat_at=_text(member(heartbeat, "timestamp")) or _text(member(heartbeat, "updatedAt")),
            last_control_status=_text(member(files.last_line(store.intents), "status")),
            lifecycle_state=_text(member(member(last_state, "projection"), "status")),
            diverges=member(member(done.state, "divergence"), "any") is True,
            sequence=sequence,
        ),
        options.thresholds,
        now=datetime.now(UTC),
        trace_id=options.trace_id,
    )
    validate("manager_health", health)
    if done.state is not None:
        done.state |= {"health": health, "trace": {"reconcileTraceId": options.trace_id}, "sequence": sequence}
        validate("manager_state", done.state)
    last_health = files.load_if_readable(store.health)
    return _Verdict(
        health=health,
        transport_health=transport_health,
        escalations=_escalations(done, health, last_health, drifted_before=drifted_before),
    )


def _persist(transport: Transport, store: LoopStore, options: ReconcileOptions, done: _Pass, verdict: _Verdict) -> None:
    """Writes everything but the telemetry line; the cursor after the state that covers it.

    Raises:
        InputInvalid: something can't be written.
    """
    files.save(store.transport_health, verdict.transport_health)
    if done.state is not None:
        files.save(store.state, done.state)
        save_cursor(store.cursor, done.after, repo_path=done.state["source"]["repoPath"], loop_id=options.loop_id)
    files.save(store.health, verdict.health)
    for category, evidence in verdict.escalations:
        files.append(
            store.escalations,
            {
                "timestamp": clock.now(),
                "loopId": options.loop_id,
                "traceId": options.trace_id,
                "category": category,
                "transport": transport.name,
                "evidence": evidence,
            },
        )
    if done.memory is not None and (done.memory.journal or done.memory.findings):
        save_memory(store, done.memory)  # last: what is escalated is not forgotten before it is written


def _escalations(
    done: _Pass, health: dict[str, Any], last_health: dict[str, Any] | None, *, drifted_before: bool
) -> list[Escalation]:
    """What an operator has to hear of."""
    found: list[Escalation] = list(done.agent)
    if done.lost is not None:
        found.append((done.lost.reason.lower(), {"message": str(done.lost), **done.lost.details}))
    if done.state is not None:
        if done.state["divergence"]["any"]:
            found.append(
                ("divergence_detected", {"flags": done.state["divergence"]["flags"], "cursor": done.state["cursor"]})
            )
        if done.state["sequence"]["driftActive"] and not drifted_before:
            found.append(("ordering_drift_detected", {"violations": done.state["sequence"]["violations"]}))
    changed = (
        member(last_health, "status") != health["status"] or member(last_health, "reasonCodes") != health["reasonCodes"]
    )
    if changed and health["status"] != "healthy":
        found.append((f"health_{health['status']}", {"reasons": health["reasons"]}))
    return found


def _transport_health(
    transport: Transport, store: LoopStore, options: ReconcileOptions, failure_code: str | None
) -> dict[str, Any]:
    last = files.load_if_readable(store.transport_health) or {}
    now = clock.now()
    streak = last.get("failureStreak")
    return {
        "schemaVersion": "v1",
        "updatedAt": now,
        "traceId": options.trace_id,
        "transport": transport.name,
        "lastResult": "success" if failure_code is None else "failed",
        "failureStreak": 0 if failure_code is None else (streak if type(streak) is int else 0) + 1,
        "lastFailureCode": failure_code or last.get("lastFailureCode"),
        "lastSuccessAt": now if failure_code is None else last.get("lastSuccessAt"),
        "lastFailureAt": last.get("lastFailureAt") if failure_code is None else now,
    }


def _failure_code(transport: Transport, stage: str, failure: OpsError) -> str:
    if stage.endswith("_unavailable") and transport.name == "sprite_service":
        if isinstance(failure, ContractError):
            return "service_response_invalid"
        if isinstance(failure, NoAnswer):
            return "service_request_failed"
    return stage


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
