"""Who may call: a bearer token, compared in constant time, before a request is even read."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from sprite_agent.contract import clock
from sprite_agent.contract.error_details import (
    ERROR_ID_TRAILER,
    EXECUTED_TRAILER,
    SERVER_TIME_TRAILER,
    STATUS_TRAILER,
    to_status,
)
from sprite_agent.errors import TokenInvalid, TokenMissing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sprite_agent.errors import NotAuthenticated

OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Answered without a token: they say nothing of the repo."""

_SCHEME = "bearer"
_log = structlog.get_logger("sprite_agent.auth")


class TokenCheck(grpc.aio.ServerInterceptor):
    """Lets calls pass that carry the token. It never touches a handler: plain ones stay plain."""

    def __init__(self, token: str) -> None:
        self._digest = _digest(token)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on, or answers with the refusal."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(OPEN_SERVICES):
            return handler
        refusal = self._refusal(handler_call_details.invocation_metadata)
        if refusal is None:
            return handler
        error_id = uuid.uuid4().hex[:12]
        _log.warning("refused", method=method, reason=refusal.reason, error_id=error_id)
        return _refusing(handler, refusal, error_id)

    def _refusal(self, metadata: Any) -> NotAuthenticated | None:
        given = [value for key, value in metadata if key == "authorization"]
        if not given:
            return TokenMissing("no bearer token came with the call; send metadata 'authorization: Bearer <token>'")
        scheme, _, token = str(given[0]).partition(" ")
        if len(given) == 1 and scheme.lower() == _SCHEME and hmac.compare_digest(_digest(token), self._digest):
            return None
        return TokenInvalid("the bearer token is not this agent's")


def _refusing(handler: Any, refusal: NotAuthenticated, error_id: str) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind that only refuses. It leaves the request's bytes unread."""
    status = to_status(refusal)
    trailers = (
        (EXECUTED_TRAILER, "false"),
        (ERROR_ID_TRAILER, error_id),
        (SERVER_TIME_TRAILER, clock.now()),
        (STATUS_TRAILER, status.SerializeToString()),
    )

    async def refuse(_request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode[refusal.status], refusal.message, trailers)

    async def refuse_stream(_request: Any, context: Any) -> AsyncIterator[Any]:
        context.set_code(grpc.StatusCode[refusal.status])
        context.set_details(refusal.message)
        context.set_trailing_metadata(trailers)
        return
        yield  # never reached: it makes this a stream

    if handler.request_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
    else:
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
    refused: grpc.RpcMethodHandler[Any, Any] = make(
        refuse_stream if handler.response_streaming else refuse,
        response_serializer=handler.response_serializer,
    )
    return refused


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
