"""The mirror of the control documents: requests and results to protobuf messages and back, as `mirror` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprite_agent.contract.mirror_values import Enumeration, refused_with_path, required
from sprite_agent.v1 import control_pb2, envelopes_pb2, service_pb2

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ConfirmationRecord, ControlRequest, ControlResult

_RUN_STATUS = Enumeration(envelopes_pb2.RunStatus.DESCRIPTOR)
_INTENT = Enumeration(control_pb2.Intent.DESCRIPTOR)
_MODE = Enumeration(control_pb2.ConfirmationMode.DESCRIPTOR)
_STATE = Enumeration(control_pb2.ControlState.DESCRIPTOR)
_STATUS = Enumeration(control_pb2.ControlStatus.DESCRIPTOR)
_EFFECT = Enumeration(control_pb2.ControlEffect.DESCRIPTOR)
_REQUIRED_EFFECT = Enumeration(control_pb2.RequiredEffect.DESCRIPTOR)


def intent_name(number: int) -> str:
    """The name of an intent; its number where it has none."""
    return _INTENT.names.get(number, str(number))


@refused_with_path("control_request")
def request_to_message(request: ControlRequest) -> service_pb2.ExecuteControlRequest:
    """The mirror of a control request."""
    message = service_pb2.ExecuteControlRequest(
        loop_id=request["loopId"],
        intent=_INTENT.number(request["intent"], "intent"),  # type: ignore[arg-type]  # an enum's number
        requested_by=request["requestedBy"],
        note=request.get("note"),
        idempotency_key=request["idempotencyKey"],
        trace_id=request.get("traceId"),
        expected_run_id=request.get("expectedRunId"),
        expected_iteration=request.get("expectedIteration"),
        expected_approval_digest=request.get("expectedApprovalDigest"),
        requested_at=request.get("requestedAt"),
    )
    if "confirmation" in request:
        wanted = request["confirmation"]
        message.confirmation.mode = _MODE.number(wanted["mode"], "confirmation.mode")  # type: ignore[assignment]
        if "timeoutSeconds" in wanted:
            message.confirmation.timeout_seconds = wanted["timeoutSeconds"]
        if "requiredEffect" in wanted:
            message.confirmation.required_effect = _REQUIRED_EFFECT.number(
                wanted["requiredEffect"], "confirmation.requiredEffect"
            )  # type: ignore[assignment]
    if "provenance" in request:
        message.provenance.manager_id = request["provenance"]["managerId"]
        message.provenance.host = request["provenance"]["host"]
        message.provenance.attempt = request["provenance"]["attempt"]
    return message


def request_from_message(message: service_pb2.ExecuteControlRequest) -> dict[str, Any]:
    """The control request that `message` mirrors; not validated, and fields it leaves unset are left out."""
    request: dict[str, Any] = {
        "loopId": message.loop_id,
        "intent": intent_name(message.intent),
        "requestedBy": message.requested_by,
        "idempotencyKey": message.idempotency_key,
    }
    for name, field in (
        ("note", "note"),
        ("traceId", "trace_id"),
        ("expectedRunId", "expected_run_id"),
        ("expectedIteration", "expected_iteration"),
        ("expectedApprovalDigest", "expected_approval_digest"),
        ("requestedAt", "requested_at"),
    ):
        if message.HasField(field):  # type: ignore[arg-type]  # the names just above
            request[name] = getattr(message, field)
    if message.HasField("confirmation"):
        request["confirmation"] = {"mode": _MODE.name(message.confirmation.mode, "confirmation.mode")}
        if message.confirmation.HasField("timeout_seconds"):
            request["confirmation"]["timeoutSeconds"] = message.confirmation.timeout_seconds
        if message.confirmation.required_effect:
            effect = _REQUIRED_EFFECT.name(message.confirmation.required_effect, "confirmation.requiredEffect")
            request["confirmation"]["requiredEffect"] = effect
    if message.HasField("provenance"):
        request["provenance"] = {
            "managerId": message.provenance.manager_id,
            "host": message.provenance.host,
            "attempt": message.provenance.attempt,
        }
    return request


@refused_with_path("control_result")
def result_to_message(result: ControlResult) -> control_pb2.ControlResult:
    """The mirror of a control result."""
    message = control_pb2.ControlResult(
        schema_version=result["schemaVersion"],
        envelope_type=result["envelopeType"],
        trace_id=result["traceId"],
        loop_id=result["loopId"],
        intent=_INTENT.number(result["intent"], "intent"),  # type: ignore[arg-type]  # an enum's number
        requested_by=result["requestedBy"],
        note=result["note"],
        idempotency_key=result["idempotencyKey"],
        state=_STATE.number(result["state"], "state"),  # type: ignore[arg-type]  # likewise
        status=_STATUS.number(result["status"], "status"),  # type: ignore[arg-type]  # likewise
        reason=result["reason"],
        detail=result["detail"],
        effect=_EFFECT.number(result["effect"], "effect"),  # type: ignore[arg-type]  # likewise
        executed=result["executed"],
        replayed=result["replayed"],
        command=result["command"],
        exit_code=result["exitCode"],
        timed_out=result["timedOut"],
        output=result["output"],
        started_at=result["startedAt"],
        finished_at=result["finishedAt"],
        journal=control_pb2.JournalPosition(id=result["journal"]["id"], sequence=result["journal"]["sequence"]),
    )
    if (seen := result["confirmation"]) is not None:
        message.confirmation.CopyFrom(_confirmation_to_message(seen))
    return message


def result_from_message(message: control_pb2.ControlResult) -> ControlResult:
    """The control result that `message` mirrors.

    Raises:
        ContractError: a required part is unset, or an enum has a value unknown here.
    """
    required(message, "journal")
    result: dict[str, Any] = {
        "schemaVersion": message.schema_version,
        "envelopeType": message.envelope_type,
        "traceId": message.trace_id if message.HasField("trace_id") else None,
        "loopId": message.loop_id,
        "intent": _INTENT.name(message.intent, "intent"),
        "requestedBy": message.requested_by,
        "note": message.note if message.HasField("note") else None,
        "idempotencyKey": message.idempotency_key,
        "state": _STATE.name(message.state, "state"),
        "status": _STATUS.name(message.status, "status", nullable=True),
        "reason": message.reason if message.HasField("reason") else None,
        "detail": message.detail if message.HasField("detail") else None,
        "effect": _EFFECT.name(message.effect, "effect"),
        "executed": message.executed,
        "replayed": message.replayed,
        "command": list(message.command),
        "exitCode": message.exit_code if message.HasField("exit_code") else None,
        "timedOut": message.timed_out,
        "output": message.output,
        "startedAt": message.started_at if message.HasField("started_at") else None,
        "finishedAt": message.finished_at if message.HasField("finished_at") else None,
        "confirmation": _confirmation_from(message.confirmation) if message.HasField("confirmation") else None,
        "journal": {"id": message.journal.id, "sequence": message.journal.sequence},
    }
    return result  # type: ignore[return-value]  # built by the names of the TypedDict; validated by the caller


def _confirmation_to_message(seen: ConfirmationRecord) -> control_pb2.ConfirmationRecord:
    return control_pb2.ConfirmationRecord(
        intent=_INTENT.number(seen["intent"], "confirmation.intent"),  # type: ignore[arg-type]  # an enum's number
        confirmed=seen["confirmed"],
        reason=seen["reason"],
        attempts=seen["attempts"],
        timeout_seconds=seen["timeoutSeconds"],
        observed_status=_RUN_STATUS.number(seen["observedStatus"], "confirmation.observedStatus"),  # type: ignore[arg-type]
        observed_last_event=seen["observedLastEvent"],
        observed_approval_status=seen["observedApprovalStatus"],
        observed_active=seen["observedActive"],
        observed_at=seen["observedAt"],
    )


def _confirmation_from(message: control_pb2.ConfirmationRecord) -> dict[str, Any]:
    return {
        "intent": _INTENT.name(message.intent, "confirmation.intent"),
        "confirmed": message.confirmed,
        "reason": message.reason,
        "attempts": message.attempts,
        "timeoutSeconds": message.timeout_seconds,
        "observedStatus": _RUN_STATUS.name(message.observed_status, "confirmation.observedStatus", nullable=True),
        "observedLastEvent": message.observed_last_event if message.HasField("observed_last_event") else None,
        "observedApprovalStatus": (
            message.observed_approval_status if message.HasField("observed_approval_status") else None
        ),
        "observedActive": message.observed_active if message.HasField("observed_active") else None,
        "observedAt": message.observed_at,
    }
