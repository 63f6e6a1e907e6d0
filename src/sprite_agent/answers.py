"""How every call is answered: errors as statuses, trailers on every answer, one log line, nothing of a bug's text.

Statuses are set, not aborted with: that works on the aio server and in grpcio-testing alike.
"""

from __future__ import annotations

import functools
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError

from sprite_agent.contract import clock
from sprite_agent.contract.error_details import (
    ERROR_ID_TRAILER,
    EXECUTED_TRAILER,
    SERVER_TIME_TRAILER,
    STATUS_TRAILER,
    TRACE_ID_TRAILER,
    internal_error,
    to_status,
)
from sprite_agent.errors import OpsError, RequestUndecodable
from sprite_agent.v1 import service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from google.protobuf.message import Message

_R = TypeVar("_R", bound="Message")
_MAX_TRACE_ID = 256
"""A longer one is not given back in the trailers."""

_log = structlog.get_logger("sprite_agent.service")


def answered(response: Callable[[], _R]) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Makes a unary handler of a servicer, which counts them in `calls`, answer by the rules."""

    def decorate(handler: Callable[..., _R]) -> Callable[..., _R]:
        @functools.wraps(handler)
        def call(self: Any, request: Any, context: grpc.ServicerContext) -> _R:
            answer = Answer(handler.__name__, request, context)
            with self.calls:
                try:
                    refuse_undecodable(request)
                    result = handler(self, request, context)
                except Exception as error:  # noqa: BLE001  # nothing of it may reach the peer; logged with its trace
                    answer.fail(error, context)
                    return response()
                answer.succeed(context, executed=_ran_now(result))
                return result

        return call

    return decorate


class OpenCalls:
    """Counts the calls that are being answered; entered with each."""

    def __init__(self) -> None:
        # Guards the count: plain handlers run in threads.
        self._lock = threading.Lock()
        self.open = 0

    def __enter__(self) -> None:
        with self._lock:
            self.open += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self.open -= 1


class Answer:
    """One call's answer: its status, trailers and log line. Lives as long as the call."""

    def __init__(self, method: str, request: Any, context: Any) -> None:
        self._method = method
        self._trace_id: str | None = getattr(request, "trace_id", None) or None
        self._peer = _peer(context)  # now: asked of a call that has ended, gRPC crashes the process
        self._started = time.monotonic()

    def succeed(self, context: Any, *, executed: bool = False) -> None:
        """Ends the call with OK; `executed`: it ran a command."""
        self._trailers(context, executed=executed)
        _log.info("call", code="OK", **self._facts())

    def fail(self, error: Exception, context: Any) -> None:
        """Ends the call with the status of `error`; of one that is not ours the peer gets an id only."""
        error_id = uuid.uuid4().hex[:12]
        if isinstance(error, OpsError):
            refusal = error
            _log.info("call", code=error.status, reason=error.reason, error_id=error_id, **self._facts())
        else:
            refusal = internal_error(error_id)
            _log.error("call", code="INTERNAL", error_id=error_id, exc_info=error, **self._facts())
        status = to_status(refusal)
        context.set_code(grpc.StatusCode[refusal.status])
        context.set_details(status.message)
        self._trailers(
            context,
            (ERROR_ID_TRAILER, error_id),
            (STATUS_TRAILER, status.SerializeToString()),
            executed=refusal.executed,
        )

    def hung_up(self) -> None:
        """The caller has ended the call."""
        _log.info("call", code="CANCELLED", **self._facts())

    def _trailers(self, context: Any, *more: tuple[str, str | bytes], executed: bool | None) -> None:
        trailers: list[tuple[str, str | bytes]] = [
            (EXECUTED_TRAILER, "unknown" if executed is None else str(executed).lower()),
            (SERVER_TIME_TRAILER, clock.now()),
            *more,
        ]
        trace_id = self._trace_id
        if trace_id and len(trace_id) <= _MAX_TRACE_ID and trace_id.isascii() and trace_id.isprintable():
            trailers.append((TRACE_ID_TRAILER, trace_id))
        context.set_trailing_metadata(tuple(trailers))

    def _facts(self) -> dict[str, Any]:
        return {
            "method": self._method,
            "trace_id": self._trace_id,
            "peer": self._peer,
            "seconds": round(time.monotonic() - self._started, 4),
        }


class DecodeGuard(grpc.aio.ServerInterceptor):
    """Has requests of our service that are no message answered by our rules: gRPC would tell the parser's text."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on with a decoder that does not raise."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or not str(handler_call_details.method).startswith(self._prefix):
            return handler  # type: ignore[no-any-return]  # typed Any for _replace below
        decode = handler.request_deserializer

        def decode_or_mark(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError:
                return _Undecodable(len(data))

        return handler._replace(request_deserializer=decode_or_mark)  # type: ignore[no-any-return]  # a named tuple


class _Undecodable:
    """Stands in for a request that is no message."""

    def __init__(self, size: int) -> None:
        self.size = size


def refuse_undecodable(request: Any) -> None:
    """Raises RequestUndecodable when the request could not be decoded."""
    if isinstance(request, _Undecodable):
        raise RequestUndecodable(f"the request's {request.size} bytes are no message of this method")


def _ran_now(response: Message) -> bool:
    """Whether this call, and not an earlier one, ran a command."""
    return isinstance(response, pb.ExecuteControlResponse) and response.result.executed and not response.result.replayed


def _peer(context: Any) -> str | None:
    try:
        return str(context.peer())
    except NotImplementedError:  # grpcio-testing has none
        return None
