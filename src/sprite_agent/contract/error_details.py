"""Errors to google.rpc.Status and back: the class that left the agent is the class that arrives.

Each carries one ErrorInfo with the reason and the values of the message, and where they
apply BadRequest, PreconditionFailure and RetryInfo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from sprite_agent.errors import BY_REASON, ContractError, InternalError, OpsError

if TYPE_CHECKING:
    from google.protobuf.message import Message

_M = TypeVar("_M", bound="Message")

DOMAIN = "sprite-agent"
EXECUTED_TRAILER = "x-ops-executed"
ERROR_ID_TRAILER = "x-ops-error-id"
SERVER_TIME_TRAILER = "x-ops-server-time"
TRACE_ID_TRAILER = "x-ops-trace-id"
STATUS_TRAILER = "grpc-status-details-bin"

# In bytes. Trailers of more than 8 KiB in all make gRPC answer RESOURCE_EXHAUSTED instead.
_MAX_MESSAGE = 512
_MAX_VALUE = 160
_MAX_NAME = 64
_MAX_ITEMS = 8


def to_status(error: OpsError) -> status_pb2.Status:
    """What is sent for `error`."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={name: _cut(value, _MAX_VALUE) for name, value in list(error.details.items())[:_MAX_ITEMS]},
    )
    details: list[Message] = [info]
    violations = [(_cut(field, _MAX_NAME), _cut(text, _MAX_VALUE)) for field, text in error.violations[:_MAX_ITEMS]]
    if violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                    for field, text in violations
                ]
            )
        )
    if error.status == "FAILED_PRECONDITION":
        failure = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason,
            subject=_cut(error.details.get("loopId", ""), _MAX_NAME),
            description=_cut(error.message, _MAX_VALUE),
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[failure]))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=_cut(error.message, _MAX_MESSAGE))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def from_status(status: status_pb2.Status, *, executed: str | None = None, error_id: str | None = None) -> OpsError:
    """The error that the agent sent.

    Args:
        status: as received.
        executed: value of the trailer of that name.
        error_id: likewise.

    Raises:
        ContractError: it has no ErrorInfo of the agent's, or a reason that is not known here.
    """
    info = _unpacked(status, error_details_pb2.ErrorInfo())
    if info is None or info.domain != DOMAIN:
        raise ContractError("the status has no ErrorInfo of the agent's")
    cls = BY_REASON.get(info.reason)
    if cls is None:
        raise ContractError(f"reason {info.reason} is not known here: {status.message}")
    fields = _unpacked(status, error_details_pb2.BadRequest())
    retry = _unpacked(status, error_details_pb2.RetryInfo())
    error = cls.__new__(cls)
    OpsError.__init__(
        error,
        status.message,
        details=dict(info.metadata),
        violations=[(violation.field, violation.description) for violation in fields.field_violations]
        if fields
        else (),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
        error_id=error_id,
    )
    if isinstance(error, ContractError):
        error.path = info.metadata.get("path", "")
    if executed is not None:
        error.executed = {"true": True, "false": False}.get(executed)
    return error


def internal_error(error_id: str) -> InternalError:
    """What a peer is told of a bug: nothing of its text, and an id that finds it in the agent's log."""
    return InternalError(f"internal error; the agent's log has it under {error_id}", error_id=error_id)


def _unpacked(status: status_pb2.Status, into: _M) -> _M | None:
    try:
        return next((into for detail in status.details if detail.Unpack(into)), None)
    except DecodeError as error:
        raise ContractError(f"a broken {into.DESCRIPTOR.full_name} in the status") from error


def _cut(text: str, size: int) -> str:
    """The beginning of `text` that takes at most `size` bytes; what has no UTF-8 form is escaped."""
    return text.encode(errors="backslashreplace")[:size].decode(errors="ignore")
