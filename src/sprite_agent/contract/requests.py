"""Control requests: what may be asked, and what makes two requests the same."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, cast

from sprite_agent.contract import json_text
from sprite_agent.contract.validation import violations
from sprite_agent.errors import (
    ActorInvalid,
    IdempotencyKeyInvalid,
    IdempotencyKeyMissing,
    IntentUnsupported,
    LoopIdInvalid,
    NoteInvalid,
    RequestInvalid,
)

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ControlRequest, ControlStatus
    from sprite_agent.errors import RequestRefused

DEFAULT_TIMEOUT = 30.0
"""How long a confirmation looks for the effect, in seconds."""
MAX_CONTROL_DEADLINE = 120.0
"""Longest deadline of a control call, in seconds."""
MAX_NOTE_CHARACTERS = 2000

EXIT_CODES: dict[ControlStatus, int] = {
    "confirmed": 0,
    "executed_unconfirmed": 0,
    "ambiguous": 2,
    "failed_command": 1,
}
"""Exit code of a control command, by the status of its result."""

_REFUSALS: dict[str, tuple[type[RequestRefused], str]] = {
    "loopId": (LoopIdInvalid, "1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first, no '..'"),
    "intent": (IntentUnsupported, "cancel, approve or reject"),
    "idempotencyKey": (IdempotencyKeyInvalid, "1 to 128 of A-Z a-z 0-9 . _ : -"),
    "requestedBy": (ActorInvalid, "1 to 200 characters, no control characters"),
    "note": (NoteInvalid, f"1 to {MAX_NOTE_CHARACTERS} characters, no control characters"),
}
_MEANING = ("loopId", "intent", "requestedBy", "note", "expectedRunId", "expectedIteration", "expectedApprovalDigest")


def check_request(document: dict[str, Any]) -> ControlRequest:
    """`document`, if it is a control request.

    Raises:
        LoopIdInvalid, IntentUnsupported, IdempotencyKeyMissing, IdempotencyKeyInvalid,
        ActorInvalid, NoteInvalid, RequestInvalid: by the first field at fault; the
            violations name all of them.
    """
    found = violations("control_request", document)
    if not found:
        return cast("ControlRequest", document)
    fields = [(field_name(path), message) for path, message in found]
    if not document.get("idempotencyKey"):
        raise IdempotencyKeyMissing(
            "a control needs an idempotency key: 1 to 128 of A-Z a-z 0-9 . _ : -", violations=fields
        )
    at_fault = {path.partition(".")[0] for path, _ in found}
    for field, (refusal, wanted) in _REFUSALS.items():
        if field in at_fault:
            value = str(document.get(field))
            raise refusal(
                f"{field_name(field)} {value[:80]!r} is not valid: {wanted}",
                details={field: value[:80]},
                violations=fields,
            )
    raise RequestInvalid("; ".join(f"{path or 'request'}: {message}" for path, message in fields), violations=fields)


def fingerprint(request: ControlRequest) -> str:
    """A digest of what the request means: two with the same key must have the same.

    Waiting time, trace id and provenance are no part of it.
    """
    confirmation = request.get("confirmation", {"mode": "wait"})
    meaning = [int(value) if isinstance(value := request.get(name), float) else value for name in _MEANING]
    meaning += [confirmation["mode"], confirmation.get("requiredEffect", "completed")]
    return hashlib.sha256(json_text.encode(meaning)).hexdigest()


def field_name(path: str) -> str:
    """A path in a control request as the proto names its fields."""
    return re.sub(r"(?<=[a-z])([A-Z])", lambda match: f"_{match[1].lower()}", path)
