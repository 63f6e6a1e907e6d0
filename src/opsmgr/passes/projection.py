"""The projection: a snapshot, the events of one poll and the previous state, folded into the manager's state.

Pure: values in, values out. It fails closed on what is not of this loop or this contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsmgr.errors import InputInvalid
from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprite_agent.contract.envelopes import EventEnvelope, SnapshotEnvelope

WORKING_EVENTS = (
    "iteration_start",
    "role_start",
    "role_end",
    "iteration_end",
    "tests_start",
    "tests_end",
    "validation_start",
    "validation_end",
)
"""Events that only a run at work writes."""


def project(
    loop_id: str,
    snapshot: SnapshotEnvelope,
    events: Sequence[EventEnvelope],
    previous: dict[str, Any] | None,
) -> dict[str, Any]:
    """The manager's state, as schema/manager_state.schema.json says.

    Args:
        loop_id: the loop.
        snapshot: its snapshot.
        events: the events of this poll, in their order.
        previous: the previous state; keys may be missing.

    Raises:
        InputInvalid: an envelope is not valid, or of another loop.
    """
    _check("loop_run_snapshot", loop_id, snapshot, "the snapshot")
    for number, event in enumerate(events, 1):
        _check("loop_run_event", loop_id, event, f"event {number}")
    last = events[-1] if events else None
    status = snapshot["run"]["status"]
    health, runtime, summary = snapshot["health"], snapshot["runtime"], snapshot["run"]["summary"]
    active = member(runtime["superloopState"], "active") is True
    completion_ok = member(summary, "completion_ok") is True
    pending = health["hasPendingApproval"]
    name = last["event"]["name"] if last else None
    flags = {
        "activeMismatch": not active and name in WORKING_EVENTS,
        "approvalCompletionConflict": pending and completion_ok,
        "cursorRegression": _previous_offset(previous) > snapshot["cursor"]["eventLineOffset"],
    }
    diverges = any(flags.values())
    return {
        "schemaVersion": "v1",
        "generatedAt": clock.now(),
        "source": snapshot["source"],
        "run": {"runId": snapshot["run"]["runId"], "iteration": snapshot["run"]["iteration"]},
        "transition": {
            "previousState": _previous_state(previous),
            "triggeringSignal": f"event:{name}" if last else f"snapshot_status:{status}",
            "currentState": status,
            "confidence": "low" if diverges else "high" if last else "medium",
        },
        "projection": {
            "status": status,
            "hasPendingApproval": pending,
            "completionOk": completion_ok,
            "gates": health["gates"],
            "stuck": health["stuck"],
            "active": True if active else None,
            "lastEventName": health["lastEventName"],
            "lastEventAt": health["lastEventAt"],
        },
        "cursor": snapshot["cursor"],
        "divergence": {"any": diverges, "flags": flags},
        "evidence": {
            "snapshotEnvelope": {
                "runStatus": status,
                "lastEventName": health["lastEventName"],
                "hasPendingApproval": pending,
            },
            "lastEventEnvelope": last,
        },
    }


def _check(kind: str, loop_id: str, envelope: SnapshotEnvelope | EventEnvelope, what: str) -> None:
    try:
        validate(kind, envelope)
    except ContractError as error:
        raise InputInvalid(f"{what} is no valid {kind}: {error}", details={"path": error.path}) from error
    if envelope["source"]["loopId"] != loop_id:
        raise InputInvalid(
            f"{what} is of loop {envelope['source']['loopId']}, not of {loop_id}", details={"loopId": loop_id}
        )


def _previous_offset(previous: dict[str, Any] | None) -> int:
    offset = member(member(previous, "cursor"), "eventLineOffset")
    return offset if type(offset) is int else 0


def _previous_state(previous: dict[str, Any] | None) -> str:
    state = member(member(previous, "transition"), "currentState")
    return state if isinstance(state, str) and state else "none"
