"""The runtime's heartbeat as a snapshot shows it: what it says, and how old it is. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsmgr.passes.health import age
from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from datetime import datetime

    from opsmgr.passes.thresholds import Thresholds
    from opsmgr.transport.base import TransportName
    from sprite_agent.contract.envelopes import SnapshotEnvelope


def heartbeat_at(snapshot: SnapshotEnvelope | None) -> str | None:
    """When the runtime gave its last sign of life; None: it does not say."""
    heartbeat = _heartbeat(snapshot)
    return _text(member(heartbeat, "timestamp")) or _text(member(heartbeat, "updatedAt"))


def heartbeat_document(
    snapshot: SnapshotEnvelope, thresholds: Thresholds, *, transport: TransportName, now: datetime, trace_id: str | None
) -> dict[str, Any]:
    """heartbeat.json, as schema/manager_heartbeat.schema.json says."""
    heartbeat = _heartbeat(snapshot)
    at = heartbeat_at(snapshot)
    lag = age(at, now)
    pid = member(heartbeat, "pid")
    degraded, critical = thresholds.heartbeat_lag_seconds
    return {
        "schemaVersion": "v1",
        "updatedAt": clock.now(),
        "traceId": trace_id,
        "loopId": snapshot["source"]["loopId"],
        "transport": transport,
        "status": _status(lag, degraded, critical),
        "heartbeatAt": at,
        "lagSeconds": lag,
        "pid": pid if type(pid) is int and 0 < pid < 2**63 else None,
        "stage": _text(member(heartbeat, "stage")),
        "thresholds": {"degradedSeconds": degraded, "criticalSeconds": critical},
    }


def _status(lag: int | None, degraded: int, critical: int) -> str:
    if lag is None:
        return "missing"
    return "critical" if lag >= critical else "degraded" if lag >= degraded else "fresh"


def _heartbeat(snapshot: SnapshotEnvelope | None) -> Any:
    return member(member(snapshot, "runtime"), "heartbeat")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
