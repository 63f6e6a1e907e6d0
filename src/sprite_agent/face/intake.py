"""Takes in the request of each call: one whole message, within a time limit, or the call is answered without it.

Left to itself, the server waits for a message for as long as the peer pleases, and a call
whose stream ends without one is never answered.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from sprite_agent.errors import RequestUndecodable
from sprite_agent.face.answers import Answer, meet
from sprite_agent.quota import Quota

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from concurrent.futures import Executor

    from sprite_agent.face.metrics import AgentMetrics

ARRIVAL_TIMEOUT = 10.0
"""Seconds from the head of a call to the end of its request."""


class Intake(grpc.aio.ServerInterceptor):
    """Makes handlers of single requests out of handlers that read them. The outermost of a server's interceptors.

    A handler that reads for itself goes on doing so: with one, a call can be refused before
    anything of its request has come. Bytes that are no message end what is read. Handlers of
    streams are coroutines that write for themselves.

    Plain handlers run in `pool`, as they would in the server's own. Their context is that of
    coroutines: they have to set a status, not abort.
    """

    def __init__(self, pool: Executor, metrics: AgentMetrics) -> None:
        self._pool = pool
        self._metrics = metrics
        # Whose requests are refused here is not known yet, and strangers must not be able to fill the disk with lines.
        self._lines = Quota()
        self._arrivals = _Arrivals()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on to a handler that waits for the request no longer than it may take."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        decode = handler.request_deserializer and _or_end(handler.request_deserializer)
        if handler.request_streaming:
            return handler._replace(request_deserializer=decode)  # type: ignore[no-any-return]  # a named tuple
        method = str(handler_call_details.method).rpartition("/")[2]
        made: grpc.RpcMethodHandler[Any, Any]
        if handler.response_streaming:
            made = grpc.stream_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream), decode, handler.response_serializer
            )
        else:
            made = grpc.stream_unary_rpc_method_handler(
                self._single(method, handler.unary_unary), decode, handler.response_serializer
            )
        return made

    def _single(self, method: str, handler: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def answer(_requests: AsyncIterator[Any], context: Any) -> Any:
            request = await self._arrival(method, context)
            if request is None:
                return None
            if inspect.iscoroutinefunction(handler):
                return await handler(request, context)
            work = contextvars.copy_context()
            return await asyncio.get_running_loop().run_in_executor(self._pool, work.run, handler, request, context)

        return answer

    def _streaming(self, method: str, handler: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def answer(_requests: AsyncIterator[Any], context: Any) -> None:
            request = await self._arrival(method, context)
            if request is not None:
                await handler(request, context)

        return answer

    async def _arrival(self, method: str, context: Any) -> Any:
        """The request, decoded; None: none has come, or not in time, and the call has its answer."""
        meet(context)
        answer = Answer(method, None, self._metrics, lines=self._lines)
        try:
            request = await self._arrivals.of(context)
        except TimeoutError:
            refusal = RequestUndecodable(f"no whole request has come within {ARRIVAL_TIMEOUT:.0f} s")
        else:
            if request is not grpc.aio.EOF:
                return request
            refusal = RequestUndecodable("the call has ended without a whole request of this method")
        answer.fail(refusal, context)
        return None


class _Arrivals:
    """Waits for requests, for each no longer than it may take.

    All may take equally long, so who waits longest is late first, and one timer does for all: that of `asyncio.timeout`
    for each was a twentieth of what the agent does to open a stream.
    """

    def __init__(self) -> None:
        self._until: dict[asyncio.Task[Any], float] = {}
        """Who waits, and until when; in this order."""
        self._timer: asyncio.TimerHandle | None = None

    async def of(self, context: Any) -> Any:
        """The request of a call, decoded; EOF: it has ended without.

        Raises:
            TimeoutError
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # noqa: S101  # a server runs each call in one
        self._until[task] = loop.time() + ARRIVAL_TIMEOUT
        self._timer = self._timer or loop.call_later(ARRIVAL_TIMEOUT, self._end_late)
        try:
            return await context.read()
        except asyncio.CancelledError as error:
            if task in self._until or task.uncancel():
                raise  # somebody else wants it to end
            raise TimeoutError from error
        finally:
            self._until.pop(task, None)

    def _end_late(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        for task, until in tuple(self._until.items()):
            if until > loop.time():
                self._timer = loop.call_at(until, self._end_late)
                return
            del self._until[task]
            task.cancel()


def _or_end(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`decode` as it is, but for bytes that are no message: the parser's text would reach the peer."""

    def decode_or_end(content: bytes) -> Any:
        try:
            return decode(content)
        except DecodeError:
            return grpc.aio.EOF

    return decode_or_end
