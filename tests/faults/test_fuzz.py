"""T23: bytes that are no request, or nearly one, to each method over the wire; and to what decodes and translates."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance import documents
from opsmgr.transport.messages import batch_from, result_from
from sprite_agent.contract import control_mirror, error_details, mirror
from sprite_agent.contract.loop_ids import check_loop_id
from sprite_agent.contract.requests import check_request, fingerprint
from sprite_agent.contract.streaming import check_query
from sprite_agent.contract.validation import validate
from sprite_agent.errors import BY_REASON, InternalError, OpsError, RunMismatch
from sprite_agent.face.server import SERVICE_NAME, running
from sprite_agent.face.service import _query, _refuse_unknown_fields
from sprite_agent.v1 import service_pb2 as pb
from support.figures import SOAK_VARIABLE, found, scaled
from support.http2 import connected, message
from support.mutations import fields_of, mutated
from support.repos import LOOP, event, line
from support.runtime import executions
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import AgentProgram
    from google.protobuf.message import Message

    from sprite_agent.face.config import ServeConfig
    from sprite_agent.v1 import envelopes_pb2
    from support.http2 import Answered, Http2Peer
    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
SEED = time.time_ns() if os.environ.get(SOAK_VARIABLE) else 23
"""The same bytes with each push, others each night."""
NOT_NOW = {**documents.REQUEST, "loopId": LOOP}
"""A control that is well made; the run it expects is none, so it is never run."""

# What decodes and translates, in this process.


class Target(NamedTuple):
    """One kind of message, and what makes of it what it means."""

    example: Message
    """A right one."""
    read: Callable[[Any], object]
    """May raise an OpsError, and nothing else."""


def read_control(message: pb.ExecuteControlRequest) -> None:
    _refuse_unknown_fields(message)
    fingerprint(check_request(control_mirror.request_from_message(message)))


def read_snapshot(message: envelopes_pb2.SnapshotEnvelope) -> None:
    validate("loop_run_snapshot", mirror.snapshot_from_message(message))


def example_batch() -> pb.StreamEventsResponse:
    batch = pb.StreamEventsResponse(resume_token="token", caught_up=True)  # noqa: S106  # opaque
    batch.events.append(mirror.event_to_message(documents.EVENT))  # type: ignore[arg-type]  # a TypedDict is a dict
    batch.skipped.add(first_line=1, last_line=2, reason="bad", excerpt="x", size_bytes=3, sha256="0" * 64)
    return batch


TARGETS = {
    "GetSnapshot request": Target(
        pb.GetSnapshotRequest(loop_id=LOOP, trace_id="t", run_id="r"), lambda asked: check_loop_id(asked.loop_id)
    ),
    "StreamEvents request": Target(
        pb.StreamEventsRequest(loop_id=LOOP, resume_token="token", max_events=3, trace_id="t"),  # noqa: S106  # opaque
        lambda asked: check_query(_query(asked)),
    ),
    "ExecuteControl request": Target(control_mirror.request_to_message(NOT_NOW), read_control),  # type: ignore[arg-type]
    "GetControl request": Target(
        pb.GetControlRequest(loop_id=LOOP, idempotency_key="key-1"), lambda asked: check_loop_id(asked.loop_id)
    ),
    "snapshot": Target(mirror.snapshot_to_message(documents.SNAPSHOT), read_snapshot),  # type: ignore[arg-type]
    "batch of events": Target(example_batch(), batch_from),
    "control result": Target(control_mirror.result_to_message(documents.RESULT), result_from),  # type: ignore[arg-type]
    "status": Target(
        error_details.to_status(RunMismatch("another", details={"loopId": LOOP}, violations=[("a", "b")])),
        error_details.from_status,
    ),
}


def is_read(target: Target, content: bytes) -> bool:
    """Whether `content` is a message that means something; fails when finding out fails."""
    try:
        target.read(type(target.example).FromString(content))
    except (DecodeError, OpsError):
        return False
    except Exception as error:
        raise AssertionError(f"{content.hex()} of {type(target.example).__name__}") from error
    return True


@pytest.mark.parametrize("name", TARGETS)
def test_a_right_message_is_read(name: str) -> None:
    assert is_read(TARGETS[name], TARGETS[name].example.SerializeToString())


@pytest.mark.timeout(scaled(240, 3600))
@pytest.mark.parametrize("name", TARGETS)
def test_bytes_that_were_a_message_are_read_or_refused(name: str) -> None:
    target, chance = TARGETS[name], random.Random(f"{SEED} {name}")  # noqa: S311  # the same bytes
    example = target.example.SerializeToString()
    most, until = scaled(5_000, 10_000_000), time.monotonic() + scaled(2, 600)
    tried = read = 0
    while tried < most and time.monotonic() < until:
        read += is_read(target, mutated(example, chance))
        tried += 1

    assert 0 < read < tried
    found("T23", f"{name}: {tried:,} mutated, {read:,} still read: no error but ours")


@pytest.mark.timeout(scaled(240, 3600))
@pytest.mark.parametrize("name", TARGETS)
def test_fields_of_any_kind_are_read_or_refused(name: str) -> None:
    target = TARGETS[name]
    example = target.example.SerializeToString()

    @settings(max_examples=scaled(100, 50_000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(fields_of(target.example.DESCRIPTOR), st.booleans())
    def reads(content: bytes, after_the_example: bool) -> None:  # noqa: FBT001  # drawn
        is_read(target, example + content if after_the_example else content)

    reads()


# The same over the wire, to the real program.

KNOWN = (("authorization", f"Bearer {TOKEN}"),)
EXAMPLES: dict[str, Message] = {
    f"/{SERVICE_NAME}/GetInfo": pb.GetInfoRequest(),
    f"/{SERVICE_NAME}/GetSnapshot": pb.GetSnapshotRequest(loop_id=LOOP, trace_id="trace", run_id="run-1"),
    f"/{SERVICE_NAME}/StreamEvents": pb.StreamEventsRequest(loop_id=LOOP, max_events=2, trace_id="trace"),
    f"/{SERVICE_NAME}/ExecuteControl": TARGETS["ExecuteControl request"].example,
    f"/{SERVICE_NAME}/GetControl": pb.GetControlRequest(loop_id=LOOP, idempotency_key="key-1"),
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(service=SERVICE_NAME),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(
        list_services="*"
    ),
}

MAPPED = {0, *(grpc.StatusCode[kind.status].value[0] for kind in BY_REASON.values() if kind is not InternalError)}
"""What the agent may answer. A call that was left alone ends as DEADLINE_EXCEEDED, a bug as INTERNAL or UNKNOWN."""
OF_HEADS = {4, 12}
"""Likewise for a call without time, or of no method."""
OPEN_STREAMS = 50
"""At once; a connection may have 64."""


def is_grpcs_own(answer: Answered) -> bool:
    """Whether gRPC gave this answer by itself, as it does for a call of which the agent never hears."""
    told = answer.headers["grpc-message"]
    own = told.startswith(("Error parsing", "Illegal header")) or "Compression bit set but no encoding" in told
    return own and not any(name.startswith("x-ops") for name in answer.headers)


def made_body(example: bytes, chance: random.Random) -> bytes:
    """What is sent for a request: mostly one message that is nearly right, sometimes not even the frame of one."""
    kind = chance.random()
    if kind < 0.6:
        return message(mutated(example, chance))
    if kind < 0.8:
        return message(chance.randbytes(chance.randrange(60)))
    if kind < 0.85:
        return message(example) + message(mutated(example, chance))
    if kind < 0.87:
        return message(mutated(example, chance), compressed=True)
    if kind < 0.92:
        return message(example, length=chance.choice([0, 1, len(example) + 1, 2**16, 2**31, 2**32 - 1]))
    return chance.randbytes(chance.randrange(30))


async def answers_to(peer: Http2Peer, method: str, bodies: list[bytes]) -> list[Answered]:
    """How each of these bodies was answered; fails when one was not."""
    streams = []
    for body in bodies:
        streams.append(peer.begin(method, KNOWN, timeout="10S"))
        peer.data(streams[-1], body, end=True)
    for stream in streams:
        # One that follows the log answers and goes on.
        await peer.until(lambda: peer.is_over(stream) or bool(peer.answers[stream].body))  # noqa: B023  # waited for here
        if not peer.is_over(stream):
            peer.reset(stream)
    return [peer.answers[stream] for stream in streams]


@pytest.mark.timeout(scaled(240, 3600))
@pytest.mark.parametrize("method", EXAMPLES, ids=lambda method: method.rpartition("/")[2])
async def test_whatever_is_sent_is_answered_by_the_rules_and_the_agent_goes_on(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, method: str
) -> None:
    repo.append(line(event()), line(event()), line(event()))
    program = start_agent("--listen", "127.0.0.1:0")
    example, chance = EXAMPLES[method].SerializeToString(), random.Random(f"{SEED} {method}")  # noqa: S311  # the same bytes
    most, until_ = scaled(200, 1_000_000), time.monotonic() + scaled(10, 300)
    seen: Counter[int | None] = Counter()
    async with connected(program.address()) as peer:
        while seen.total() < most and time.monotonic() < until_:
            bodies = [made_body(example, chance) for _ in range(OPEN_STREAMS)]
            for body, answer in zip(bodies, await answers_to(peer, method, bodies), strict=True):
                assert answer.body or answer.status in MAPPED or is_grpcs_own(answer), (body.hex(), answer)
                seen[answer.status] += 1
        [right] = await answers_to(peer, method, [message(example)])

    assert right.body or right.status in MAPPED
    assert not [entry for entry in program.said("call") if entry["code"] == "INTERNAL"]
    assert "Traceback" not in program.text
    assert executions(repo) == []
    found("T23", f"{method}: {seen.total():,} bodies over the wire: {dict(sorted(seen.items(), key=str))}")


PATHS = [b"", b"/", b"//", b"*", b"/" + b"x" * 5000, b"/a/b/c", b"http://x/y", f"/{SERVICE_NAME}/".encode()]
TOKENS = [b"", b"Bearer", b"Bearer ", b"Bearer \xff", b"\xed\xa0\x80", b"Bearer " + b"t" * 4000, b"Basic eDp5", b"\t"]
TIMEOUTS = ["", "0S", "S", "-1S", "99999999H", "999999999999n", "1.5S", "abc", "1S"]


@pytest.mark.timeout(scaled(240, 3600))
async def test_whatever_a_call_begins_with_is_answered_and_the_agent_goes_on(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles
) -> None:
    program = start_agent("--listen", "127.0.0.1:0")
    chance = random.Random(f"{SEED} heads")  # noqa: S311  # the same bytes
    most, until_ = scaled(200, 1_000_000), time.monotonic() + scaled(10, 300)
    tried = 0
    while tried < most and time.monotonic() < until_:
        async with connected(program.address()) as peer:
            for _ in range(OPEN_STREAMS):
                path = chance.choice([*PATHS, *map(str.encode, EXAMPLES)])
                more = [(f"x-{number}", chance.randbytes(8).hex()) for number in range(chance.randrange(4))]
                token = ("authorization", chance.choice([*TOKENS, KNOWN[0][1].encode()]))
                stream = peer.begin(path, [token, *more], timeout=chance.choice(TIMEOUTS))
                peer.data(stream, message(b""), end=True)
            for stream, answer in peer.answers.items():
                await peer.until(lambda: peer.is_over(stream) or bool(answer.body))  # noqa: B023  # waited for here
                assert answer.body or answer.status in {*MAPPED, *OF_HEADS} or is_grpcs_own(answer), answer
        tried += OPEN_STREAMS

    async with connected(program.address()) as peer:
        [right] = await answers_to(peer, f"/{SERVICE_NAME}/GetInfo", [message(b"")])
    assert right.status == 0
    assert "Traceback" not in program.text
    found("T23", f"{tried:,} heads of calls over the wire")


async def test_a_path_that_is_no_text_does_not_end_the_agent(start_agent: Callable[..., AgentProgram]) -> None:
    program = start_agent("--listen", "127.0.0.1:0")
    async with connected(program.address()) as peer:
        await peer.answer(peer.begin(b"/\xff", end=True))

    async with connected(program.address()) as peer:
        [right] = await answers_to(peer, f"/{SERVICE_NAME}/GetInfo", [message(b"")])
    assert right.status == 0


async def test_an_agent_whose_server_has_ended_ends_too(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ended it: a deaf process would keep the repo's lock."""
    servers: list[grpc.aio.Server] = []
    codes: list[int] = []
    make = grpc.aio.server

    def made(*arguments: Any, **named: Any) -> grpc.aio.Server:
        servers.append(make(*arguments, **named))
        return servers[-1]

    monkeypatch.setattr(grpc.aio, "server", made)
    monkeypatch.setattr("os._exit", codes.append)
    async with running(config):
        await servers[0].stop(0)
        async with asyncio.timeout(DEADLINE):
            while not codes:  # noqa: ASYNC110  # told by another task
                await asyncio.sleep(0.01)

    assert codes == [1]
