"""What the manager writes down of its own work: a line for each pass, and how the transport does. Pure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from opsmgr.passes.ingest import Pass, ReconcileOptions
    from opsmgr.transport.base import Transport


def transport_health(
    last: dict[str, Any] | None, *, transport: str, trace_id: str | None, failure_code: str | None
) -> dict[str, Any]:
    """transport-health.json after an ingest that went well (no failure code) or did not."""
    now = clock.now()
    streak, before = member(last, "failureStreak"), member(last, "lastFailureCode")
    known = type(streak) is int and streak > 0
    return {
        "schemaVersion": "v1",
        "updatedAt": now,
        "traceId": trace_id,
        "transport": transport,
        "lastResult": "success" if failure_code is None else "failed",
        "failureStreak": 0 if failure_code is None else (streak if known else 0) + 1,
        "lastFailureCode": failure_code or (before if isinstance(before, str) else None),
        "lastSuccessAt": now if failure_code is None else member(last, "lastSuccessAt"),
        "lastFailureAt": member(last, "lastFailureAt") if failure_code is None else now,
    }


def reconcile_line(
    done: Pass, health: dict[str, Any], options: ReconcileOptions, transport: Transport
) -> dict[str, Any]:
    """A line of telemetry/reconcile.jsonl."""
    failed = done.failure is not None
    return {
        "timestamp": clock.now(),
        "startedAt": done.started_at,
        "loopId": options.loop_id,
        "traceId": options.trace_id,
        "transport": transport.name,
        "status": "failed" if failed else "success",
        "failureCode": health["transport"]["failureCode"],
        "failureMessage": None if done.failure is None else str(done.failure),
        "cursorOffsetBefore": done.before.line,
        "cursorOffsetAfter": done.before.line if failed else done.after.line,
        "eventsIngested": 0 if failed else len(done.events) + done.folded,
        "maxEvents": options.max_events,
        "fromStart": options.from_start,
        "retryAttempts": transport.attempts.retries - done.retries,
        "retryBackoffSeconds": round(transport.attempts.waited_seconds - done.waited_seconds, 3),
        "thresholdProfile": options.thresholds.profile,
        "durationSeconds": round(time.monotonic() - done.began, 3),
        "transportFailureStreak": health["metrics"]["transportFailureStreak"],
        "healthStatus": health["status"],
        "healthReasonCodes": health["reasonCodes"],
    }


def heartbeat_line(heartbeat: dict[str, Any]) -> dict[str, Any]:
    """A line of telemetry/heartbeat.jsonl."""
    names = ("loopId", "traceId", "transport", "status", "heartbeatAt", "lagSeconds", "pid", "stage")
    return {"timestamp": clock.now(), **{name: heartbeat[name] for name in names}}


def sequence_line(sequence: dict[str, Any], options: ReconcileOptions, transport: Transport) -> dict[str, Any]:
    """A line of telemetry/sequence.jsonl."""
    verdict = {name: value for name, value in sequence.items() if name != "updatedAt"}
    return {
        "timestamp": clock.now(),
        "loopId": options.loop_id,
        "traceId": options.trace_id,
        "transport": transport.name,
        **verdict,
    }
