"""Every reason the agent has for refusing is met over a real socket, with its status and its trailers.

H16.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import os
import resource
import shutil
import sqlite3
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import status_pb2

from sprite_agent.contract import control_mirror
from sprite_agent.contract.error_details import (
    ERROR_ID_TRAILER,
    EXECUTED_TRAILER,
    SERVER_TIME_TRAILER,
    STATUS_TRAILER,
    TRACE_ID_TRAILER,
    from_status,
)
from sprite_agent.contract.proofs import TrustedKey
from sprite_agent.contract.signatures import SIGNATURE_KEY, Signer
from sprite_agent.control import executors
from sprite_agent.errors import BY_REASON
from sprite_agent.face.credential_text import keys_text
from sprite_agent.face.replay import Replays
from sprite_agent.face.server import running
from sprite_agent.v1 import service_pb2 as pb
from sprite_agent.v1 import service_pb2_grpc
from support.repos import LOOP, event, line
from support.runtime import SKIPS, request, script, turn
from support.runtime import executions as executions_of
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from sprite_agent.errors import OpsError
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

MADE_BY_THE_MANAGER = {"CONTRACT_VIOLATION"}
"""What it says of an answer that it can't read; see tests/opsmgr/test_sprite_service.py."""


@dataclass(kw_only=True)
class World:
    """A repo, how an agent is to serve it, and calls to that agent. One for each test."""

    repo: LoopFiles
    config: ServeConfig
    metadata: tuple[tuple[str, str], ...]
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    @contextlib.asynccontextmanager
    async def serving(self, **changed: Any) -> AsyncIterator[Any]:
        """A stub of an agent with these settings."""
        config = dataclasses.replace(self.config, **changed)
        async with running(config) as address, grpc.aio.insecure_channel(address) as channel:
            yield service_pb2_grpc.SpriteAgentServiceStub(channel)

    async def refused(self, call: Any) -> OpsError:
        """The error that a unary call ends with, as the manager reads it."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return understood(error)
        pytest.fail(f"not refused: {answer}")

    async def control(self, stub: Any, intent: str = "approve", **members: Any) -> OpsError:
        """The error that a control ends with."""
        return await self.refused(self.send(stub, intent, **members))

    def send(self, stub: Any, intent: str = "approve", seconds: float | None = DEADLINE, **members: Any) -> Any:
        """A control, sent."""
        document: Any = request(intent, **{"confirmation": SKIPS, "traceId": "trace-1", **members})
        message = control_mirror.request_to_message(document)
        return stub.ExecuteControl(message, timeout=seconds, metadata=self.metadata)

    async def snapshot(self, stub: Any, loop: str = LOOP) -> OpsError:
        """The error that a snapshot ends with."""
        message = pb.GetSnapshotRequest(loop_id=loop, trace_id="trace-1")
        return await self.refused(stub.GetSnapshot(message, timeout=DEADLINE, metadata=self.metadata))

    async def stream(self, stub: Any, **members: Any) -> OpsError:
        """The error that a stream ends with."""
        message = pb.StreamEventsRequest(**{"loop_id": LOOP, "trace_id": "trace-1", **members})
        call = stub.StreamEvents(message, timeout=DEADLINE, metadata=self.metadata)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return understood(error)
        pytest.fail("not refused")

    async def token_of_all(self, stub: Any) -> str:
        """A resume token after everything the log has."""
        message = pb.GetSnapshotRequest(loop_id=LOOP)
        answer = await stub.GetSnapshot(message, timeout=DEADLINE, metadata=self.metadata)
        return str(answer.resume_token)


def understood(error: grpc.aio.AioRpcError) -> OpsError:
    """The error that came, with the trailers every refusal has."""
    trailers = dict(error.trailing_metadata() or ())
    assert {ERROR_ID_TRAILER, SERVER_TIME_TRAILER, EXECUTED_TRAILER, STATUS_TRAILER} <= trailers.keys(), error
    status = status_pb2.Status.FromString(trailers[STATUS_TRAILER])
    found = from_status(status, executed=str(trailers[EXECUTED_TRAILER]), error_id=str(trailers[ERROR_ID_TRAILER]))
    assert error.code().name == found.status
    assert (error.details(), trailers.get(TRACE_ID_TRAILER)) in {
        (found.message, "trace-1"),
        (found.message, None),  # refused before the request was read, or it has none
    }
    return found


PROVOKED: dict[str, Callable[[World], Awaitable[OpsError]]] = {}


def provokes(reason: str) -> Callable[[Callable[[World], Awaitable[OpsError]]], Callable[[World], Awaitable[OpsError]]]:
    """Registers how a reason is met."""

    def register(how: Callable[[World], Awaitable[OpsError]]) -> Callable[[World], Awaitable[OpsError]]:
        assert reason not in PROVOKED
        PROVOKED[reason] = how
        return how

    return register


def provoked_by_control(reason: str, intent: str = "approve", **members: Any) -> None:
    """Registers a control with these members as the way a reason is met."""

    async def control(world: World) -> OpsError:
        world.repo.ask_approval()
        async with world.serving() as stub:
            return await world.control(stub, intent, **members)

    provokes(reason)(control)


provoked_by_control("LOOP_ID_INVALID", loopId="../elsewhere")
provoked_by_control("IDEMPOTENCY_KEY_MISSING", idempotencyKey="")
provoked_by_control("IDEMPOTENCY_KEY_INVALID", idempotencyKey="no spaces")
provoked_by_control("ACTOR_INVALID", requestedBy="two\nlines")
provoked_by_control("NOTE_INVALID", note="a\0b")
provoked_by_control("REQUEST_INVALID", expectedApprovalDigest="none")
provoked_by_control("LOOP_NOT_FOUND", loopId="other")
provoked_by_control("RUN_MISMATCH", expectedRunId="run-9")
provoked_by_control("ITERATION_MISMATCH", expectedIteration=9)
provoked_by_control("APPROVAL_CHANGED", expectedApprovalDigest="0" * 64)
provoked_by_control("REQUEST_TOO_OLD", requestedAt="2020-01-01T00:00:00Z")


@provokes("INTENT_UNSUPPORTED")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        message = pb.ExecuteControlRequest(loop_id=LOOP, requested_by="ada", idempotency_key="key-1", intent=9)  # type: ignore[arg-type]  # no intent
        return await world.refused(stub.ExecuteControl(message, timeout=DEADLINE, metadata=world.metadata))


@provokes("DEADLINE_INVALID")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        return await world.refused(world.send(stub, seconds=None))


@provokes("UNKNOWN_FIELDS")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        message = control_mirror.request_to_message(request())  # type: ignore[arg-type]  # a TypedDict is a dict
        message.MergeFromString(b"\xfa\x3e\x01x")
        return await world.refused(stub.ExecuteControl(message, timeout=DEADLINE, metadata=world.metadata))


@provokes("REQUEST_UNDECODABLE")
async def _(world: World) -> OpsError:
    async with running(world.config) as address, grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_unary("/sprite_agent.v1.SpriteAgentService/GetSnapshot")
        return await world.refused(method(b"\xff\xff\xff", timeout=DEADLINE, metadata=world.metadata))


@provokes("CURSOR_INVALID")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        return await world.stream(stub, event_line_offset=-1)


@provokes("RESUME_TOKEN_INVALID")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        return await world.stream(stub, resume_token="not one")  # noqa: S106  # no password


@provokes("CURSOR_BEYOND_END")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        return await world.stream(stub, event_line_offset=9)


@provokes("LOG_REPLACED")
async def _(world: World) -> OpsError:
    world.repo.append(line(event("first")), line(event("second")))
    async with world.serving() as stub:
        token = await world.token_of_all(stub)
        world.repo.replace(line(event("another")) * 9)
        return await world.stream(stub, resume_token=token)


@provokes("LOG_TRUNCATED")
async def _(world: World) -> OpsError:
    world.repo.append(line(event("first")), line(event("second")))
    async with world.serving() as stub:
        token = await world.token_of_all(stub)
        world.repo.truncate(len(line(event("first"))))
        return await world.stream(stub, resume_token=token)


@provokes("HISTORY_REWRITTEN")
async def _(world: World) -> OpsError:
    world.repo.append(line(event("first")), line(event("second")))
    async with world.serving() as stub:
        token = await world.token_of_all(stub)
        world.repo.rewrite(line(event("first")) + line(event("s3cond")) + line(event("third")))
        return await world.stream(stub, resume_token=token)


@provokes("EVENT_MALFORMED")
async def _(world: World) -> OpsError:
    world.repo.append(line(event()), b"no event\n")
    async with world.serving() as stub:
        return await world.stream(stub)


@provokes("ARTIFACT_MALFORMED")
async def _(world: World) -> OpsError:
    world.repo.state.write_text("{")
    async with world.serving() as stub:
        return await world.snapshot(stub)


@provokes("SYSTEM_EXHAUSTED")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        await world.token_of_all(stub)  # it is connected
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            return await world.snapshot(stub)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@provokes("ARTIFACT_NOT_REGULAR")
async def _(world: World) -> OpsError:
    world.repo.state.symlink_to("/etc/passwd")
    async with world.serving() as stub:
        return await world.snapshot(stub)


@provokes("EVENTS_NOT_FOUND")
async def _(world: World) -> OpsError:
    world.repo.log.unlink()
    async with world.serving() as stub:
        return await world.snapshot(stub)


@provokes("CONTROL_NOT_FOUND")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        message = pb.GetControlRequest(loop_id=LOOP, idempotency_key="key-1")
        return await world.refused(stub.GetControl(message, timeout=DEADLINE, metadata=world.metadata))


@provokes("IDEMPOTENCY_KEY_REUSED")
async def _(world: World) -> OpsError:
    world.repo.ask_approval()
    async with world.serving() as stub:
        await world.send(stub)
        return await world.control(stub, "reject")


@provokes("APPROVAL_NOT_PENDING")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        return await world.control(stub)


@provokes("LOOP_NOT_ACTIVE")
async def _(world: World) -> OpsError:
    world.repo.state.write_text('{"active": true, "current_loop_id": "other"}')
    async with world.serving() as stub:
        return await world.control(stub, "cancel")


@provokes("RUNTIME_MISSING")
async def _(world: World) -> OpsError:
    world.repo.ask_approval()
    async with world.serving(runtime=None) as stub:
        return await world.control(stub)


@provokes("RUNTIME_UNTRUSTED")
async def _(world: World) -> OpsError:
    world.repo.ask_approval()
    async with world.serving(runtime_sha256="0" * 64) as stub:
        return await world.control(stub)


@provokes("JOURNAL_CORRUPT")
async def _(world: World) -> OpsError:
    async with world.serving():
        pass
    (world.config.state_folder / "journal.sqlite3").write_bytes(b"")
    async with world.serving() as stub:
        return await world.control(stub)


@provokes("JOURNAL_UNAVAILABLE")
async def _(world: World) -> OpsError:
    world.repo.ask_approval()
    async with world.serving() as stub:
        (world.config.state_folder / "ballast").unlink(missing_ok=True)
        full: Any = OSError(28, "No space left on device")
        world.monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(full))
        return await world.control(stub)


@provokes("CONTROL_BUSY")
async def _(world: World) -> OpsError:
    world.repo.ask_approval()
    world.monkeypatch.setattr("sprite_agent.control.engine.LANE_WAIT", 0.05)
    async with world.serving() as stub:
        with (world.config.state_folder / "lane.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return await world.control(stub)


@provokes("STARTING")
async def _(world: World) -> OpsError:
    async with world.serving():
        pass
    tables = sqlite3.connect(world.config.state_folder / "journal.sqlite3", isolation_level=None)
    tables.execute("BEGIN EXCLUSIVE")  # so that recovery has to wait
    starting = asyncio.create_task(world.serving().__aenter__())
    async with grpc.aio.insecure_channel(world.config.listen) as channel:
        stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
        await asyncio.wait_for(channel.channel_ready(), DEADLINE)
        found = await world.control(stub)
    tables.execute("ROLLBACK")
    tables.close()
    await starting
    return found


@provokes("DRAINING")
async def _(world: World) -> OpsError:
    world.repo.ask_approval()
    turn(world.repo, sleep_before=1.0)
    agent = running(world.config)
    async with grpc.aio.insecure_channel(await agent.__aenter__()) as channel:
        stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
        under_way = asyncio.ensure_future(world.send(stub))
        async with asyncio.timeout(DEADLINE):
            while not executions_of(world.repo):  # noqa: ASYNC110  # told by another process
                await asyncio.sleep(0.01)
        draining = asyncio.create_task(agent.__aexit__(None, None, None))
        found = await world.control(stub, "reject", idempotencyKey="key-2")
        assert (await under_way).result.executed
        await draining
    return found


@provokes("NOT_EXECUTED")
async def _(world: World) -> OpsError:
    world.repo.ask_approval()
    dies = script(world.folder / "dies", "exit 1")
    world.monkeypatch.setattr(executors, "EXECUTOR", (dies,))
    async with world.serving() as stub:
        return await world.control(stub)


@provokes("STREAM_LIMIT")
async def _(world: World) -> OpsError:
    world.repo.append(line(event()))
    async with world.serving(max_streams_per_caller=1) as stub:
        first = stub.StreamEvents(pb.StreamEventsRequest(loop_id=LOOP, follow=True), metadata=world.metadata)
        await first.read()
        found = await world.stream(stub, follow=True)
        first.cancel()
        return found


@provokes("RATE_LIMITED")
async def _(world: World) -> OpsError:
    async with world.serving(max_control_rate=1) as stub:
        found = await world.control(stub)
        while found.reason == "APPROVAL_NOT_PENDING":
            found = await world.control(stub)
        return found


GET_INFO = "/sprite_agent.v1.SpriteAgentService/GetInfo"
KEY = Ed25519PrivateKey.generate()


def signer(key: Ed25519PrivateKey = KEY, **members: Any) -> Signer:
    """The signer of the manager that the agents of these tests trust, in all but `members`."""
    return Signer(**{"key": key, "key_id": "m1", "issuer": "opsmgr-1", "audience": "sprite-1", **members})


@contextlib.asynccontextmanager
async def guarded(
    world: World, *, scopes: tuple[str, ...] = ("read", "control"), not_after: float | None = None
) -> AsyncIterator[Any]:
    """A stub of an agent that has every call signed with KEY."""
    trusted = TrustedKey(
        key_id="m1", issuer="opsmgr-1", public=KEY.public_key(), scopes=frozenset(scopes), not_after=not_after
    )
    path = world.folder / "trusted-keys.json"
    path.write_text(keys_text([trusted]))
    path.chmod(0o600)
    async with world.serving(trusted_keys=path, require_signature="all") as stub:
        yield stub


async def info(world: World, stub: Any, *signatures: str) -> OpsError:
    """The error that GetInfo ends with when these signatures go along."""
    metadata = (*world.metadata, *((SIGNATURE_KEY, signature) for signature in signatures))
    return await world.refused(stub.GetInfo(pb.GetInfoRequest(), timeout=DEADLINE, metadata=metadata))


def signed(world: World, by: Signer, method: str = GET_INFO, body: bytes = b"") -> str:
    """A signature that goes with the test's token."""
    return by.sign(method, body, token=world.config.token)


def provoked_by_signature(reason: str, made: Callable[[World], list[str]], not_after: float | None = None) -> None:
    """Registers a call with these signatures as the way a reason is met."""

    async def call(world: World) -> OpsError:
        async with guarded(world, not_after=not_after) as stub:
            return await info(world, stub, *made(world))

    provokes(reason)(call)


ANOTHER_KEY = Ed25519PrivateKey.generate()
provoked_by_signature("SIGNATURE_MISSING", lambda _: [])
provoked_by_signature("SIGNATURE_AMBIGUOUS", lambda world: [signed(world, signer()), signed(world, signer())])
provoked_by_signature("SIGNATURE_MALFORMED", lambda _: ["a.b.c"])
provoked_by_signature("SIGNATURE_KEY_UNKNOWN", lambda world: [signed(world, signer(key_id="m2"))])
provoked_by_signature("SIGNATURE_KEY_EXPIRED", lambda world: [signed(world, signer())], not_after=1.0)
provoked_by_signature("SIGNATURE_INVALID", lambda world: [signed(world, signer(ANOTHER_KEY))])
provoked_by_signature("SIGNATURE_WRONG_AUDIENCE", lambda world: [signed(world, signer(audience="sprite-2"))])
provoked_by_signature("SIGNATURE_WRONG_METHOD", lambda world: [signed(world, signer(), method="/other/Method")])
provoked_by_signature("SIGNATURE_BODY_MISMATCH", lambda world: [signed(world, signer(), body=b"other")])
provoked_by_signature("SIGNATURE_STALE", lambda world: [signed(world, signer(now=lambda: time.time() - 100))])


@provokes("SIGNATURE_REPLAYED")
async def _(world: World) -> OpsError:
    async with guarded(world) as stub:
        signature = signed(world, signer())
        metadata = (*world.metadata, (SIGNATURE_KEY, signature))
        await stub.GetInfo(pb.GetInfoRequest(), timeout=DEADLINE, metadata=metadata)
        return await info(world, stub, signature)


@provokes("REPLAY_CACHE_FULL")
async def _(world: World) -> OpsError:
    world.monkeypatch.setattr("sprite_agent.face.access.Replays", functools.partial(Replays, capacity=1))
    async with guarded(world) as stub:
        metadata = (*world.metadata, (SIGNATURE_KEY, signed(world, signer())))
        await stub.GetInfo(pb.GetInfoRequest(), timeout=DEADLINE, metadata=metadata)
        return await info(world, stub, signed(world, signer()))


@provokes("SCOPE_MISSING")
async def _(world: World) -> OpsError:
    async with guarded(world, scopes=("control",)) as stub:
        return await info(world, stub, signed(world, signer()))


@provokes("TOKEN_MISSING")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        return await world.refused(stub.GetInfo(pb.GetInfoRequest(), timeout=DEADLINE))


@provokes("TOKEN_INVALID")
async def _(world: World) -> OpsError:
    async with world.serving() as stub:
        wrong = (("authorization", "Bearer another"),)
        return await world.refused(stub.GetInfo(pb.GetInfoRequest(), timeout=DEADLINE, metadata=wrong))


@provokes("INTERNAL_ERROR")
async def _(world: World) -> OpsError:
    def bug(*_: object) -> None:
        raise RuntimeError("a secret of ours")

    world.monkeypatch.setattr("sprite_agent.repo.Repo.loops", bug)
    async with world.serving() as stub:
        found = await world.refused(stub.GetInfo(pb.GetInfoRequest(), timeout=DEADLINE, metadata=world.metadata))
    assert "secret" not in found.message
    return found


@pytest.fixture
def world(repo: LoopFiles, config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    metadata = (("authorization", f"Bearer {config.token}"),)
    return World(repo=repo, config=config, metadata=metadata, folder=tmp_path, monkeypatch=monkeypatch)


def test_every_reason_is_provoked_here() -> None:
    assert PROVOKED.keys() == {name for name, cls in BY_REASON.items() if is_of_the_agent(cls)} - MADE_BY_THE_MANAGER


def is_of_the_agent(cls: type[OpsError]) -> bool:
    return cls.__module__ == "sprite_agent.errors"


@pytest.mark.parametrize("reason", PROVOKED)
async def test_a_refusal_is_the_same_class_on_both_sides_and_says_whether_it_ran(reason: str, world: World) -> None:
    found = await PROVOKED[reason](world)

    assert type(found) is BY_REASON[reason], found
    assert found.executed is (None if reason == "INTERNAL_ERROR" else False)
    assert found.retryable or found.retry_after is None
    assert found.error_id
    shutil.rmtree(world.config.state_folder, ignore_errors=True)
