"""T32: with the bounds that a manager has unless told otherwise, a server that never serves costs six tries at most."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from opsmgr import subscription
from opsmgr.subscription import subscribe
from opsmgr.transport import retry
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.error_details import to_status
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import OpsError, Starting
from support.figures import found
from support.repos import LOOP
from support.runtime import SKIPS, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

SERVICE = "sprite_agent.v1.SpriteAgentService"
ASKED = 2.0
"""Seconds that the server asks to wait."""
BOUNDS = RetryPolicy()

Trailers = tuple[tuple[str, str | bytes], ...]
RETRY_INFO: Trailers = (
    ("grpc-status-details-bin", to_status(Starting("not yet", retry_after=ASKED)).SerializeToString()),
)


KINDS: dict[str, tuple[Trailers, int, float]] = {
    "nothing asked": ((), BOUNDS.attempts, 0.0),
    "a pushback of -1": ((("grpc-retry-pushback-ms", "-1"),), 1, 0.0),
    "2 s asked for": (RETRY_INFO, BOUNDS.attempts, ASKED),
}
"""What comes with the refusal, how often is tried then, and the least wait in seconds."""


@dataclass
class Waits:
    """The waits between tries, which pass at once: for those who try, their time has gone by."""

    seconds: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        """The time, with the waits."""
        return time.monotonic() + sum(self.seconds)

    async def sleep(self, seconds: float) -> None:
        """Notes it."""
        self.seconds.append(seconds)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()
    for module in (retry, subscription):
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=waits.sleep))
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=waits.monotonic))
    return waits


@contextlib.asynccontextmanager
async def unavailable(folder: Path, trailers: Trailers) -> AsyncIterator[tuple[list[str], SpriteServiceTransport]]:
    """A server that answers each call with UNAVAILABLE; the calls it has had, and a transport with the usual bounds."""
    calls: list[str] = []

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            method = handler_call_details.method

            async def refuse(_: bytes, context: Any) -> None:
                calls.append(method)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not today", trailers)

            if method.endswith("StreamEvents"):
                return grpc.unary_stream_rpc_method_handler(refuse)
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"unix:{folder}/server.sock")
    await server.start()
    transport = SpriteServiceTransport(f"unix:{folder}/server.sock", token="any")  # noqa: S106  # of no use
    try:
        yield calls, transport
    finally:
        await transport.close()
        await server.stop(0)


async def stream(transport: SpriteServiceTransport) -> None:
    async for _ in subscribe(transport, EventQuery(loop_id=LOOP, follow=True)):
        pass


ASKING: dict[str, Callable[[SpriteServiceTransport], Awaitable[Any]]] = {
    "GetInfo": lambda transport: transport.info(),
    "GetSnapshot": lambda transport: transport.snapshot(LOOP),
    "StreamEvents": stream,
    "ExecuteControl": lambda transport: transport.execute(request(confirmation=SKIPS)),  # type: ignore[arg-type]
    "GetControl": lambda transport: transport.get_control(LOOP, "key-1"),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_never_serves_is_asked_no_oftener_and_no_sooner_than_is_allowed(
    tmp_path: Path, waits: Waits, kind: str
) -> None:
    trailers, tries, least = KINDS[kind]
    longest = 0.0
    for method, ask in ASKING.items():
        waits.seconds.clear()
        async with unavailable(tmp_path, trailers) as (calls, transport):
            with pytest.raises(OpsError) as caught:
                await ask(transport)

        assert [call.rpartition("/")[2] for call in calls] == [method] * tries
        assert caught.value.attempts == tries
        assert len(waits.seconds) == tries - 1
        assert all(wait >= least for wait in waits.seconds)
        assert sum(waits.seconds) <= BOUNDS.budget
        longest = max(longest, sum(waits.seconds))
    found("T32", f"{kind}: {len(ASKING)} calls, each given up at try {tries} after waits of {longest:.0f} s at most")
