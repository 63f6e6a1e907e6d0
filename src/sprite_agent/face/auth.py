"""Lets calls pass whose callers may make them, and says to their handlers who calls."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from sprite_agent.callers import CALLER, CERTIFICATE_NAMES, Caller
from sprite_agent.errors import NotAuthenticated, OpsError, RequestUndecodable
from sprite_agent.face.access import check_control
from sprite_agent.face.answers import Answer, meet
from sprite_agent.quota import Quota

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sprite_agent.face.access import Access, Admission, Call
    from sprite_agent.face.metrics import AgentMetrics

OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Answered without a token: they say nothing of the repo."""


class Auth(grpc.aio.ServerInterceptor):
    """Guards the calls of one server.

    A call with a wrong token is refused before anything of its request has come, and one with
    a wrong signature before the request is parsed: until then it is bytes. Plain handlers stay
    plain, so the checks are made where they run. Inside of an Intake, which gives each call a
    context of its own.
    """

    def __init__(
        self,
        access: Access,
        metrics: AgentMetrics,
        *,
        on_refusal: Callable[[str, str], None] = lambda _reason, _identity: None,
    ) -> None:
        """`on_refusal` is told reason and caller of each call that is refused; by any thread, and must not block."""
        self._access = access
        self._metrics = metrics
        self._on_refusal = on_refusal
        # Strangers must not be able to fill the disk with lines.
        self._strangers_lines = Quota()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on, or answers with the refusal."""
        handler: Any = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(OPEN_SERVICES):
            return handler  # type: ignore[no-any-return]  # typed Any for what is read of it below
        try:
            call = self._access.identify(method, handler_call_details.invocation_metadata or ())
            if handler.request_streaming:
                self._access.check_unsigned(call)
                return handler  # type: ignore[no-any-return]  # likewise
        except Exception as error:  # noqa: BLE001  # likewise
            return self._refusing(handler, method, error)
        if handler.response_streaming:
            guarded = {"unary_stream": self._streaming(handler, call)}
        else:
            guarded = {"unary_unary": self._single(handler, call)}
        return handler._replace(request_deserializer=None, **guarded)  # type: ignore[no-any-return]  # a named tuple

    def _single(self, handler: Any, call: Call) -> Callable[[bytes, Any], Any]:
        def answer(content: bytes, context: Any) -> Any:
            try:
                request, _ = self._admitted(call, content, handler.request_deserializer)
            except Exception as error:  # noqa: BLE001  # of a bug nothing may reach the peer either
                return self._refuse(call.method, error, context)
            return handler.unary_unary(request, context)

        async def answer_async(content: bytes, context: Any) -> Any:
            response = answer(content, context)
            return await response if inspect.isawaitable(response) else response

        return answer_async if inspect.iscoroutinefunction(handler.unary_unary) else answer

    def _streaming(self, handler: Any, call: Call) -> Callable[[bytes, Any], Awaitable[None]]:
        async def answer(content: bytes, context: Any) -> None:
            try:
                request, admission = self._admitted(call, content, handler.request_deserializer)
            except Exception as error:  # noqa: BLE001  # likewise
                self._refuse(call.method, error, context)
                return
            async with contextlib.aclosing(handler.unary_stream(request, context)) as responses:
                async for response in responses:
                    try:
                        self._access.check_still(call, admission)
                    except Exception as error:  # noqa: BLE001  # likewise
                        self._tell(error)
                        with contextlib.suppress(StopAsyncIteration):
                            await responses.athrow(error)  # the handler has its answer: one call, counted once
                        return
                    await context.write(response)

        return answer

    def _admitted(self, call: Call, content: bytes, decode: Callable[[bytes], Any]) -> tuple[Any, Admission]:
        """The request, once it is known who sent it and that they may, and why; CALLER says who.

        Raises:
            SignatureRefused, ScopeMissing, ActorInvalid, RequestUndecodable
        """
        address = CALLER.get().address
        if call.token is not None:
            CALLER.set(Caller(identity=f"token:{call.token.id}", address=address))
        admission = self._access.admit(call, content, CERTIFICATE_NAMES.get())
        proof = admission.proof
        if proof is not None:
            CALLER.set(Caller(identity=f"manager:{proof.issuer}", address=address, proof=proof))
        try:
            request = decode(content)
        except DecodeError as error:
            raise RequestUndecodable(f"the request's {len(content)} bytes are no message of this method") from error
        if call.is_control:
            check_control(request, admission)
        return request, admission

    def _refuse(self, method: str, error: Exception, context: Any) -> None:
        name = method.rpartition("/")[2]
        lines = self._strangers_lines if isinstance(error, NotAuthenticated) else None
        Answer(name, None, self._metrics, lines=lines).fail(error, context)
        self._tell(error)

    def _tell(self, error: Exception) -> None:
        if isinstance(error, OpsError):
            self._on_refusal(error.reason, CALLER.get().identity)

    def _refusing(self, handler: Any, method: str, error: Exception) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler that only refuses. It reads nothing, so the answer does not wait for the request either."""

        async def refuse(_requests: Any, context: Any) -> None:
            meet(context)
            self._refuse(method, error, context)

        async def refuse_stream(requests: Any, context: Any) -> AsyncIterator[Any]:
            await refuse(requests, context)
            return
            yield  # never reached: it makes this a stream

        streaming = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streaming else grpc.stream_unary_rpc_method_handler
        refused: grpc.RpcMethodHandler[Any, Any] = make(
            refuse_stream if streaming else refuse, response_serializer=handler.response_serializer
        )
        return refused
