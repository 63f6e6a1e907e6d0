"""Who watches the health of an agent is told of it, and can keep nobody waiting by taking nothing."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hyperframe.frame import SettingsFrame

from sprite_agent.face.server import CONTROL_NAME, SERVICE_NAME, running
from support.http2 import connected, message
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sprite_agent.face.config import ServeConfig

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SOON = 5.0
"""Seconds: nothing here has to be waited for."""


@contextlib.asynccontextmanager
async def taking_nothing(address: str, service: str) -> AsyncIterator[None]:
    """A stranger that watches a service, and lets the agent send it no content."""
    async with connected(address) as peer:
        peer.send(SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0}))
        stream = peer.begin("/grpc.health.v1.Health/Watch", timeout="1H")
        peer.data(stream, message(health_pb2.HealthCheckRequest(service=service).SerializeToString()))
        await peer.until(lambda: bool(peer.answers[stream].headers))  # it is being answered
        await peer.heard_out()
        yield


@pytest.mark.parametrize("service", [SERVICE_NAME, CONTROL_NAME])
async def test_an_agent_is_not_kept_from_draining_by_a_watcher_that_takes_nothing(
    config: ServeConfig, service: str
) -> None:
    async with contextlib.AsyncExitStack() as agent, contextlib.AsyncExitStack() as stranger:
        address = await agent.enter_async_context(running(config))
        await stranger.enter_async_context(taking_nothing(address, service))

        await asyncio.wait_for(agent.aclose(), SOON)


async def test_a_watcher_is_told_at_once_beside_one_that_takes_nothing(config: ServeConfig) -> None:
    async with (
        running(config) as address,
        taking_nothing(address, SERVICE_NAME),
        grpc.aio.insecure_channel(address) as channel,
    ):
        healths: Any = health_pb2_grpc.HealthStub(channel)
        watching = healths.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=DEADLINE)

        assert (await asyncio.wait_for(watching.read(), SOON)).status == SERVING


async def test_a_watcher_is_told_that_the_agent_drains(config: ServeConfig) -> None:
    async with contextlib.AsyncExitStack() as agent:
        address = await agent.enter_async_context(running(config))
        async with grpc.aio.insecure_channel(address) as channel:
            healths: Any = health_pb2_grpc.HealthStub(channel)
            watching = healths.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=DEADLINE)
            told = [(await watching.read()).status]
            await agent.aclose()
            told.append((await watching.read()).status)

    assert told == [SERVING, NOT_SERVING]
