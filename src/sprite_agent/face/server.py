"""The agent's server: one grpc.aio server for one repo, from its lock to its drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sprite_agent.callers import ANONYMOUS
from sprite_agent.control.engine import MAX_CONTROLS
from sprite_agent.errors import JournalCorrupt, JournalUnavailable, OpsError, TokenInvalid, TokenMissing
from sprite_agent.face.access import Access
from sprite_agent.face.auth import Auth
from sprite_agent.face.credential_files import CredentialFiles
from sprite_agent.face.healths import NOT_SERVING, SERVING, Healths
from sprite_agent.face.intake import Intake
from sprite_agent.face.limits import CallerLimits
from sprite_agent.face.listener import bind
from sprite_agent.face.metrics import AgentMetrics
from sprite_agent.face.only_agent import only_agent
from sprite_agent.face.readiness import ControlReadiness
from sprite_agent.face.service import MAX_REQUEST_BYTES, MAX_STREAM_AGE, Identity, SpriteAgentService
from sprite_agent.face.tls import CertificateFiles
from sprite_agent.repo import Repo
from sprite_agent.v1 import service_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
    from concurrent.futures import Executor

    from sprite_agent.face.answers import OpenCalls
    from sprite_agent.face.config import ServeConfig

SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["SpriteAgentService"].full_name
CONTROL_NAME = f"{SERVICE_NAME}/control"
"""What health checks ask for who want to know of control: reads may be served where it is not."""
THREADS = MAX_CONTROLS + 16
"""For the plain handlers. Controls, which may wait long, always leave some for reads."""
SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread that computes keeps the interpreter from the others, a tenth of the default: what reads a
hostile log computes for long, and each of the many short steps of a control would wait for it."""
OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""An event is a dozen objects without a cycle: looking for cycles after every 700 takes a fifth of a replay's time."""
READ_PATIENCE = 10.0
"""Seconds that a call waits for a log which is still being read: less than its caller waits for the answer."""
CONTROL_GRACE = 45.0
"""Seconds: a command's time limit, and time to record its outcome."""
STREAM_GRACE = 2.0
"""Seconds for the last batch of a stream to be read."""
LAST_GRACE = 0.5
"""Seconds for answers that are on their way."""

CALLS_BESIDE_STREAMS = 64
"""Calls a connection may have open beside its streams, those that follow and as many that end: without room for them, a
caller that has all its streams on one connection could not even cancel a loop."""
DESCRIPTORS = 65_536
"""As many as deploy/sprite-agent.service gives."""
INSECURE_REMINDER = 60.0
"""Seconds between two warnings that nobody has to prove who they are."""

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),  # the largest legal request has some 8 KiB
    ("grpc.max_send_message_length", 4 * 1024 * 1024),  # a snapshot; what managers take at most
    ("grpc.server_handshake_timeout_ms", 5_000),  # else 120 s: hundreds of sockets that say nothing stay open
    ("grpc.keepalive_time_ms", 20_000),  # a peer that vanished is noticed within this and the next
    ("grpc.http2.ping_timeout_ms", 10_000),  # what takes effect: keepalive_timeout_ms alone leaves 60 s
    ("grpc.keepalive_timeout_ms", 10_000),  # in case a later gRPC heeds it again
    ("grpc.keepalive_permit_without_calls", 1),  # a connection without calls may be dead as well
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # half of what managers do: none is taken for a flood
    ("grpc.http2.max_pings_without_data", 0),  # go on asking while a stream has nothing to say
    ("grpc.max_connection_idle_ms", 300_000),  # nobody keeps a connection without using it
    ("grpc.max_connection_age_ms", 3_600_000),  # nothing lives for ever: certificates and tokens are shown anew
    ("grpc.max_connection_age_grace_ms", 60_000),  # for what is under way then
    ("grpc.so_reuseport", 0),  # two agents must not share a port
    # No grpc.max_allowed_incoming_connections: gRPC 1.85 never gives back the place of a connection that was closed.
)

_log = structlog.get_logger("sprite_agent.face.server")


class ServeError(Exception):
    """The agent can't serve; the message says why and what to do."""


async def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Raises:
        ServeError: it could not start.
    """
    _allow_descriptors()
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    gc.freeze()  # what was imported stays
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            _log.warning("second signal: ending now; the journal keeps what was begun")
            os._exit(1)
        stop.set()

    credentials = _credentials(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, credentials.reload)
    async with running(config, credentials) as address:
        _log.info("serving", address=address, repo=str(config.repo), tls=config.tls is not None)
        await stop.wait()
        _log.info("draining")
    _log.info("stopped")


def _allow_descriptors() -> None:
    """As many as it may have: strangers hold connections, and a shell's thousand would be gone with them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.asynccontextmanager
async def running(config: ServeConfig, credentials: CredentialFiles | None = None) -> AsyncGenerator[str]:
    """A server that runs inside the block, and drains at its end. Gives the address it listens on.

    Args:
        config: what and how to serve.
        credentials: whom to let in; None: whom the configuration says.

    Raises:
        ServeError: it could not start.
    """
    try:
        repo = Repo(
            config.repo,
            state_folder=config.state_folder,
            runtime=config.runtime,
            runtime_sha256=config.runtime_sha256,
            user=config.run_as,
            max_stream_age=MAX_STREAM_AGE,
            patience=READ_PATIENCE,
            executors_ahead=True,
        )
        certificates = None if config.tls is None else CertificateFiles(config.tls)
        credentials = credentials or _credentials(config)
        access = Access(credentials, audience=config.sprite_id, require=config.require_signature)
    except ValueError as error:
        raise ServeError(str(error)) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_agent(repo))
        except ValueError as error:
            raise ServeError(str(error)) from error
        stack.callback(repo.close)
        _remember_replays(access, repo)
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="rpc"))
        metrics = AgentMetrics()
        server = grpc.aio.server(
            migration_thread_pool=pool,
            interceptors=[Intake(pool, metrics), Auth(access, metrics, on_refusal=_refusals(repo, pool))],
            options=(
                *OPTIONS,
                ("grpc.max_concurrent_streams", 2 * config.max_streams_per_caller + CALLS_BESIDE_STREAMS),
            ),
        )
        identity = Identity(instance_id=uuid.uuid4().hex, sprite_id=config.sprite_id)
        limits = CallerLimits(max_streams=config.max_streams_per_caller, control_rate=config.max_control_rate)
        service = SpriteAgentService(
            repo, identity, limits=limits, metrics=metrics, credentials=credentials, starting=True
        )
        service_pb2_grpc.add_SpriteAgentServiceServicer_to_server(service, server)
        healths = Healths({SERVICE_NAME: SERVING, CONTROL_NAME: NOT_SERVING})  # control until it was looked at
        health_pb2_grpc.add_HealthServicer_to_server(healths, server)
        names = [SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if config.channelz:
            from grpc_channelz.v1 import channelz, channelz_pb2  # noqa: PLC0415  # few ask for it; 40 ms and 4 MB

            channelz.add_channelz_servicer(server)
            names.append(channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name)
        reflection.enable_server_reflection(names, server)
        try:
            address = bind(server, config.listen, certificates)
        except ValueError as error:
            raise ServeError(str(error)) from error
        await server.start()
        await _recover(service)  # reads are answered meanwhile
        try:
            with (
                _metrics_served(metrics, config.metrics),
                _running(_end_with(server)),
                _running(_remind(address) if config.insecure else _readiness(repo, healths, metrics)),
            ):
                yield address
        finally:
            healths.end()
            await _drain(server, service)


def _credentials(config: ServeConfig) -> CredentialFiles:
    try:
        return CredentialFiles(config.credential_sources)
    except ValueError as error:
        raise ServeError(str(error)) from error


def _remember_replays(access: Access, repo: Repo) -> None:
    """What controls were signed with before a restart is not taken again after it."""
    if repo.folder.has_journal():
        with contextlib.suppress(JournalCorrupt, JournalUnavailable):  # then no control is served either
            access.replays.prime(repo.nonces())


def _refusals(repo: Repo, pool: Executor) -> Callable[[str, str], None]:
    """Has the refusals of callers that have proved who they are noted in the audit: strangers could crowd them out."""

    def refused(reason: str, identity: str) -> None:
        if identity != ANONYMOUS.identity and reason not in {TokenMissing.reason, TokenInvalid.reason}:
            pool.submit(repo.note_refusal, {"reason": reason, "caller": {"identity": identity}})

    return refused


def _readiness(repo: Repo, healths: Healths, metrics: AgentMetrics) -> Coroutine[Any, Any, None]:
    return ControlReadiness(CONTROL_NAME, repo, healths, metrics).watch()


@contextlib.contextmanager
def _running(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Runs a coroutine beside the block, and ends it with it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


@contextlib.contextmanager
def _metrics_served(metrics: AgentMetrics, address: tuple[str, int] | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if address is not None:
            try:
                port = stack.enter_context(metrics.served(*address))
            except OSError as error:
                raise ServeError(f"can't serve metrics on {address[0]}:{address[1]}: {error.strerror}") from error
            _log.info("metrics", address=f"http://{address[0]}:{port}/metrics")
        yield


async def _recover(service: SpriteAgentService) -> None:
    """Reads must be served even where control can't be: a bad journal is reported by each control call."""
    try:
        await asyncio.to_thread(service.recover)
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


async def _end_with(server: grpc.aio.Server) -> None:
    """Ends the process when its server ends by itself: it would answer nobody, and keep the repo from others."""
    cause: Exception | None = None
    try:
        while await server.wait_for_termination(1.0):
            pass
    except Exception as error:  # noqa: BLE001  # whatever it was: ended it has
        cause = error
    _log.critical("the server has ended by itself; the journal keeps what was begun", exc_info=cause)
    os._exit(1)


async def _remind(address: str) -> None:
    while True:
        _log.warning("insecure: everyone who reaches the address may read and control", address=address)
        await asyncio.sleep(INSECURE_REMINDER)
