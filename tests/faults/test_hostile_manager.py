"""What a peer with a right token may ask of control that no manager would: the agent trusts no checks but its own.

H13 (text), H14 (what is not understood), H16 (the shape of a refusal).
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2

from sprite_agent.contract import control_mirror
from sprite_agent.face.server import SERVICE_NAME
from support.http2 import connected, message
from support.mutations import LENGTH, VARINT, field
from support.runtime import SKIPS, executions, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Agent

    from opsmgr.transport.base import Transport
    from support.http2 import Answered, Http2Peer
    from support.repos import LoopFiles

EXECUTE = f"/{SERVICE_NAME}/ExecuteControl"
OK, INVALID_ARGUMENT, EXHAUSTED = 0, 3, 8
LOOP_ID, INTENT, BY, NOTE, KEY, CONFIRMATION, TRACE_ID, PROVENANCE, RUN_ID = range(1, 10)
"""Numbers of the fields of a request."""


@pytest.fixture
async def peer(agent: Agent) -> AsyncIterator[Http2Peer]:
    async with connected(agent.address) as peer:
        yield peer


async def asked(peer: Http2Peer, agent: Agent, *more: bytes, deadline: str = "10S", **members: Any) -> Answered:
    """The answer to a control request with further fields; of one that comes twice the last counts."""
    right = control_mirror.request_to_message(request(**{"confirmation": SKIPS, **members}))  # type: ignore[arg-type]
    stream = peer.begin(EXECUTE, agent.metadata, timeout=deadline)
    peer.data(stream, message(right.SerializeToString() + b"".join(more)), end=True)
    return await peer.answer(stream)


def details(answer: Answered, kind: Any) -> list[Any]:
    """The error details of a type."""
    text = answer.headers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(text + "=" * (-len(text) % 4)))
    return [made for detail in status.details if detail.Unpack(made := kind())]


def reason(answer: Answered) -> str:
    """Why it was refused."""
    (info,) = details(answer, error_details_pb2.ErrorInfo)
    return str(info.reason)


async def test_the_request_that_the_others_differ_from_is_run(peer: Http2Peer, agent: Agent, repo: LoopFiles) -> None:
    repo.ask_approval()

    answer = await asked(peer, agent)

    assert answer.status == OK
    assert len(executions(repo)) == 1


@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        pytest.param(field(NOTE, LENGTH, b"a\0b"), ("NOTE_INVALID", "note"), id="note with a NUL"),
        pytest.param(field(NOTE, LENGTH, b"a\nb"), ("NOTE_INVALID", "note"), id="note of two lines"),
        pytest.param(field(NOTE, LENGTH, b"\x1b[2J"), ("NOTE_INVALID", "note"), id="note for the terminal"),
        pytest.param(
            field(NOTE, LENGTH, "a\u2028b".encode()), ("NOTE_INVALID", "note"), id="note with a line separator"
        ),
        pytest.param(field(NOTE, LENGTH, b""), ("NOTE_INVALID", "note"), id="empty note"),
        pytest.param(field(NOTE, LENGTH, b"x" * 60_000), ("NOTE_INVALID", "note"), id="note as long as a request"),
        pytest.param(field(LOOP_ID, LENGTH, b"demo\n"), ("LOOP_ID_INVALID", "loop_id"), id="loop id with a line break"),
        pytest.param(field(LOOP_ID, LENGTH, b"demo\0"), ("LOOP_ID_INVALID", "loop_id"), id="loop id with a NUL"),
        pytest.param(field(LOOP_ID, LENGTH, b"../demo"), ("LOOP_ID_INVALID", "loop_id"), id="loop id up and down"),
        pytest.param(field(LOOP_ID, LENGTH, b"/etc"), ("LOOP_ID_INVALID", "loop_id"), id="absolute loop id"),
        pytest.param(
            field(BY, LENGTH, b"eve\n## approved - By: ceo"), ("ACTOR_INVALID", "requested_by"), id="actor of two lines"
        ),
        pytest.param(field(BY, LENGTH, b"eve\0"), ("ACTOR_INVALID", "requested_by"), id="actor with a NUL"),
        pytest.param(
            field(KEY, LENGTH, b"key-1\n"), ("IDEMPOTENCY_KEY_INVALID", "idempotency_key"), id="key with a line break"
        ),
        pytest.param(field(TRACE_ID, LENGTH, b"t" * 257), ("REQUEST_INVALID", "trace_id"), id="long trace id"),
    ],
)
async def test_text_that_a_field_may_not_hold_is_refused_and_the_field_named(
    peer: Http2Peer, agent: Agent, repo: LoopFiles, more: bytes, refusal: tuple[str, str]
) -> None:
    repo.ask_approval()
    why, name = refusal

    answer = await asked(peer, agent, more)

    assert (answer.status, reason(answer)) == (INVALID_ARGUMENT, why)
    (fields,) = details(answer, error_details_pb2.BadRequest)
    assert name in {violation.field for violation in fields.field_violations}
    assert answer.headers["x-ops-executed"] == "false"
    assert executions(repo) == []


@pytest.mark.parametrize("number", [LOOP_ID, BY, NOTE, KEY, TRACE_ID, RUN_ID])
@pytest.mark.parametrize("content", [b"\xed\xa0\x80", b"\xff", b"\xc0\x80"], ids=["surrogate", "byte", "overlong"])
async def test_text_that_is_none_is_refused(
    peer: Http2Peer, agent: Agent, repo: LoopFiles, number: int, content: bytes
) -> None:
    repo.ask_approval()

    answer = await asked(peer, agent, field(number, LENGTH, content))

    assert (answer.status, reason(answer)) == (INVALID_ARGUMENT, "REQUEST_UNDECODABLE")
    assert executions(repo) == []


async def test_a_note_over_the_limit_of_a_request_is_refused(peer: Http2Peer, agent: Agent, repo: LoopFiles) -> None:
    repo.ask_approval()

    answer = await asked(peer, agent, field(NOTE, LENGTH, b"x" * 200_000))

    assert answer.status == EXHAUSTED
    assert executions(repo) == []


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(field(LOOP_ID, VARINT, b"\x01"), id="loop id as a number"),
        pytest.param(field(INTENT, LENGTH, b"approve"), id="intent as text"),
        pytest.param(field(NOTE, VARINT, b"\x01"), id="note as a number"),
        pytest.param(field(CONFIRMATION, VARINT, b"\x00"), id="confirmation as false"),
        pytest.param(field(CONFIRMATION, LENGTH, field(1, LENGTH, b"skip")), id="mode as text"),
        pytest.param(field(CONFIRMATION, LENGTH, field(9, VARINT, b"\x01")), id="unknown in confirmation"),
        pytest.param(field(PROVENANCE, LENGTH, field(9, VARINT, b"\x01")), id="unknown in provenance"),
        pytest.param(field(2**29 - 1, LENGTH, b"expected"), id="the highest number"),
        pytest.param(field(500, 3, b"") + field(500, 4, b""), id="a group"),
    ],
)
async def test_what_is_not_understood_is_refused_not_ignored(
    peer: Http2Peer, agent: Agent, repo: LoopFiles, more: bytes
) -> None:
    repo.ask_approval()

    answer = await asked(peer, agent, more)

    assert (answer.status, reason(answer)) == (INVALID_ARGUMENT, "UNKNOWN_FIELDS")
    assert executions(repo) == []


@pytest.mark.parametrize(
    ("members", "refusal"),
    [
        ({"loopId": "other"}, "LOOP_NOT_FOUND"),
        ({"expectedRunId": "run-0"}, "RUN_MISMATCH"),
        ({"expectedIteration": 9}, "ITERATION_MISMATCH"),
        ({"expectedApprovalDigest": "0" * 64}, "APPROVAL_CHANGED"),
        ({"deadline": "500S", "note": "x" * 2000, "requestedBy": "é" * 200}, "DEADLINE_INVALID"),
    ],
)
async def test_every_refusal_of_a_control_has_one_shape(
    peer: Http2Peer, agent: Agent, repo: LoopFiles, members: dict[str, Any], refusal: str
) -> None:
    repo.ask_approval()

    with structlog.testing.capture_logs() as log:
        answer = await asked(peer, agent, **members)

    (info,) = details(answer, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (refusal, "sprite-agent")
    assert answer.headers["x-ops-executed"] == "false"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", answer.headers["x-ops-server-time"])
    assert [entry["reason"] for entry in log if entry.get("error_id") == answer.headers["x-ops-error-id"]] == [refusal]
    assert executions(repo) == []


@pytest.mark.parametrize("note", ["--reject", "--by=eve", "--", "-", "--note"])
@pytest.mark.parametrize("intent", ["approve", "reject"])
async def test_a_note_never_turns_a_decision_over(
    transport: Transport, repo: LoopFiles, intent: str, note: str
) -> None:
    repo.ask_approval()

    result = await transport.execute(request(intent, note=note, confirmation=SKIPS))  # type: ignore[arg-type]  # a TypedDict is a dict

    (execution,) = executions(repo)
    assert result["exitCode"] == 0
    assert execution["argv"][-2:] == ["--note", note]
    assert ("--reject" in execution["argv"][:-2]) == (intent == "reject")
