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

from sprite_agent.callers import ANONYMOUS, CALLER, CERTIFICATE_NAMES, Caller
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
from sprite_agent.errors import OpsError
from sprite_agent.v1 import service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from google.protobuf.message import Message

    from sprite_agent.face.metrics import AgentMetrics
    from sprite_agent.quota import Quota

_R = TypeVar("_R", bound="Message")
_MAX_TRACE_ID = 256
"""A longer one is not given back in the trailers."""

_log = structlog.get_logger("sprite_agent.face.service")


def answered(response: Callable[[], _R]) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Makes a unary handler of a servicer, which counts them in `calls` and `metrics`, answer by the rules."""

    def decorate(handler: Callable[..., _R]) -> Callable[..., _R]:
        @functools.wraps(handler)
        def call(self: Any, request: Any, context: grpc.ServicerContext) -> _R:
            answer = Answer(handler.__name__, request, self.metrics)
            with self.calls:
                try:
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

    def __init__(self, method: str, request: Any, metrics: AgentMetrics, *, lines: Quota | None = None) -> None:
        """`lines`: of refusals, as many are logged as it lets pass; None: each one."""
        self._method = method
        self._metrics = metrics
        self._lines = lines
        self.caller = CALLER.get().identity
        self._trace_id: str | None = getattr(request, "trace_id", None) or None
        self.peer = CALLER.get().address
        self._started = time.monotonic()

    def succeed(self, context: Any, *, executed: bool = False) -> None:
        """Ends the call with OK; `executed`: it ran a command."""
        self._trailers(context, executed=executed)
        self._count("OK")
        _log.info("call", code="OK", **self._facts())

    def fail(self, error: Exception, context: Any) -> None:
        """Ends the call with the status of `error`; of one that is not ours the peer gets an id only."""
        error_id = uuid.uuid4().hex[:12]
        if isinstance(error, OpsError):
            refusal = error
            left_out = 0 if self._lines is None else self._lines.take()
            if left_out is not None:
                more = {"left_out_before": left_out} if left_out else {}
                _log.info("call", code=error.status, reason=error.reason, error_id=error_id, **self._facts(), **more)
        else:
            refusal = internal_error(error_id)
            _log.error("call", code="INTERNAL", error_id=error_id, exc_info=error, **self._facts())
        self._count(refusal.status, refusal.reason)
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
        self._count("CANCELLED")
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

    def _count(self, code: str, reason: str | None = None) -> None:
        self._metrics.answered(self._method, code, time.monotonic() - self._started)
        if reason is not None:
            self._metrics.refused(reason)

    def _facts(self) -> dict[str, Any]:
        return {
            "method": self._method,
            "trace_id": self._trace_id,
            "peer": self.peer,
            "caller": self.caller,
            "seconds": round(time.monotonic() - self._started, 4),
        }


def _ran_now(response: Message) -> bool:
    """Whether this call, and not an earlier one, ran a command."""
    return isinstance(response, pb.ExecuteControlResponse) and response.result.executed and not response.result.replayed


def meet(context: Any) -> None:
    """Notes how the agent was reached, before anything is proved: the address, and the names in a certificate.

    For coroutines, when they begin. Asked in a thread, of a call that has ended meanwhile, gRPC crashes the process.
    """
    shown = context.auth_context()
    names = shown.get("x509_subject_alternative_name") or shown.get("x509_common_name") or ()
    names = tuple(name.decode(errors="replace") for name in names)
    CERTIFICATE_NAMES.set(names)
    CALLER.set(Caller(identity=f"certificate:{names[0]}" if names else ANONYMOUS.identity, address=context.peer()))
