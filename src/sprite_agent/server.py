"""The agent's server: one grpc.aio server for one repo, from its lock to its drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sprite_agent.answers import DecodeGuard
from sprite_agent.auth import TokenCheck
from sprite_agent.control import MAX_CONTROLS
from sprite_agent.errors import OpsError
from sprite_agent.repo import Repo
from sprite_agent.service import MAX_REQUEST_BYTES, MAX_STREAM_AGE, Identity, SpriteAgentService
from sprite_agent.v1 import service_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sprite_agent.answers import OpenCalls
    from sprite_agent.config import ServeConfig

SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["SpriteAgentService"].full_name
THREADS = 2 * MAX_CONTROLS
"""For the plain handlers. Controls, which may wait long, never take more than half."""
CONTROL_GRACE = 45.0
"""Seconds: a command's time limit, and time to record its outcome."""
STREAM_GRACE = 2.0
"""Seconds for the last batch of a stream to be read."""
LAST_GRACE = 0.5
"""Seconds for answers that are on their way."""

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.max_concurrent_streams", 64),  # per connection
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # what takes effect: keepalive_timeout_ms alone leaves 60 s
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.so_reuseport", 0),  # two agents must not share a port
)

_log = structlog.get_logger("sprite_agent.server")


class ServeError(Exception):
    """The agent can't serve; the message says why and what to do."""


async def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Raises:
        ServeError: it could not start.
    """
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            _log.warning("second signal: ending now; the journal keeps what was begun")
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    async with running(config) as address:
        _log.info("serving", address=address, repo=str(config.repo), token=config.token is not None)
        if config.token is None:
            _log.warning(
                "no token: everyone who reaches the address may read and control; "
                "set OPS_MANAGER_SERVICE_TOKEN or give --token-file",
                address=address,
            )
        await stop.wait()
        _log.info("draining")
    _log.info("stopped")


@contextlib.asynccontextmanager
async def running(config: ServeConfig) -> AsyncGenerator[str]:
    """A server that runs inside the block, and drains at its end. Gives the address it listens on.

    Raises:
        ServeError: it could not start.
    """
    try:
        repo = Repo(
            config.repo,
            state_folder=config.state_folder,
            runtime=config.runtime,
            max_stream_age=MAX_STREAM_AGE,
        )
    except ValueError as error:
        raise ServeError(str(error)) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(repo.folder.agent_lock())
        except BlockingIOError as error:
            raise ServeError(f"another agent serves this repo already (lock in {repo.folder.path})") from error
        except OpsError as error:
            raise ServeError(str(error)) from error
        stack.callback(repo.close)
        await _recover(repo)
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="rpc"))
        server = grpc.aio.server(
            migration_thread_pool=pool,
            interceptors=[*([TokenCheck(config.token)] if config.token is not None else []), DecodeGuard(SERVICE_NAME)],
            options=OPTIONS,
        )
        identity = Identity(instance_id=uuid.uuid4().hex, sprite_id=config.sprite_id)
        service = SpriteAgentService(repo, identity)
        service_pb2_grpc.add_SpriteAgentServiceServicer_to_server(service, server)
        healths = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healths, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        address = _bind(server, config.listen)
        await server.start()
        await healths.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        try:
            yield address
        finally:
            await healths.enter_graceful_shutdown()
            await _drain(server, service)


async def _recover(repo: Repo) -> None:
    """Reads must be served even where control can't be: a bad journal is reported by each control call."""
    if not repo.folder.journal.exists():
        return
    try:
        await asyncio.to_thread(repo.recover)
    except OpsError as error:
        _log.error("journal", reason=error.reason, message=str(error))


async def _drain(server: grpc.aio.Server, service: SpriteAgentService) -> None:
    """Refuses new control and streams, lets control finish and streams say where to resume, then ends who is left.

    Left are those who watch the health of a server, which has no end, and those who do not read what they are sent.
    """
    service.drain()
    await _until_none(service.calls, CONTROL_GRACE)
    await _until_none(service.streams, STREAM_GRACE)
    await server.stop(LAST_GRACE)


async def _until_none(calls: OpenCalls, timeout: float) -> None:  # noqa: ASYNC109  # a limit, not a failure
    until = time.monotonic() + timeout
    while calls.open and time.monotonic() < until:  # noqa: ASYNC110  # counted in threads, awaited once
        await asyncio.sleep(0.02)


def _bind(server: grpc.aio.Server, listen: str) -> str:
    if listen.startswith("unix:"):
        _refuse_if_in_use(listen.removeprefix("unix:"))
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ServeError(f"can't listen on {listen}: {error}") from error
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        os.chmod(path, 0o600)  # noqa: PTH101  # beside Path.chmod it follows nothing more
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


def _refuse_if_in_use(path: str) -> None:
    """GRPC takes a Unix socket from whoever listens on it; one that was left behind may be taken."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise ServeError(f"can't listen on unix:{path}: another process does")
