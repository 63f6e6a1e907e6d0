"""A server guarded as the agent's is, which has a clock of its own and notes what it parses and refuses."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import status_pb2
from grpc_reflection.v1alpha import reflection

from sprite_agent.contract.error_details import from_status
from sprite_agent.contract.signatures import SIGNATURE_KEY
from sprite_agent.face.access import Access
from sprite_agent.face.auth import Auth
from sprite_agent.face.credential_files import CredentialFiles
from sprite_agent.face.intake import Intake
from sprite_agent.face.metrics import AgentMetrics
from sprite_agent.face.server import SERVICE_NAME
from sprite_agent.face.service import Identity, SpriteAgentService
from sprite_agent.v1 import service_pb2_grpc
from support.signing import SPRITE, Clock
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from sprite_agent.errors import OpsError
    from sprite_agent.face.credential_files import CredentialSources
    from sprite_agent.face.credentials import Requirement
    from sprite_agent.repo import Repo

EXECUTE = f"/{SERVICE_NAME}/ExecuteControl"
GET_CONTROL = f"/{SERVICE_NAME}/GetControl"
GET_INFO = f"/{SERVICE_NAME}/GetInfo"
STREAM = f"/{SERVICE_NAME}/StreamEvents"


@dataclass(kw_only=True)
class Guarded:
    """A server, and what became of the calls to it."""

    address: str
    clock: Clock
    access: Access
    parsed: list[bytes] = field(default_factory=list)
    """The requests that a parser has seen."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Reason and caller."""


class _Noting(grpc.aio.ServerInterceptor):
    """Notes what is parsed. The innermost, so that it stands between the guard and the handlers."""

    def __init__(self, parsed: list[bytes]) -> None:
        self._parsed = parsed

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None

        def decode(content: bytes) -> Any:
            self._parsed.append(content)
            return handler.request_deserializer(content)

        return handler._replace(request_deserializer=decode)  # type: ignore[no-any-return]  # a named tuple


@contextlib.asynccontextmanager
async def guarded(
    repo: Repo,
    folder: Path,
    sources: CredentialSources,
    *,
    require: Requirement = "control",
    audience: str | None = SPRITE,
) -> AsyncIterator[Guarded]:
    """Serves `repo` on a socket in `folder` for as long as the block lasts."""
    clock = Clock()
    access = Access(CredentialFiles(sources), audience=audience, require=require, now=clock)
    made = Guarded(address=f"unix:{folder}/guarded.sock", clock=clock, access=access)
    with ThreadPoolExecutor(8, thread_name_prefix="rpc") as pool:
        metrics = AgentMetrics()
        auth = Auth(access, metrics, on_refusal=lambda *refusal: made.refused.append(refusal))
        intake = Intake(pool, metrics)
        server = grpc.aio.server(migration_thread_pool=pool, interceptors=[intake, auth, _Noting(made.parsed)])
        service = SpriteAgentService(repo, Identity(instance_id="0", sprite_id=audience))
        service_pb2_grpc.add_SpriteAgentServiceServicer_to_server(service, server)
        reflection.enable_server_reflection([SERVICE_NAME], server)
        server.add_insecure_port(made.address)
        await server.start()
        try:
            yield made
        finally:
            service.drain()
            await server.stop(0)


def metadata(token: str | None, *signatures: str) -> tuple[tuple[str, str], ...]:
    """What goes with a call."""
    bearer = () if token is None else (("authorization", f"Bearer {token}"),)
    return (*bearer, *((SIGNATURE_KEY, signature) for signature in signatures))


async def answer(
    channel: grpc.aio.Channel, method: str, body: bytes, sent: tuple[tuple[str, str], ...]
) -> bytes | OpsError:
    """The answer's bytes, or for a stream those of the first; or the refusal."""
    try:
        if method == STREAM:
            stream: Any = channel.unary_stream(method)
            return bytes(await anext(aiter(stream(body, metadata=sent, timeout=DEADLINE))))
        unary: Any = channel.unary_unary(method)
        return bytes(await unary(body, metadata=sent, timeout=DEADLINE))
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)


def refusal_of(error: grpc.aio.AioRpcError) -> OpsError:
    """The refusal that the agent has sent."""
    trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailers, error
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    return from_status(status, executed=trailers["x-ops-executed"])
