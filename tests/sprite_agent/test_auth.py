"""Who may call: every way to come without the token is refused before the request is read, and no log has the token."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import structlog
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.error_details import from_status
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import NotAuthenticated, TokenInvalid, TokenMissing
from sprite_agent.face.server import SERVICE_NAME, running
from sprite_agent.quota import PER_MINUTE, Quota
from sprite_agent.v1 import control_pb2, service_pb2_grpc
from sprite_agent.v1 import service_pb2 as pb
from support.repos import LOOP
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import Agent

    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

    Metadata = tuple[tuple[str, str], ...]
    Call = Callable[[grpc.aio.Channel, Metadata], Awaitable[Any]]

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it

RIGHT: list[Any] = [
    pytest.param((("authorization", f"Bearer {TOKEN}"),), id="Bearer"),
    pytest.param((("authorization", f"bearer {TOKEN}"),), id="bearer"),
    pytest.param((("authorization", f"BEARER {TOKEN}"),), id="BEARER"),
]
WRONG: list[Any] = [
    pytest.param((), TokenMissing, id="missing"),
    pytest.param((("x-authorization", f"Bearer {TOKEN}"),), TokenMissing, id="elsewhere"),
    pytest.param((("authorization", "Bearer another"),), TokenInvalid, id="wrong"),
    pytest.param((("authorization", f"Bearer {TOKEN}x"),), TokenInvalid, id="longer"),
    pytest.param((("authorization", f"Bearer {TOKEN[:-1]}"),), TokenInvalid, id="shorter"),
    pytest.param((("authorization", f"Bearer {TOKEN.upper()}"),), TokenInvalid, id="another case"),
    pytest.param((("authorization", "Bearer"),), TokenInvalid, id="only the scheme"),
    pytest.param((("authorization", ""),), TokenInvalid, id="empty"),
    pytest.param((("authorization", TOKEN),), TokenInvalid, id="no scheme"),
    pytest.param((("authorization", f"Basic {TOKEN}"),), TokenInvalid, id="wrong scheme"),
    pytest.param((("authorization", f"Bearer {TOKEN}"),) * 2, TokenInvalid, id="doubled"),
    pytest.param((("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")), TokenInvalid, id="two"),
]


async def unary(channel: grpc.aio.Channel, metadata: Metadata) -> Any:
    stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
    return await stub.GetInfo(pb.GetInfoRequest(), metadata=metadata, timeout=DEADLINE)


async def control(channel: grpc.aio.Channel, metadata: Metadata) -> Any:
    stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
    request = pb.ExecuteControlRequest(
        loop_id=LOOP, intent=control_pb2.INTENT_CANCEL, requested_by="ada", idempotency_key="key-1"
    )
    return await stub.ExecuteControl(request, metadata=metadata, timeout=DEADLINE)


async def stream(channel: grpc.aio.Channel, metadata: Metadata) -> Any:
    stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
    request = pb.StreamEventsRequest(loop_id=LOOP)
    return [response async for response in stub.StreamEvents(request, metadata=metadata, timeout=DEADLINE)]


async def reflection(channel: grpc.aio.Channel, metadata: Metadata) -> Any:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # the stubs know no aio

    ended = asyncio.Event()

    async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        if not any(metadata in right.values for right in RIGHT):
            # What it was refused for is lost on gRPC's client if that is still writing then.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), 0.3)
                return
        yield reflection_pb2.ServerReflectionRequest(list_services="*")

    call = stub.ServerReflectionInfo(requests(), metadata=metadata, timeout=DEADLINE)
    call.add_done_callback(lambda _: ended.set())
    return [found.name async for answer in call for found in answer.list_services_response.service]


GUARDED = pytest.mark.parametrize("call", [unary, control, stream, reflection])


@pytest.fixture
async def channel(agent: Agent) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(agent.address) as channel:
        yield channel


def refusal(error: grpc.aio.AioRpcError) -> tuple[NotAuthenticated, dict[str, Any]]:
    """The error the agent sent, and its trailers."""
    trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
    found = from_status(status_pb2.Status.FromString(trailers["grpc-status-details-bin"]))
    assert isinstance(found, NotAuthenticated)
    return found, trailers


@GUARDED
@pytest.mark.parametrize("metadata", RIGHT)
async def test_a_call_with_the_token_passes(channel: grpc.aio.Channel, call: Call, metadata: Metadata) -> None:
    assert await call(channel, metadata)


@GUARDED
@pytest.mark.parametrize(("metadata", "refused"), WRONG)
async def test_a_call_without_the_token_is_refused(
    channel: grpc.aio.Channel, call: Call, metadata: Metadata, refused: type[NotAuthenticated]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, metadata)

    found, _ = refusal(caught.value)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (type(found), found.message) == (refused, caught.value.details())


@GUARDED
async def test_a_refused_call_has_the_trailers_of_every_answer(channel: grpc.aio.Channel, call: Call) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught, structlog.testing.capture_logs() as log:
        await call(channel, ())

    _, trailers = refusal(caught.value)
    assert trailers["x-ops-executed"] == "false"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", trailers["x-ops-server-time"])
    assert trailers["x-ops-error-id"] in str(log)


async def test_a_refused_call_is_not_read(channel: grpc.aio.Channel) -> None:
    get_info: Any = channel.unary_unary(f"/{SERVICE_NAME}/GetInfo")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await get_info(b"\xff no message", timeout=DEADLINE)

    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_needs_no_token(channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)

    for service in ("", SERVICE_NAME):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_names_the_service(channel: grpc.aio.Channel, agent: Agent) -> None:
    assert SERVICE_NAME in await reflection(channel, agent.metadata)


async def test_an_agent_without_a_token_lets_everyone_in(config: ServeConfig) -> None:
    async with running(dataclasses.replace(config, token=None)) as address, grpc.aio.insecure_channel(address) as open_:
        for call in (unary, control, stream, reflection):
            assert await call(open_, ())
            assert await call(open_, (("authorization", "Bearer whatever"),))


@pytest.mark.parametrize(("token", "refused"), [(None, TokenMissing), ("another", TokenInvalid)])
async def test_the_manager_is_told_that_its_token_is_refused(
    agent: Agent, token: str | None, refused: type[NotAuthenticated]
) -> None:
    transport = SpriteServiceTransport(agent.address, token=token)
    try:
        with pytest.raises(refused):
            await transport.info()
        with pytest.raises(refused):
            await anext(aiter(transport.events(EventQuery(loop_id=LOOP))))
    finally:
        await transport.close()
    assert transport.attempts.retries == 0


async def test_no_log_has_anything_of_a_token(
    channel: grpc.aio.Channel, agent: Agent, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprite_agent.repo.Repo.loops", lambda _: 1 / 0)
    with structlog.testing.capture_logs() as log:
        for metadata in (agent.metadata, (("authorization", "Bearer a-wrong-one"),)):
            for call in (unary, control, stream, reflection):
                try:
                    await call(channel, metadata)
                except grpc.aio.AioRpcError as error:
                    assert error.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAUTHENTICATED}  # noqa: PT017  # some pass

    assert len([entry for entry in log if entry["event"] == "call"]) == 7
    assert TOKEN not in str(log)
    assert "a-wrong-one" not in str(log)


async def test_strangers_cause_so_many_log_lines_a_minute_and_the_next_one_says_how_many_were_left_out(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("sprite_agent.face.auth.Quota", lambda: Quota(lambda: now[0]))
    wrong = (("authorization", "Bearer a-wrong-one"),)
    with structlog.testing.capture_logs() as log:
        async with running(config) as address, grpc.aio.insecure_channel(address) as channel:

            async def refused(times: int) -> list[dict[str, Any]]:
                before = len(log)
                for _ in range(times):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await unary(channel, wrong)
                return [dict(entry) for entry in log[before:] if entry["event"] == "call"]

            flood = await refused(PER_MINUTE + 30)
            await unary(channel, (("authorization", f"Bearer {TOKEN}"),))
            known = log[-1]
            now[0] = 60.0
            later = await refused(2)

    assert len(flood) == PER_MINUTE
    assert all("left_out_before" not in entry for entry in flood)
    assert (known["event"], known["code"]) == ("call", "OK")
    assert [entry.get("left_out_before") for entry in later] == [30, None]


@GUARDED
async def test_of_a_bug_in_the_checks_a_peer_learns_nothing(
    channel: grpc.aio.Channel, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr("sprite_agent.face.access.Access.identify", bug)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(channel, (("authorization", f"Bearer {TOKEN}"),))

    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in repr(raised.value)
