"""Builds control results: what the journal keeps for a key and every answer is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprite_agent.contract import clock
from sprite_agent.contract.confirmation import Finding, build_record, decided_another

if TYPE_CHECKING:
    from sprite_agent.contract.confirmation import Evidence, Look
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult, ControlStatus
    from sprite_agent.control.executions import CommandOutcome


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


def executed_result(result: ControlResult, outcome: CommandOutcome) -> ControlResult:
    """The result of a key whose command has ended."""
    return {
        **result,
        "state": "executed",
        "executed": outcome.exit_code is not None,
        "exitCode": outcome.exit_code,
        "timedOut": outcome.timed_out,
        "output": outcome.output,
    }


def interrupted_result(result: ControlResult) -> ControlResult:
    """The result of a key whose command was started, or may have been, and whose end nobody has seen."""
    return {**result, "state": "executed", "executed": True}


def unlooked_result(result: ControlResult) -> ControlResult | None:
    """The final result where there is nothing to look for: the command could not be started."""
    if result["executed"]:
        return None
    return _done(result, "failed_command", "command_failed", "the command could not be started")


def skipped_result(result: ControlResult) -> ControlResult:
    """The final result of a command that succeeded, where nobody was to look for its effect."""
    return _done(result, "executed_unconfirmed", "confirmation_skipped", None)


def looked_result(result: ControlResult, look: Look, baseline: Evidence, mark: str) -> ControlResult:
    """The final result after looking for the effect: what shows counts before how the command ended."""
    record = look.record
    result = {**result, "effect": look.effect, "confirmation": record}
    if look.now is not None and decided_another(look.now, baseline, mark):
        detail = "the decision landed on another approval request than the one at hand when the command was started"
        result["confirmation"] = {**record, "confirmed": False, "reason": "approved_different"}
        return _done(result, "ambiguous", "approved_different", detail)
    trouble = _trouble(result)
    if record["confirmed"]:
        return _done(
            result, "confirmed", record["reason"], trouble and f"PARTIAL_EFFECT: the effect shows, but {trouble}"
        )
    if result["exitCode"] is None:
        return _done(result, "ambiguous", "interrupted", f"{trouble}; {look.detail}")
    if trouble and look.now is not None and look.effect == "none":
        # As the recorded adapters have it: nobody waits for the effect of a command that failed.
        return _done({**result, "confirmation": None}, "failed_command", "command_failed", trouble)
    detail = look.detail
    if trouble:
        detail = f"{trouble}; {detail}" if look.now is None else f"PARTIAL_EFFECT: {detail}; but {trouble}"
    return _done(result, "ambiguous", "timeout", detail)


def replayed(result: ControlResult) -> ControlResult:
    """A recorded result, marked as such."""
    return {**result, "replayed": True}


def _trouble(result: ControlResult) -> str | None:
    """What went wrong with the command; None: nothing."""
    if result["exitCode"] is None:
        return "the command was interrupted: it may have run to its end or not"
    if result["timedOut"]:
        return "the command ran over its time limit and was ended"
    return f"the command exited with {result['exitCode']}" if result["exitCode"] else None


def _done(result: ControlResult, status: ControlStatus, reason: str, detail: str | None) -> ControlResult:
    return {
        **result,
        "state": "done",
        "status": status,
        "reason": reason,
        "detail": detail,
        "finishedAt": clock.now(),
    }
