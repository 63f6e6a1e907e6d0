"""Documents to test with: one of each kind with every key and nothing null, and the golden envelopes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
GOLDEN_CASES = sorted(case.name for case in GOLDEN.iterdir())

EVENT: Json = {
    "schemaVersion": "v1",
    "envelopeType": "loop_run_event",
    "emittedAt": "2026-02-23T05:30:13Z",
    "traceId": "trace",
    "source": {"repoPath": "/repo", "loopId": "loop"},
    "sequence": {"source": "cursor_event_line_offset", "value": 7},
    "cursor": {"eventLineOffset": 7, "eventLineCount": 9},
    "run": {"runId": "run", "iteration": 2},
    "event": {
        "timestamp": "2026-02-23T05:30:06Z",
        "name": "role_end",
        "role": "tester",
        "status": "ok",
        "message": "done",
        "payload": {"exit_code": 0},
        "raw": {"event": "role_end", "data": {"exit_code": 0}},
    },
}
ARTIFACT: Json = {
    "path": ".superloop/state.json",
    "exists": True,
    "sizeBytes": 115,
    "lineCount": 6,
    "sha256": "c20759381e416cc2f492dbfa0aefd0653fd8130952c0a7ce640a420bcbae0702",
    "mtimeEpoch": 1771824607,
}
SNAPSHOT: Json = {
    **{key: EVENT[key] for key in ("schemaVersion", "emittedAt", "traceId", "source", "sequence", "cursor")},
    "envelopeType": "loop_run_snapshot",
    "run": {"runId": "run", "iteration": 2, "status": "running", "summary": {"completion_ok": False}},
    "runtime": {"superloopState": {}, "activeRun": {"pid": 4}, "approval": {"status": "approved"}, "heartbeat": {}},
    "artifacts": {
        name: dict(ARTIFACT) for name in ("events", "runSummary", "state", "activeRun", "approval", "heartbeat")
    },
    "health": {
        "eventCount": 9,
        "lastEventAt": "2026-02-23T05:30:06Z",
        "lastEventName": "role_end",
        "lastSummaryAt": "2026-02-23T05:30:06Z",
        "hasPendingApproval": False,
        "gates": {
            **dict.fromkeys(("tests", "validation", "prerequisites", "checklist", "evidence", "approval"), "ok"),
            "lifecycle": "skipped",
        },
        "stuck": {"streak": 0, "threshold": 3},
    },
}
REQUEST: Json = {
    "loopId": "loop",
    "intent": "approve",
    "requestedBy": "ops",
    "note": "looks good",
    "idempotencyKey": "key-1",
    "traceId": "trace",
    "confirmation": {"mode": "wait", "timeoutSeconds": 30, "requiredEffect": "completed"},
    "provenance": {"managerId": "manager", "host": "host", "attempt": 1},
    "expectedRunId": "run",
    "expectedIteration": 2,
    "expectedApprovalDigest": ARTIFACT["sha256"],
    "requestedAt": "2026-01-02T03:04:05Z",
}
RESULT: Json = {
    "schemaVersion": "v1",
    "envelopeType": "control_result",
    "traceId": "trace",
    "loopId": "loop",
    "intent": "approve",
    "requestedBy": "ops",
    "note": "looks good",
    "idempotencyKey": "key-1",
    "state": "done",
    "status": "ambiguous",
    "reason": "timeout",
    "detail": "decision recorded; no active run to consume it",
    "effect": "decision_recorded",
    "executed": True,
    "replayed": False,
    "command": ["superloop", "approve"],
    "exitCode": -15,
    "timedOut": True,
    "output": "approved",
    "startedAt": "2026-02-23T05:30:06Z",
    "finishedAt": "2026-02-23T05:30:36Z",
    "confirmation": {
        "intent": "approve",
        "confirmed": False,
        "reason": "timeout",
        "attempts": 30,
        "timeoutSeconds": 30,
        "observedStatus": "unknown",
        "observedLastEvent": "approval_decision",
        "observedApprovalStatus": "approved",
        "observedActive": False,
        "observedAt": "2026-02-23T05:30:36Z",
    },
    "journal": {"id": "journal", "sequence": 12},
}
DOCUMENTS = {
    "loop_run_event": EVENT,
    "loop_run_snapshot": SNAPSHOT,
    "control_request": REQUEST,
    "control_result": RESULT,
}


def golden_envelopes(case: str) -> Iterator[tuple[str, Json]]:
    """(kind, envelope) of a case's snapshot and events, with a time in place of @TIME@."""
    for name, kind in (("snapshot.json", "loop_run_snapshot"), ("events.ndjson", "loop_run_event")):
        file = GOLDEN / case / "expected" / name
        if file.exists():
            text = file.read_text().replace("@TIME@", "2026-02-23T05:30:13Z")
            for envelope in text.splitlines() if name == "events.ndjson" else [text]:
                yield kind, json.loads(envelope)
