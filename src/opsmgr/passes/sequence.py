"""Ordering checks: whether a snapshot and the events of a poll go on where the last ones stopped. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprite_agent.contract.envelopes import EventEnvelope, SnapshotEnvelope

DRIFT = "ordering_drift_detected"


def check_sequence(
    snapshot: SnapshotEnvelope, events: Sequence[EventEnvelope], previous: dict[str, Any] | None
) -> dict[str, Any]:
    """The verdict, as schema/manager_sequence.schema.json says.

    Args:
        snapshot: its value must not be below the last one's.
        events: their values must rise, from above the last one's.
        previous: the last verdict; keys may be missing.
    """
    violations: list[str] = []
    before = _number(member(previous, "lastSnapshotSequence"))
    now = member(snapshot.get("sequence"), "value")
    if now is None:
        violations.append("snapshot_sequence_missing")
    elif before is not None and now < before:
        violations.append("snapshot_sequence_regression")

    last = _number(member(previous, "lastEventSequence"))
    in_batch: int | None = None
    for event in events:
        value = member(event.get("sequence"), "value")
        if value is None:
            violations.append("event_sequence_missing")
            continue
        if in_batch is not None and value <= in_batch:
            violations.append("event_sequence_non_monotonic")
        elif in_batch is None and last is not None and value <= last:
            violations.append("event_sequence_regression")
        in_batch = value
    return {
        "status": DRIFT if violations else "ok",
        "reasonCode": DRIFT if violations else None,
        "driftActive": bool(violations),
        "violations": list(dict.fromkeys(violations)),
        "lastSnapshotSequence": before if now is None else now,
        "lastEventSequence": last if in_batch is None else in_batch,
        "updatedAt": clock.now(),
    }


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None
