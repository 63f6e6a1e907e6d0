"""Builds control results: what the journal keeps for a key and every answer is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprite_agent.contract import clock
from sprite_agent.contract.confirmation import Finding, build_record

if TYPE_CHECKING:
    from sprite_agent.contract.confirmation import Evidence
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult


def executing_result(request: ControlRequest, command: list[str]) -> ControlResult:
    """The result of a key whose command is about to start."""
    return {
        "schemaVersion": "v1",
        "envelopeType": "control_result",
        "traceId": request.get("traceId"),
        "loopId": request["loopId"],
        "intent": request["intent"],
        "requestedBy": request["requestedBy"],
        "note": request.get("note"),
        "idempotencyKey": request["idempotencyKey"],
        "state": "executing",
        "status": None,
        "reason": None,
        "detail": None,
        "effect": "none",
        "executed": False,
        "replayed": False,
        "command": command,
        "exitCode": None,
        "timedOut": False,
        "output": "",
        "startedAt": clock.now(),
        "finishedAt": None,
        "confirmation": None,
        "journal": {"id": "unset", "sequence": 0},
    }


def not_needed_result(request: ControlRequest, now: Evidence) -> ControlResult:
    """The result of a key whose effect is there already, so that nothing is run."""
    finding = Finding("decision_recorded" if request["intent"] == "approve" else "completed", "not_needed")
    return {
        **executing_result(request, []),
        "state": "done",
        "status": "confirmed",
        "reason": "not_needed",
        "detail": "it was so already; nothing was run",
        "effect": finding.effect,
        "exitCode": 0,
        "startedAt": None,
        "finishedAt": clock.now(),
        "confirmation": build_record(
            request["intent"], finding, confirmed=True, now=now, attempts=1, timeout_seconds=0
        ),
    }


def replayed(result: ControlResult) -> ControlResult:
    """A recorded result, marked as such."""
    return {**result, "replayed": True}
