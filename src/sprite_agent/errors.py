"""Every way the agent refuses, as one tree; both programs and both transports speak it.

OpsError
├── Refused                      the answer is no; the same request will not do better
│   ├── RequestRefused           INVALID_ARGUMENT: LOOP_ID_INVALID, INTENT_UNSUPPORTED, IDEMPOTENCY_KEY_MISSING,
│   │                            IDEMPOTENCY_KEY_INVALID, ACTOR_INVALID, NOTE_INVALID, CURSOR_INVALID,
│   │                            RESUME_TOKEN_INVALID, DEADLINE_INVALID, REQUEST_INVALID, REQUEST_UNDECODABLE,
│   │                            UNKNOWN_FIELDS
│   ├── NotAuthenticated         UNAUTHENTICATED: TOKEN_MISSING, TOKEN_INVALID
│   │   └── SignatureRefused     SIGNATURE_MISSING, SIGNATURE_AMBIGUOUS, SIGNATURE_MALFORMED, SIGNATURE_KEY_UNKNOWN,
│   │                            SIGNATURE_KEY_EXPIRED, SIGNATURE_INVALID, SIGNATURE_WRONG_AUDIENCE,
│   │                            SIGNATURE_WRONG_METHOD, SIGNATURE_BODY_MISMATCH, SIGNATURE_STALE,
│   │                            SIGNATURE_REPLAYED, REPLAY_CACHE_FULL
│   ├── ScopeMissing             PERMISSION_DENIED: SCOPE_MISSING
│   ├── NotFound                 NOT_FOUND: LOOP_NOT_FOUND, EVENTS_NOT_FOUND, CONTROL_NOT_FOUND
│   ├── PositionLost             the cursor or token no longer fits the log:
│   │                            OUT_OF_RANGE CURSOR_BEYOND_END, ABORTED LOG_REPLACED, ABORTED LOG_TRUNCATED,
│   │                            DATA_LOSS HISTORY_REWRITTEN
│   ├── Malformed                DATA_LOSS: EVENT_MALFORMED, ARTIFACT_MALFORMED, CONTRACT_VIOLATION
│   ├── IdempotencyKeyReused     ALREADY_EXISTS: IDEMPOTENCY_KEY_REUSED
│   └── PreconditionRefused      FAILED_PRECONDITION: RUN_MISMATCH, ITERATION_MISMATCH, APPROVAL_NOT_PENDING,
│                                APPROVAL_CHANGED, LOOP_NOT_ACTIVE, REQUEST_TOO_OLD, RUNTIME_MISSING,
│                                RUNTIME_UNTRUSTED, JOURNAL_CORRUPT, ARTIFACT_NOT_REGULAR
├── NotNow                       the answer is no for the moment, nothing was run; the same request may do better
│   │                            UNAVAILABLE: CONTROL_BUSY, DRAINING, JOURNAL_UNAVAILABLE, STARTING,
│   │                            SYSTEM_EXHAUSTED, NOT_EXECUTED
│   └── LimitReached             RESOURCE_EXHAUSTED: STREAM_LIMIT, RATE_LIMITED
└── InternalError                INTERNAL: INTERNAL_ERROR, a bug of the agent's; what was run is unknown

Each leaf has one gRPC status and one reason; `BY_REASON` holds them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class OpsError(Exception):
    """A failure as a fact: a message with its values, and the same values by name.

    Attributes:
        status: name of the gRPC status it travels as.
        reason: its name in the table of reasons; unique to the class.
        details: the values of the message, lowerCamelCase, as text.
        violations: (field, what is wrong with it) for each field at fault.
        retry_after: seconds after which trying again makes sense; None: not said.
        retryable: the same request may do better later.
        executed: whether the attempt ran an intent; None: unknown.
        error_id: finds the agent's log line; None: it has none.
        attempts: calls made until it was raised.
    """

    status: ClassVar[str]
    reason: ClassVar[str]
    retryable: bool = False
    executed: bool | None = False
    attempts: int = 1

    def __init__(
        self,
        message: str,
        *,
        details: Mapping[str, object] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_after: float | None = None,
        error_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.details = {name: str(value) for name, value in (details or {}).items()}
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.error_id = error_id

    @property
    def message(self) -> str:
        """One sentence with the values in it."""
        return str(self.args[0])


class Refused(OpsError):
    """The answer is no, and nothing was run. Do not retry."""


class RequestRefused(Refused):
    """A field of the request is not as it must be."""

    status = "INVALID_ARGUMENT"


class LoopIdInvalid(RequestRefused):
    """The loop id is not a single plain path component."""

    reason = "LOOP_ID_INVALID"


class IntentUnsupported(RequestRefused):
    """Not cancel, approve or reject."""

    reason = "INTENT_UNSUPPORTED"


class IdempotencyKeyMissing(RequestRefused):
    """A control needs an idempotency key."""

    reason = "IDEMPOTENCY_KEY_MISSING"


class IdempotencyKeyInvalid(RequestRefused):
    """The key has other characters, or more of them, than a key may have."""

    reason = "IDEMPOTENCY_KEY_INVALID"


class ActorInvalid(RequestRefused):
    """requested_by is empty, too long or has control characters."""

    reason = "ACTOR_INVALID"


class NoteInvalid(RequestRefused):
    """The note is empty, too long or has control characters."""

    reason = "NOTE_INVALID"


class CursorInvalid(RequestRefused):
    """The line offset is no whole number >= 0."""

    reason = "CURSOR_INVALID"


class ResumeTokenInvalid(RequestRefused):
    """The text is no resume token of ours."""

    reason = "RESUME_TOKEN_INVALID"


class DeadlineInvalid(RequestRefused):
    """A control needs a deadline, and not a longer one than the agent allows."""

    reason = "DEADLINE_INVALID"


class RequestInvalid(RequestRefused):
    """Another field is not as it must be; the violations name it."""

    reason = "REQUEST_INVALID"


class RequestUndecodable(RequestRefused):
    """The bytes are no message of the method."""

    reason = "REQUEST_UNDECODABLE"


class UnknownFields(RequestRefused):
    """The control request has fields this agent does not know, so it can't honour them."""

    reason = "UNKNOWN_FIELDS"


class NotAuthenticated(Refused):
    """The agent does not know who asks."""

    status = "UNAUTHENTICATED"


class TokenMissing(NotAuthenticated):
    """No bearer token came with the call."""

    reason = "TOKEN_MISSING"


class TokenInvalid(NotAuthenticated):
    """The bearer token is not one of the agent's."""

    reason = "TOKEN_INVALID"


class SignatureRefused(NotAuthenticated):
    """The proof that came with the request does not show who sent it."""


class SignatureMissing(SignatureRefused):
    """The method needs a signed request, and no signature came with it."""

    reason = "SIGNATURE_MISSING"


class SignatureAmbiguous(SignatureRefused):
    """More than one signature came with the request."""

    reason = "SIGNATURE_AMBIGUOUS"


class SignatureMalformed(SignatureRefused):
    """The signature is no compact JWT of the form the agent takes."""

    reason = "SIGNATURE_MALFORMED"


class SignatureKeyUnknown(SignatureRefused):
    """No trusted key has this id and belongs to this issuer."""

    reason = "SIGNATURE_KEY_UNKNOWN"


class SignatureKeyExpired(SignatureRefused):
    """The key is not valid yet, or no longer."""

    reason = "SIGNATURE_KEY_EXPIRED"


class SignatureInvalid(SignatureRefused):
    """The signature was not made with the key it names."""

    reason = "SIGNATURE_INVALID"


class SignatureWrongAudience(SignatureRefused):
    """The request was signed for another Sprite."""

    reason = "SIGNATURE_WRONG_AUDIENCE"


class SignatureWrongMethod(SignatureRefused):
    """The request was signed for another method."""

    reason = "SIGNATURE_WRONG_METHOD"


class SignatureBodyMismatch(SignatureRefused):
    """The signature is of other bytes, or goes with another token."""

    reason = "SIGNATURE_BODY_MISMATCH"


class SignatureStale(SignatureRefused):
    """The signature is not of this moment; sign anew, and look at the clocks if that does not help."""

    reason = "SIGNATURE_STALE"


class SignatureReplayed(SignatureRefused):
    """The signature was used before; each attempt needs one of its own."""

    reason = "SIGNATURE_REPLAYED"


class ReplayCacheFull(SignatureRefused):
    """Too many signatures are remembered to take another one; none is forgotten before its time."""

    reason = "REPLAY_CACHE_FULL"


class ScopeMissing(Refused):
    """The caller is known, and may not do this."""

    status = "PERMISSION_DENIED"
    reason = "SCOPE_MISSING"


class NotFound(Refused):
    """What was asked for is not there."""

    status = "NOT_FOUND"


class LoopNotFound(NotFound):
    """The loop has no artifact folder."""

    reason = "LOOP_NOT_FOUND"


class EventsNotFound(NotFound):
    """The loop has no event log."""

    reason = "EVENTS_NOT_FOUND"


class ControlNotFound(NotFound):
    """The journal does not have the key, so nothing was run for it."""

    reason = "CONTROL_NOT_FOUND"


class PositionLost(Refused):
    """The position no longer fits the log. Replay from the start, as a new log."""

    status = "ABORTED"


class CursorBeyondEnd(PositionLost):
    """The cursor is past the lines of the log."""

    status = "OUT_OF_RANGE"
    reason = "CURSOR_BEYOND_END"


class LogReplaced(PositionLost):
    """The log before the position is not the one the position was taken in."""

    reason = "LOG_REPLACED"


class LogTruncated(PositionLost):
    """The log is shorter than the position."""

    reason = "LOG_TRUNCATED"


class HistoryRewritten(PositionLost):
    """The log begins as before, but what was read of it reads otherwise now."""

    status = "DATA_LOSS"
    reason = "HISTORY_REWRITTEN"


class Malformed(Refused):
    """What was read breaks the contract."""

    status = "DATA_LOSS"


class EventMalformed(Malformed):
    """A record of the event log is not an event; everything before it was delivered."""

    reason = "EVENT_MALFORMED"


class ArtifactMalformed(Malformed):
    """An artifact can't be read as what it should be."""

    reason = "ARTIFACT_MALFORMED"


class ContractError(Malformed):
    """A value breaks the contract; `path` says where in its document, as in run.iteration."""

    reason = "CONTRACT_VIOLATION"

    def __init__(self, message: str, *, path: str = "", details: Mapping[str, object] | None = None) -> None:
        super().__init__(f"{path}: {message}" if path else message, details={"path": path, **(details or {})})
        self.path = path


class IdempotencyKeyReused(Refused):
    """The key belongs to another request."""

    status = "ALREADY_EXISTS"
    reason = "IDEMPOTENCY_KEY_REUSED"


class PreconditionRefused(Refused):
    """Things are not as the request needs them."""

    status = "FAILED_PRECONDITION"


class RunMismatch(PreconditionRefused):
    """Another run is at hand."""

    reason = "RUN_MISMATCH"


class IterationMismatch(PreconditionRefused):
    """Another iteration is at hand."""

    reason = "ITERATION_MISMATCH"


class ApprovalNotPending(PreconditionRefused):
    """There is no approval request to decide."""

    reason = "APPROVAL_NOT_PENDING"


class ApprovalChanged(PreconditionRefused):
    """The approval request is not the one the operator was shown."""

    reason = "APPROVAL_CHANGED"


class LoopNotActive(PreconditionRefused):
    """A cancel would stop another loop: it is repo-wide in the runtime."""

    reason = "LOOP_NOT_ACTIVE"


class RequestTooOld(PreconditionRefused):
    """The request was made too long ago to be run now; look at the loop again and make a new one."""

    reason = "REQUEST_TOO_OLD"


class RuntimeMissing(PreconditionRefused):
    """The runtime's command is not configured, or can't be executed."""

    reason = "RUNTIME_MISSING"


class RuntimeUntrusted(PreconditionRefused):
    """The runtime's command is not the one that was configured, or others can change it."""

    reason = "RUNTIME_UNTRUSTED"


class JournalCorrupt(PreconditionRefused):
    """The journal can't be trusted; an operator has to decide."""

    reason = "JOURNAL_CORRUPT"


class ArtifactNotRegular(PreconditionRefused):
    """An artifact is a link, or no regular file, and is not read."""

    reason = "ARTIFACT_NOT_REGULAR"


class NotNow(OpsError):
    """Not at the moment, and nothing was run. The same request may do better later."""

    status = "UNAVAILABLE"
    retryable = True


class ControlBusy(NotNow):
    """Another command runs in this repo."""

    reason = "CONTROL_BUSY"


class Draining(NotNow):
    """The agent is about to stop."""

    reason = "DRAINING"


class JournalUnavailable(NotNow):
    """The journal can't be written."""

    reason = "JOURNAL_UNAVAILABLE"


class Starting(NotNow):
    """The agent still finds out how the last controls came out, or still reads the log."""

    reason = "STARTING"


class SystemExhausted(NotNow):
    """The system gives the agent no more descriptors or memory: it is no fault of what was to be read."""

    reason = "SYSTEM_EXHAUSTED"


class NotExecuted(NotNow):
    """The command could not be started, and provably was not."""

    reason = "NOT_EXECUTED"


class LimitReached(NotNow):
    """The caller has as much of the agent as one caller may have."""

    status = "RESOURCE_EXHAUSTED"


class StreamLimit(LimitReached):
    """The caller has as many streams open as it may have."""

    reason = "STREAM_LIMIT"


class RateLimited(LimitReached):
    """The caller asks more often than it may."""

    reason = "RATE_LIMITED"


class InternalError(OpsError):
    """A bug of the agent's: its log has the text, the error id finds it."""

    status = "INTERNAL"
    reason = "INTERNAL_ERROR"
    executed = None


def _leaves(cls: type[OpsError]) -> Iterator[type[OpsError]]:
    below = cls.__subclasses__()
    if not below:
        yield cls
    for subclass in below:
        yield from _leaves(subclass)


BY_REASON: Mapping[str, type[OpsError]] = {leaf.reason: leaf for leaf in _leaves(OpsError)}
"""The class for each reason."""
