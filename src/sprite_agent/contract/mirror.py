"""The mirror of the envelopes: documents of the contract to protobuf messages and back; nothing gained, nothing lost.

The law, for every document that its schema accepts:

    from_message(to_message(document)) == document

and the text of open objects survives byte for byte. Absent, null and a value are told
apart by the rule at the top of protos/sprite_agent/v1/envelopes.proto. Both directions
are written out field by field, because they run for every event; that no field is
missing is proved by tests/conformance/test_drift.py and the law by
tests/properties/test_mirror.py. The control documents are in `control_mirror`.

To messages: the document must keep its schema (`validation`). From messages: the result
is not validated yet; the caller does that before anyone else sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprite_agent.contract.envelopes import GATES
from sprite_agent.contract.mirror_values import (
    Enumeration,
    nullable_from,
    nullable_object_from,
    object_from,
    refused_with_path,
    required,
    set_nullable,
    set_nullable_object,
    text_of,
)
from sprite_agent.errors import ContractError
from sprite_agent.v1 import envelopes_pb2

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import (
        ArtifactRef,
        Cursor,
        EventEnvelope,
        Sequence,
        SnapshotEnvelope,
        SnapshotHealth,
    )

_RUN_STATUS = Enumeration(envelopes_pb2.RunStatus.DESCRIPTOR)


# Events: the hot path.


@refused_with_path("loop_run_event")
def event_to_message(
    envelope: EventEnvelope, message: envelopes_pb2.EventEnvelope | None = None
) -> envelopes_pb2.EventEnvelope:
    """The mirror of an event; written into `message` where one is given (building in place is twice as fast)."""
    message = envelopes_pb2.EventEnvelope() if message is None else message
    message.schema_version = envelope["schemaVersion"]
    message.envelope_type = envelope["envelopeType"]
    message.emitted_at = envelope["emittedAt"]
    if "traceId" in envelope:
        set_nullable(message.trace_id, envelope["traceId"])
    message.source.repo_path = envelope["source"]["repoPath"]
    message.source.loop_id = envelope["source"]["loopId"]
    if "sequence" in envelope:
        _fill_sequence(message.sequence, envelope["sequence"])
    _fill_cursor(message.cursor, envelope["cursor"])
    run = message.run
    run.run_id = envelope["run"]["runId"]
    run.iteration = envelope["run"]["iteration"]
    event, told = message.event, envelope["event"]
    event.timestamp = told["timestamp"]
    event.name = told["name"]
    if (role := told["role"]) is not None:
        event.role = role
    if (status := told["status"]) is not None:
        event.status = status
    if (text := told["message"]) is not None:
        event.message = text
    if (payload := told["payload"]) is not None:
        event.payload.json = text_of(payload, "event.payload")
    event.raw.json = text_of(told["raw"], "event.raw")
    return message


def event_from_message(message: envelopes_pb2.EventEnvelope) -> EventEnvelope:
    """The event that `message` mirrors.

    Raises:
        ContractError: a required part is unset, or a text is not a JSON object.
    """
    required(message, "source", "cursor", "run", "event")
    event = message.event
    required(event, "raw", path="event.")
    envelope: dict[str, Any] = {
        "schemaVersion": message.schema_version,
        "envelopeType": message.envelope_type,
        "emittedAt": message.emitted_at,
    }
    if message.HasField("trace_id"):
        envelope["traceId"] = nullable_from(message.trace_id)
    envelope["source"] = {"repoPath": message.source.repo_path, "loopId": message.source.loop_id}
    if message.HasField("sequence"):
        envelope["sequence"] = _sequence_from(message.sequence)
    envelope["cursor"] = _cursor_from(message.cursor)
    envelope["run"] = {"runId": message.run.run_id, "iteration": message.run.iteration}
    envelope["event"] = {
        "timestamp": event.timestamp,
        "name": event.name,
        "role": event.role if event.HasField("role") else None,
        "status": event.status if event.HasField("status") else None,
        "message": event.message if event.HasField("message") else None,
        "payload": object_from(event.payload, "event.payload") if event.HasField("payload") else None,
        "raw": object_from(event.raw, "event.raw"),
    }
    return envelope  # type: ignore[return-value]  # built by the names of the TypedDict; validated by the caller


# Snapshots.


@refused_with_path("loop_run_snapshot")
def snapshot_to_message(envelope: SnapshotEnvelope) -> envelopes_pb2.SnapshotEnvelope:
    """The mirror of a snapshot."""
    message = envelopes_pb2.SnapshotEnvelope(
        schema_version=envelope["schemaVersion"],
        envelope_type=envelope["envelopeType"],
        emitted_at=envelope["emittedAt"],
        source=envelopes_pb2.Source(repo_path=envelope["source"]["repoPath"], loop_id=envelope["source"]["loopId"]),
    )
    if "traceId" in envelope:
        set_nullable(message.trace_id, envelope["traceId"])
    if "sequence" in envelope:
        _fill_sequence(message.sequence, envelope["sequence"])
    _fill_cursor(message.cursor, envelope["cursor"])

    run = envelope["run"]
    message.run.run_id = run["runId"]
    message.run.iteration = run["iteration"]
    message.run.status = _RUN_STATUS.number(run["status"], "run.status")  # type: ignore[assignment]  # an enum's number
    if run["summary"] is not None:
        message.run.summary.json = text_of(run["summary"], "run.summary")

    runtime = envelope["runtime"]
    message.runtime.SetInParent()
    for name, into in (
        ("superloopState", message.runtime.superloop_state),
        ("activeRun", message.runtime.active_run),
        ("approval", message.runtime.approval),
    ):
        if (content := runtime[name]) is not None:  # type: ignore[literal-required]  # the names just above
            into.json = text_of(content, f"runtime.{name}")
    if "heartbeat" in runtime:
        set_nullable_object(message.runtime.heartbeat, runtime["heartbeat"], "runtime.heartbeat")

    artifacts = envelope["artifacts"]
    _fill_artifact(message.artifacts.events, artifacts["events"])
    _fill_artifact(message.artifacts.run_summary, artifacts["runSummary"])
    _fill_artifact(message.artifacts.state, artifacts["state"])
    _fill_artifact(message.artifacts.active_run, artifacts["activeRun"])
    _fill_artifact(message.artifacts.approval, artifacts["approval"])
    if "heartbeat" in artifacts:
        _fill_artifact(message.artifacts.heartbeat, artifacts["heartbeat"])

    message.health.CopyFrom(_health_to_message(envelope["health"]))
    return message


def snapshot_from_message(message: envelopes_pb2.SnapshotEnvelope) -> SnapshotEnvelope:
    """The snapshot that `message` mirrors.

    Raises:
        ContractError: a required part is unset, or a text is not a JSON object.
    """
    required(message, "source", "run", "runtime", "artifacts", "cursor", "health")
    required(message.artifacts, "events", "run_summary", "state", "active_run", "approval", path="artifacts.")
    run, runtime, artifacts, health = message.run, message.runtime, message.artifacts, message.health
    envelope: dict[str, Any] = {
        "schemaVersion": message.schema_version,
        "envelopeType": message.envelope_type,
        "emittedAt": message.emitted_at,
    }
    if message.HasField("trace_id"):
        envelope["traceId"] = nullable_from(message.trace_id)
    envelope["source"] = {"repoPath": message.source.repo_path, "loopId": message.source.loop_id}
    if message.HasField("sequence"):
        envelope["sequence"] = _sequence_from(message.sequence)
    envelope["run"] = {
        "runId": run.run_id,
        "iteration": run.iteration,
        "status": _RUN_STATUS.name(run.status, "run.status"),
        "summary": object_from(run.summary, "run.summary") if run.HasField("summary") else None,
    }
    envelope["runtime"] = {
        name: object_from(content, f"runtime.{name}") if there else None
        for name, there, content in (
            ("superloopState", runtime.HasField("superloop_state"), runtime.superloop_state),
            ("activeRun", runtime.HasField("active_run"), runtime.active_run),
            ("approval", runtime.HasField("approval"), runtime.approval),
        )
    }
    if runtime.HasField("heartbeat"):
        envelope["runtime"]["heartbeat"] = nullable_object_from(runtime.heartbeat, "runtime.heartbeat")
    envelope["artifacts"] = {
        "events": _artifact_from(artifacts.events),
        "runSummary": _artifact_from(artifacts.run_summary),
        "state": _artifact_from(artifacts.state),
        "activeRun": _artifact_from(artifacts.active_run),
        "approval": _artifact_from(artifacts.approval),
    }
    if artifacts.HasField("heartbeat"):
        envelope["artifacts"]["heartbeat"] = _artifact_from(artifacts.heartbeat)
    envelope["cursor"] = _cursor_from(message.cursor)
    envelope["health"] = {
        "eventCount": health.event_count,
        "lastEventAt": health.last_event_at if health.HasField("last_event_at") else None,
        "lastEventName": health.last_event_name if health.HasField("last_event_name") else None,
        "lastSummaryAt": health.last_summary_at if health.HasField("last_summary_at") else None,
        "hasPendingApproval": health.has_pending_approval,
        "gates": _gates_from(health.gates) if health.HasField("gates") else None,
        "stuck": (
            {"streak": health.stuck.streak, "threshold": health.stuck.threshold} if health.HasField("stuck") else None
        ),
    }
    return envelope  # type: ignore[return-value]  # built by the names of the TypedDict; validated by the caller


# Parts.


def _fill_sequence(message: envelopes_pb2.Sequence, sequence: Sequence) -> None:
    message.source = sequence["source"]
    message.value = sequence["value"]


def _sequence_from(message: envelopes_pb2.Sequence) -> Sequence:
    return {"source": message.source, "value": message.value}


def _fill_cursor(message: envelopes_pb2.Cursor, cursor: Cursor) -> None:
    message.event_line_offset = cursor["eventLineOffset"]
    message.event_line_count = cursor["eventLineCount"]


def _cursor_from(message: envelopes_pb2.Cursor) -> Cursor:
    return {"eventLineOffset": message.event_line_offset, "eventLineCount": message.event_line_count}


def _fill_artifact(message: envelopes_pb2.ArtifactRef, artifact: ArtifactRef) -> None:
    message.path = artifact["path"]
    message.exists = artifact["exists"]
    message.size_bytes = artifact["sizeBytes"]
    message.line_count = artifact["lineCount"]
    if artifact["sha256"] is not None:
        message.sha256 = artifact["sha256"]
    if artifact["mtimeEpoch"] is not None:
        message.mtime_epoch = artifact["mtimeEpoch"]


def _artifact_from(message: envelopes_pb2.ArtifactRef) -> ArtifactRef:
    return {
        "path": message.path,
        "exists": message.exists,
        "sizeBytes": message.size_bytes,
        "lineCount": message.line_count,
        "sha256": message.sha256 if message.HasField("sha256") else None,
        "mtimeEpoch": message.mtime_epoch if message.HasField("mtime_epoch") else None,
    }


def _health_to_message(health: SnapshotHealth) -> envelopes_pb2.SnapshotHealth:
    message = envelopes_pb2.SnapshotHealth(
        event_count=health["eventCount"],
        last_event_at=health["lastEventAt"],
        last_event_name=health["lastEventName"],
        last_summary_at=health["lastSummaryAt"],
        has_pending_approval=health["hasPendingApproval"],
    )
    if (gates := health["gates"]) is not None:
        message.gates.CopyFrom(
            envelopes_pb2.Gates(
                **{name: gates[name] for name in GATES},
                additional={name: result for name, result in gates.items() if name not in GATES},
            )
        )
    if (stuck := health["stuck"]) is not None:
        message.stuck.CopyFrom(envelopes_pb2.Stuck(streak=stuck["streak"], threshold=stuck["threshold"]))
    return message


def _gates_from(message: envelopes_pb2.Gates) -> dict[str, str]:
    if doubled := [name for name in GATES if name in message.additional]:
        raise ContractError("stands among the additional gates", path=f"health.gates.{doubled[0]}")
    gates = {name: getattr(message, name) for name in GATES}
    return gates | {name: message.additional[name] for name in sorted(message.additional)}
