"""Health: a verdict on one loop and on the way to it, from figures and thresholds. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from opsmgr.passes.thresholds import Thresholds
    from opsmgr.transport.base import TransportName

_LEAP_SECOND = re.compile(r"(T\d\d:\d\d:)60")
"""RFC 3339 has it, and small letters; Python reads neither."""

FAILURES = {
    "snapshot_unavailable": "transport_unreachable",
    "events_unavailable": "transport_unreachable",
    "service_request_failed": "transport_unreachable",
    "service_response_invalid": "invalid_transport_payload",
    "projection_failed": "projection_failed",
    "reconcile_failed": "reconcile_failed",
}
"""The reason code for each way an ingest fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What is judged. None: not known."""

    transport: TransportName
    failure_code: str | None
    """Why this ingest failed; None: it did not."""
    last_failure_code: str | None
    failure_streak: int
    last_event_at: str | None
    last_heartbeat_at: str | None
    last_control_status: str | None
    lifecycle_state: str | None
    diverges: bool
    sequence: dict[str, Any] | None


def judge(figures: Figures, thresholds: Thresholds, *, now: datetime, trace_id: str | None) -> dict[str, Any]:
    """The verdict, as schema/manager_health.schema.json says."""
    ingest_lag = age(figures.last_event_at, now)
    heartbeat_lag = age(figures.last_heartbeat_at, now)
    sequence_status = member(figures.sequence, "status")
    reasons: list[dict[str, Any]] = []

    def add(code: str, severity: Literal["degraded", "critical"], metric: str, observed: Any, threshold: Any) -> None:
        reasons.append(
            {"code": code, "severity": severity, "metric": metric, "observed": observed, "threshold": threshold}
        )

    def add_above(code: str, metric: str, observed: int | None, limits: tuple[int, int]) -> bool:
        degraded, critical = limits
        if observed is None or observed < degraded:
            return False
        if observed >= critical:
            add(code, "critical", metric, observed, critical)
        else:
            add(code, "degraded", metric, observed, degraded)
        return True

    if figures.diverges:
        add("divergence_detected", "degraded", "divergence.any", observed=True, threshold=False)
    if figures.last_control_status in ("ambiguous", "failed_command"):
        code = f"control_{figures.last_control_status}"
        add(code, "degraded", "lastControlStatus", figures.last_control_status, "confirmed")
    counted = thresholds.counted(ingest_lag, figures.lifecycle_state)
    add_above("ingest_stale", "ingestLagSeconds", counted, thresholds.ingest_lag_seconds)
    counted = thresholds.counted(heartbeat_lag, figures.lifecycle_state)
    add_above("runtime_heartbeat_stale", "heartbeatLagSeconds", counted, thresholds.heartbeat_lag_seconds)
    unreachable = add_above(
        "transport_unreachable",
        "transportFailureStreak",
        figures.failure_streak,
        thresholds.transport_failure_streak,
    )
    if sequence_status == "ordering_drift_detected":
        add("ordering_drift_detected", "degraded", "sequenceStatus", sequence_status, "ok")
    if figures.failure_code is not None:
        code = FAILURES[figures.failure_code]
        if not (unreachable and code == "transport_unreachable"):
            add(code, "degraded", "ingestStatus", figures.failure_code, "success")
    severities = {reason["severity"] for reason in reasons}
    return {
        "schemaVersion": "v1",
        "updatedAt": clock.now(),
        "traceId": trace_id,
        "status": "critical" if "critical" in severities else "degraded" if severities else "healthy",
        "reasonCodes": [reason["code"] for reason in reasons],
        "reasons": reasons,
        "metrics": {
            "ingestLagSeconds": ingest_lag,
            "heartbeatLagSeconds": heartbeat_lag,
            "transportFailureStreak": figures.failure_streak,
            "lastControlStatus": figures.last_control_status,
            "sequenceStatus": sequence_status,
            "lifecycleState": figures.lifecycle_state,
        },
        "thresholds": thresholds.document(),
        "transport": {
            "mode": figures.transport,
            "ingestStatus": "success" if figures.failure_code is None else "failed",
            "failureCode": figures.failure_code,
            "lastFailureCode": figures.last_failure_code,
        },
        "evidence": {
            "lastEventAt": figures.last_event_at,
            "lastHeartbeatAt": figures.last_heartbeat_at,
            "sequenceUpdatedAt": member(figures.sequence, "updatedAt"),
        },
    }


def age(timestamp: str | None, now: datetime) -> int | None:
    """Seconds since a timestamp of the runtime's; None where it is none. Never negative."""
    if timestamp is None:
        return None
    try:
        moment = datetime.fromisoformat(_LEAP_SECOND.sub(r"\g<1>59", timestamp.upper()))
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, int((now - moment).total_seconds()))
