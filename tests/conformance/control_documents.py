"""What a manager writes of an intent: one document of each kind with every key and nothing null."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.documents import REQUEST, RESULT

if TYPE_CHECKING:
    from conformance.documents import Json

_COMMON: Json = {
    "timestamp": "2026-02-23T05:30:14Z",
    "loopId": "loop",
    "intent": "reject",
    "traceId": "trace",
    "requestedBy": "ada",
    "transport": "sprite_service",
    "idempotencyKey": "key-1",
}
_CAME_OUT: Json = {"status": "confirmed", "exitCode": 0, "confirmExitCode": 0, "confirmed": True}
_TRIED: Json = {"retryAttempts": 1, "retryBackoffSeconds": 0.2}
_CONFIRM: Json = {**RESULT["confirmation"], "effect": "completed", "requiredEffect": "completed"}

OUTBOX: Json = {
    "schemaVersion": "v1",
    "key": "key-1",
    "loopId": "loop",
    "request": REQUEST,
    "transport": "sprite_service",
    "address": "unix:agent.sock",
    "state": "done",
    "createdAt": "2026-02-23T05:30:13Z",
    "updatedAt": "2026-02-23T05:30:14Z",
    "attempts": 2,
    "result": RESULT,
    "error": {"reason": "NO_ANSWER", "message": "no answer from unix:agent.sock"},
}
INTENT: Json = {
    **_COMMON,
    **_CAME_OUT,
    **_TRIED,
    "note": "not yet",
    "command": ["superloop", "approve"],
    "commandOutput": "rejected",
    "confirm": _CONFIRM,
    "attemptCodes": ["NO_ANSWER"],
}
CONTROL: Json = {
    **_COMMON,
    **_CAME_OUT,
    **_TRIED,
    "startedAt": "2026-02-23T05:30:13Z",
    "reasonCode": "rejection_observed",
    "durationSeconds": 1.5,
}
INVOCATION: Json = {
    "schemaVersion": "v1",
    **_COMMON,
    "startedAt": "2026-02-23T05:30:13Z",
    "note": "not yet",
    "request": {"doConfirm": True, "timeoutSeconds": 30.0, "intervalSeconds": 1.0, **_TRIED},
    "execution": {
        "status": "success",
        "exitCode": 0,
        "command": ["superloop", "approve"],
        "output": "rejected",
        "replayed": False,
    },
    "confirmation": {"attempted": True, "status": "confirmed", "exitCode": 0, "outcome": _CONFIRM},
    "outcome": {
        "status": "confirmed",
        "confirmed": True,
        "reasonCode": "rejection_observed",
        "durationSeconds": 1.5,
    },
}

CONTROL_DOCUMENTS: dict[str, Json] = {
    "manager_outbox": OUTBOX,
    "manager_intent": INTENT,
    "manager_control": CONTROL,
    "manager_control_invocation": INVOCATION,
}
"""By their kind."""
