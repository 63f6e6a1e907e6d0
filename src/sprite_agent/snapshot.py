"""Builds the snapshot of one loop from its artifacts. It fails closed: what the schema refuses is not a snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from sprite_agent.artifacts import ACTIVE_RUN, MAX_DOCUMENT_BYTES, MAX_SUMMARY_BYTES, STATE
from sprite_agent.contract import clock, json_text
from sprite_agent.contract.envelopes import GATES
from sprite_agent.contract.events import SEQUENCE_SOURCE, absent_if_empty, event_name, whole_number
from sprite_agent.contract.json_text import OpenObject, member
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ArtifactMalformed, ContractError, EventMalformed
from sprite_agent.event_log.records import judged
from sprite_agent.lifecycle import run_status

if TYPE_CHECKING:
    from sprite_agent.artifacts import ArtifactFiles, Document, LoopPaths
    from sprite_agent.contract.agent_state import Finding
    from sprite_agent.contract.envelopes import SnapshotEnvelope
    from sprite_agent.event_log.index import LogView

MAX_SNAPSHOT_BYTES = 3_500_000
"""Of the texts in a snapshot: with what they take beside it on the wire, it fits a message of 4 MiB."""
_MOST_PLACES = 3
"""In which a text of an artifact can stand: gates, say, in the summary and by themselves."""

_decode_entries = json_text.member_decoder("entries").decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopArtifacts:
    """Everything a snapshot is built from, as it was read."""

    log: LogView
    run_summary: Document
    state: Document
    active_run: Document
    approval: Document
    heartbeat: Document

    @property
    def size(self) -> int:
        """Bytes of everything that a snapshot can have a text from."""
        documents = (self.run_summary, self.state, self.active_run, self.approval, self.heartbeat)
        record = self.log.last_record
        return sum(document.ref["sizeBytes"] for document in documents) + (0 if record is None else len(record.text))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopReading:
    """A snapshot, and what it was made from that it does not say."""

    snapshot: SnapshotEnvelope
    resume_token: str
    """The position in the log that the snapshot is consistent with."""
    last_event: dict[str, Any] | None
    """The last record of the log."""
    findings: tuple[Finding, ...] = ()
    """What an operator should look into."""


def read_artifacts(files: ArtifactFiles, paths: LoopPaths, log: LogView) -> LoopArtifacts:
    """Reads the documents beside the log.

    Raises:
        ArtifactMalformed, ArtifactNotRegular
    """
    with files.at_once() as opened:
        return LoopArtifacts(
            log=log,
            run_summary=opened.read_document(paths.run_summary, limit=MAX_SUMMARY_BYTES),
            state=opened.read_document(STATE),
            active_run=opened.read_document(ACTIVE_RUN),
            approval=opened.read_document(paths.approval),
            heartbeat=opened.read_document(paths.heartbeat),
        )


def build_snapshot(
    found: LoopArtifacts, *, repo: str, loop_id: str, trace_id: str | None = None, run_id: str | None = None
) -> LoopReading:
    """The snapshot envelope, and what goes with it.

    Args:
        found: the artifacts.
        repo: absolute path of the repo.
        loop_id: the loop.
        trace_id: passed on.
        run_id: overrides the run's id.

    Raises:
        EventMalformed: the last complete record of the log is no JSON object.
        ArtifactMalformed: an artifact's content leads to what the schema refuses, or to more than a message can carry.
    """
    event = _last_event(found.log)
    summary = _latest_entry(found.run_summary)
    state, approval = found.state.value, found.approval.value
    lines = found.log.lines
    envelope: SnapshotEnvelope = {
        "schemaVersion": "v1",
        "envelopeType": "loop_run_snapshot",
        "emittedAt": clock.now(),
        "traceId": trace_id,
        "source": {"repoPath": repo, "loopId": loop_id},
        "sequence": {"source": SEQUENCE_SOURCE, "value": lines},
        "run": {
            "runId": run_id or member(summary, "run_id") or member(event, "run_id") or "unknown",
            "iteration": whole_number(_first_iteration(summary, event, state)),
            "status": run_status(loop_id, approval=approval, summary=summary, state=state, last_event=event),
            "summary": summary,
        },
        "runtime": {
            "superloopState": state,
            "activeRun": found.active_run.value,
            "approval": approval,
            "heartbeat": found.heartbeat.value,
        },
        "artifacts": {
            "events": found.log.ref,
            "runSummary": found.run_summary.ref,
            "state": found.state.ref,
            "activeRun": found.active_run.ref,
            "approval": found.approval.ref,
            "heartbeat": found.heartbeat.ref,
        },
        "cursor": {"eventLineOffset": lines, "eventLineCount": lines},
        "health": {
            "eventCount": lines,
            "lastEventAt": absent_if_empty(member(event, "timestamp")),
            "lastEventName": absent_if_empty(event_name(event)),
            "lastSummaryAt": absent_if_empty(
                member(found.run_summary.value, "updated_at") or member(summary, "ended_at")
            ),
            "hasPendingApproval": member(approval, "status") == "pending",
            "gates": _gates(member(summary, "gates")),
            "stuck": _stuck(member(summary, "stuck")),
        },
    }
    try:
        validate("loop_run_snapshot", envelope)
    except ContractError as error:
        raise ArtifactMalformed(
            f"the artifacts of loop {loop_id} do not make a valid snapshot: {error}", details={"path": error.path}
        ) from error
    if found.size * _MOST_PLACES > MAX_SNAPSHOT_BYTES and (size := _size(envelope)) > MAX_SNAPSHOT_BYTES:
        raise ArtifactMalformed(
            f"the artifacts of loop {loop_id} make a snapshot of {size} bytes, more than {MAX_SNAPSHOT_BYTES}",
            details={"size": size},
        )
    return LoopReading(snapshot=envelope, resume_token=str(found.log.token), last_event=event)


def _size(value: Any) -> int:
    """Bytes of all the texts in a value, about."""
    if isinstance(value, OpenObject):
        return len(value.text.encode())
    if isinstance(value, dict):
        return sum(_size(key) + _size(item) for key, item in value.items())
    return len(value.encode()) if isinstance(value, str) else 0


def _last_event(log: LogView) -> dict[str, Any] | None:
    if log.last_record is None:
        return None
    record = judged(log.last_record)
    if record.value is None:
        raise EventMalformed(
            f"line {record.first_line} of the event log is malformed: {record.fault}",
            details={"line": record.first_line, "lastLine": record.last_line},
        )
    return record.value


def _latest_entry(document: Document) -> OpenObject | None:
    if document.value is None or document.value.get("entries") is None:
        return None
    path = document.ref["path"]
    try:
        entries = _decode_list(_decode_entries(document.value.text).entries)
        latest = bytes(entries[-1]) if entries else None
        if latest is not None and len(latest) > MAX_DOCUMENT_BYTES:
            raise ContractError(f"the last entry is larger than {MAX_DOCUMENT_BYTES} bytes")
        return None if latest is None else json_text.parse_object(latest)
    except (msgspec.DecodeError, ContractError) as error:
        raise ArtifactMalformed(f"{path}: entries is no list of objects ({error})", details={"path": path}) from error


def _first_iteration(*candidates: dict[str, Any] | None) -> Any:
    return next((found["iteration"] for found in candidates if found and found.get("iteration") is not None), 0)


def _gates(value: Any) -> Any:
    """Gates in one order, whatever the runtime's: those of the contract, then the others by name."""
    if not isinstance(value, dict):
        return value
    others = sorted(value.keys() - set(GATES))
    return {name: value[name] for name in (*GATES, *others) if name in value}


def _stuck(value: Any) -> Any:
    """Likewise, and whole numbers as such, however they are spelled."""
    if not isinstance(value, dict):
        return value
    ordered = {name: value[name] for name in ("streak", "threshold") if name in value} | value
    return {name: _as_whole(item) for name, item in ordered.items()}


def _as_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
