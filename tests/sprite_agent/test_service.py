"""The agent's answers: the same through grpcio-testing and a real server, with trailers and without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import grpc_testing  # type: ignore[import-untyped]  # it has no stubs
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2

from sprite_agent import __version__, logs
from sprite_agent.contract import control_mirror, mirror
from sprite_agent.contract.streaming import MAX_TRACE_BYTES
from sprite_agent.contract.validation import validate
from sprite_agent.control.engine import MAX_CONTROLS
from sprite_agent.control.journal import RETENTION_SECONDS
from sprite_agent.errors import LoopNotFound
from sprite_agent.event_log.index import LogIndex
from sprite_agent.event_log.newest import MAX_BATCH_EVENTS
from sprite_agent.face.server import running
from sprite_agent.face.service import MAX_REQUEST_BYTES, Identity, SpriteAgentService
from sprite_agent.repo import Repo
from sprite_agent.v1 import service_pb2 as pb
from sprite_agent.v1 import service_pb2_grpc
from support.logs import numbered
from support.repos import LOOP, event, line
from support.runtime import SKIPS, executions, request, turn
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from conftest import Agent, AgentProgram
    from google.protobuf.message import Message

    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

    Stub = service_pb2_grpc.SpriteAgentServiceAsyncStub

SERVICE = pb.DESCRIPTOR.services_by_name["SpriteAgentService"]
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
OFTEN = 30
"""How often to ask where gRPC leaves it to chance: trailers over its soft limit, deadlines rounded up."""
SECRET = "secret /path/of/ours"  # noqa: S105  # what a bug's text may hold
BUG = RuntimeError(SECRET)


class Answer(NamedTuple):
    """What a peer gets for a unary call."""

    response: Any
    code: grpc.StatusCode
    message: str
    trailers: dict[str, str | bytes]

    def detail(self, into: Any) -> Any:
        """The error detail of that type; fails when there is none."""
        status = status_pb2.Status.FromString(self.trailers["grpc-status-details-bin"])
        assert any(detail.Unpack(into) for detail in status.details)
        return into

    @property
    def reason(self) -> str:
        """The reason it was refused for."""
        info = self.detail(error_details_pb2.ErrorInfo())
        assert info.domain == "sprite-agent"
        return str(info.reason)

    @property
    def fields(self) -> set[str]:
        """The fields that were at fault."""
        return {violation.field for violation in self.detail(error_details_pb2.BadRequest()).field_violations}


class Ask:
    """One way to the handlers, as in `await ask("GetInfo", request)`; `seconds` is the call's timeout."""

    def __init__(self, call: Callable[[str, Message, float | None], Awaitable[Answer]]) -> None:
        self._call = call

    async def __call__(self, method: str, message: Message, seconds: float | None = DEADLINE) -> Answer:
        """Asks for any method."""
        return await self._call(method, message, seconds)

    async def control(self, intent: str = "approve", seconds: float | None = DEADLINE, **members: Any) -> Answer:
        """Asks for an intent, and does not wait for its effect."""
        return await self("ExecuteControl", control_message(intent, **{"confirmation": SKIPS, **members}), seconds)


def control_message(intent: str = "approve", **members: Any) -> pb.ExecuteControlRequest:
    """The mirror of a control request."""
    return control_mirror.request_to_message(request(intent, **members))  # type: ignore[arg-type]  # a TypedDict is a dict


def ask_servicer(service: SpriteAgentService) -> Ask:
    """Through grpcio-testing: plain handlers, no server, no socket."""
    server = grpc_testing.server_from_dictionary({SERVICE: service}, grpc_testing.strict_real_time())

    def call(method: str, message: Message, seconds: float | None) -> Answer:
        rpc = server.invoke_unary_unary(SERVICE.methods_by_name[method], (), message, seconds)
        response, trailers, code, details = rpc.termination()
        return Answer(response, code, details, dict(trailers))

    async def in_thread(method: str, message: Message, seconds: float | None) -> Answer:
        return await asyncio.to_thread(call, method, message, seconds)

    return Ask(in_thread)


def ask_server(stub: Stub, metadata: tuple[tuple[str, str], ...]) -> Ask:
    """Through a real server."""

    async def call(method: str, message: Message, seconds: float | None) -> Answer:
        pending = getattr(stub, method)(message, timeout=seconds, metadata=metadata)
        try:
            response = await pending
        except grpc.aio.AioRpcError as error:
            return Answer(None, error.code(), error.details() or "", dict(error.trailing_metadata() or ()))
        return Answer(response, await pending.code(), await pending.details(), dict(await pending.trailing_metadata()))

    return Ask(call)


@pytest.fixture
async def stub(agent: Agent) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(agent.address) as channel:
        yield service_pb2_grpc.SpriteAgentServiceStub(channel)


@pytest.fixture
async def service(config: ServeConfig) -> AsyncIterator[SpriteAgentService]:
    """A servicer without a server."""
    core = Repo(config.repo, state_folder=config.state_folder, runtime=config.runtime)
    yield SpriteAgentService(core, Identity(instance_id="0" * 32, sprite_id=config.sprite_id))
    core.close()


@pytest.fixture(params=["grpcio-testing", "a real server"])
def ask(request: pytest.FixtureRequest, service: SpriteAgentService, stub: Stub, agent: Agent) -> Ask:
    """Each of the two ways to the unary handlers of the same repo."""
    return ask_servicer(service) if request.param == "grpcio-testing" else ask_server(stub, agent.metadata)


async def stream(stub: Stub, agent: Agent, **members: Any) -> tuple[list[pb.StreamEventsResponse], Answer]:
    """Everything a stream brings until it ends, and how it ends."""
    call = stub.StreamEvents(
        pb.StreamEventsRequest(**{"loop_id": LOOP, **members}), metadata=agent.metadata, timeout=DEADLINE
    )
    responses: list[pb.StreamEventsResponse] = []
    try:
        async for response in call:
            responses.append(response)  # noqa: PERF401  # what came before an error counts
    except grpc.aio.AioRpcError as error:
        return responses, Answer(None, error.code(), error.details() or "", dict(error.trailing_metadata() or ()))
    return responses, Answer(None, await call.code(), await call.details(), dict(await call.trailing_metadata()))


# Answers.


async def test_get_info_says_who_answers(ask: Ask, config: ServeConfig, repo: LoopFiles) -> None:
    (repo.runtime / "loops" / "another").mkdir()

    info = (await ask("GetInfo", pb.GetInfoRequest())).response

    assert (info.agent_version, info.api_revision, list(info.features)) == (__version__, 1, [])
    assert (info.repo_path, list(info.loops), info.sprite_id) == (str(config.repo), ["another", LOOP], "sprite-1")
    assert re.fullmatch(r"[0-9a-f]{32}", info.instance_id)
    assert MOMENT.fullmatch(info.server_time)


async def test_get_info_states_the_limits(ask: Ask) -> None:
    limits = (await ask("GetInfo", pb.GetInfoRequest())).response.limits

    assert (limits.max_request_bytes, limits.max_record_bytes) == (64 * 1024, 1024 * 1024)
    assert (limits.max_batch_events, limits.max_note_characters) == (400, 2000)
    assert limits.max_control_deadline.ToSeconds() == 120
    assert limits.max_stream_age.ToSeconds() == 3600
    assert limits.idempotency_retention.ToSeconds() == RETENTION_SECONDS == 7 * 24 * 3600
    assert (limits.max_streams_per_caller, limits.max_control_rate) == (64, 50)


async def test_a_restarted_agent_has_another_instance_id_and_without_a_sprite_id_says_none(config: ServeConfig) -> None:
    config = type(config)(**{name: getattr(config, name) for name in config.__slots__} | {"sprite_id": None})
    found = []
    for _ in range(2):
        async with running(config) as address, grpc.aio.insecure_channel(address) as channel:
            asked = ask_server(
                service_pb2_grpc.SpriteAgentServiceStub(channel), (("authorization", f"Bearer {config.token}"),)
            )
            found.append((await asked("GetInfo", pb.GetInfoRequest())).response)

    assert found[0].instance_id != found[1].instance_id
    assert not found[0].HasField("sprite_id")


async def test_a_snapshot_is_that_of_the_core(ask: Ask, service: SpriteAgentService, repo: LoopFiles) -> None:
    repo.append(line(event(n=9007199254740993)))
    repo.ask_approval()

    response = (
        await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP, trace_id="trace-7", run_id="run-9"))
    ).response

    envelope = mirror.snapshot_from_message(response.snapshot)
    validate("loop_run_snapshot", envelope)
    core = service._repo.read_loop(LOOP, trace_id="trace-7", run_id="run-9")  # noqa: SLF001  # the core itself
    assert {**envelope, "emittedAt": None} == {**core.snapshot, "emittedAt": None}
    assert response.resume_token == core.resume_token
    assert (envelope["traceId"], envelope["run"]["runId"]) == ("trace-7", "run-9")


async def test_a_snapshot_without_trace_and_run_id_has_null_and_the_run_at_hand(ask: Ask, repo: LoopFiles) -> None:
    repo.append(line(event()))

    envelope = mirror.snapshot_from_message(
        (await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP))).response.snapshot
    )

    assert (envelope["traceId"], envelope["run"]["runId"]) == (None, "run-1")


async def test_a_control_answers_with_its_result_and_the_key_finds_it_again(ask: Ask, repo: LoopFiles) -> None:
    repo.ask_approval()

    first = (await ask.control(note="looks right")).response.result
    again = (await ask.control(note="looks right")).response.result
    found = (await ask("GetControl", pb.GetControlRequest(loop_id=LOOP, idempotency_key="key-1"))).response.result

    result = control_mirror.result_from_message(first)
    validate("control_result", result)
    assert (result["status"], result["executed"], result["replayed"]) == ("executed_unconfirmed", True, False)
    assert (
        control_mirror.result_from_message(again)
        == control_mirror.result_from_message(found)
        == {**result, "replayed": True}
    )
    assert len(executions(repo)) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        pytest.param("GetInfo", pb.GetInfoRequest(), id="info"),
        pytest.param("GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP, trace_id="trace-7"), id="snapshot"),
        pytest.param("GetSnapshot", pb.GetSnapshotRequest(loop_id="../x"), id="snapshot of a path"),
        pytest.param("GetSnapshot", pb.GetSnapshotRequest(loop_id="other", trace_id="t"), id="snapshot of no loop"),
        pytest.param("ExecuteControl", control_message("cancel", traceId="trace-7"), id="control not needed"),
        pytest.param("ExecuteControl", control_message("approve"), id="control that does not fit"),
        pytest.param("ExecuteControl", control_message("approve", loopId="other"), id="control of no loop"),
        pytest.param("ExecuteControl", pb.ExecuteControlRequest(), id="empty control"),
        pytest.param("GetControl", pb.GetControlRequest(loop_id=LOOP, idempotency_key="other"), id="unused key"),
    ],
)
async def test_grpcio_testing_and_a_real_server_are_answered_alike(
    service: SpriteAgentService, stub: Stub, agent: Agent, method: str, message: Message
) -> None:
    one = await ask_servicer(service)(method, message)
    two = await ask_server(stub, agent.metadata)(method, message)

    assert (one.code, one.message) == (two.code, two.message)
    assert one.trailers.keys() - {"grpc.metadata_added_by_runtime"} == two.trailers.keys()
    assert one.trailers.get("grpc-status-details-bin") == two.trailers.get("grpc-status-details-bin")
    if one.code is grpc.StatusCode.OK:
        assert one.response.DESCRIPTOR == two.response.DESCRIPTOR


# Trailers.


def expect_trailers(answer: Answer, *, executed: str, trace_id: str | None, failed: bool) -> None:
    assert answer.trailers["x-ops-executed"] == executed
    assert MOMENT.fullmatch(str(answer.trailers["x-ops-server-time"]))
    assert answer.trailers.get("x-ops-trace-id") == trace_id
    assert ("x-ops-error-id" in answer.trailers) is failed


async def test_an_answer_has_the_trailers(ask: Ask, repo: LoopFiles) -> None:
    repo.ask_approval()

    expect_trailers(await ask("GetInfo", pb.GetInfoRequest()), executed="false", trace_id=None, failed=False)
    expect_trailers(
        await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP, trace_id="trace-7")),
        executed="false",
        trace_id="trace-7",
        failed=False,
    )
    expect_trailers(await ask.control(traceId="trace-8"), executed="true", trace_id="trace-8", failed=False)
    expect_trailers(
        await ask("GetControl", pb.GetControlRequest(loop_id=LOOP, idempotency_key="key-1")),
        executed="false",
        trace_id=None,
        failed=False,
    )


async def test_only_the_attempt_that_ran_the_intent_says_so(ask: Ask, repo: LoopFiles) -> None:
    repo.ask_approval()

    ran, replay = await ask.control(), await ask.control()
    not_needed = await ask.control("cancel", idempotencyKey="key-2")

    assert [answer.trailers["x-ops-executed"] for answer in (ran, replay, not_needed)] == ["true", "false", "false"]


async def test_a_refusal_has_the_trailers_and_the_log_has_its_error_id(ask: Ask) -> None:
    with structlog.testing.capture_logs() as log:
        answer = await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id="other", trace_id="trace-7"))

    assert answer.code is grpc.StatusCode.NOT_FOUND
    expect_trailers(answer, executed="false", trace_id="trace-7", failed=True)
    assert [entry["error_id"] for entry in calls(log)] == [answer.trailers["x-ops-error-id"]]


async def test_a_stream_has_the_trailers_however_it_ends(stub: Stub, agent: Agent, repo: LoopFiles) -> None:
    _, ended = await stream(stub, agent, trace_id="trace-7")
    repo.append(b"not json\n")
    _, failed = await stream(stub, agent, trace_id="trace-8")

    expect_trailers(ended, executed="false", trace_id="trace-7", failed=False)
    expect_trailers(failed, executed="false", trace_id="trace-8", failed=True)


@pytest.mark.parametrize(
    "trace_id", ["\u00e9t\u00e9", "two\nlines", "x" * 20_000], ids=["not ASCII", "two lines", "long"]
)
async def test_a_trace_id_that_is_no_trailer_does_not_spoil_the_answer(ask: Ask, trace_id: str) -> None:
    answer = await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP, trace_id=trace_id))

    assert (answer.code, answer.message) == (grpc.StatusCode.OK, "")
    assert mirror.snapshot_from_message(answer.response.snapshot)["traceId"] == trace_id


@pytest.mark.usefixtures("steady")
async def test_a_full_batch_of_events_with_the_longest_trace_id_fits_a_message(
    stub: Stub, agent: Agent, repo: LoopFiles
) -> None:
    repo.append(b"".join(line(event(message="x" * 200)) for _ in range(MAX_BATCH_EVENTS)))

    batches, ended = await stream(stub, agent, trace_id="t" * MAX_TRACE_BYTES)

    assert ended.code == grpc.StatusCode.OK
    assert len(batches[0].events) == MAX_BATCH_EVENTS


async def test_a_call_leaves_one_log_line_without_its_payload(ask: Ask, repo: LoopFiles) -> None:
    repo.ask_approval()
    with structlog.testing.capture_logs() as log:
        await ask.control(note="not for the log", traceId="trace-7")

    assert len(calls(log)) == 1
    assert {"event": "call", "method": "ExecuteControl", "code": "OK", "trace_id": "trace-7"}.items() <= calls(log)[
        0
    ].items()
    assert "not for the log" not in str(log)


# Refusals.


async def test_a_refusal_names_its_reason_and_values(ask: Ask) -> None:
    answer = await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id="other"))

    info = answer.detail(error_details_pb2.ErrorInfo())
    assert (answer.code, info.reason, info.domain) == (grpc.StatusCode.NOT_FOUND, "LOOP_NOT_FOUND", "sprite-agent")
    assert dict(info.metadata) == {"loopId": "other"}
    assert answer.message.startswith("required artifact root missing: /")


async def test_a_refused_field_is_named(ask: Ask) -> None:
    answer = await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id="../x"))

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "LOOP_ID_INVALID")
    assert answer.fields == {"loop_id"}


async def test_every_refused_field_of_a_control_is_named(ask: Ask, repo: LoopFiles) -> None:
    message = control_message()
    message.requested_by = "two\nlines"
    message.note = "x" * 2001
    message.expected_approval_digest = "XYZ"
    message.confirmation.timeout_seconds = 121

    answer = await ask("ExecuteControl", message)

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ACTOR_INVALID")
    assert answer.fields == {"requested_by", "note", "expected_approval_digest", "confirmation.timeout_seconds"}
    assert executions(repo) == []


@pytest.mark.parametrize("seconds", [-1.0, 120.5, float("nan"), float("inf")])
async def test_a_confirmation_time_that_is_none_is_refused(ask: Ask, repo: LoopFiles, seconds: float) -> None:
    repo.ask_approval()
    message = control_message()
    message.confirmation.timeout_seconds = seconds

    answer = await ask("ExecuteControl", message)

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert answer.fields == {"confirmation.timeout_seconds"}
    assert executions(repo) == []


@pytest.mark.parametrize(("field", "value"), [("mode", 0), ("mode", 99), ("required_effect", 99)])
async def test_a_confirmation_that_is_not_understood_is_refused(
    ask: Ask, repo: LoopFiles, field: str, value: int
) -> None:
    repo.ask_approval()
    message = control_message()
    setattr(message.confirmation, field, value)

    answer = await ask("ExecuteControl", message)

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert answer.fields == {f"confirmation.{field}"}
    assert executions(repo) == []


async def test_a_failed_precondition_says_which(ask: Ask, repo: LoopFiles) -> None:
    repo.ask_approval()

    answer = await ask.control(expectedRunId="run-0")

    assert (answer.code, answer.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RUN_MISMATCH")
    violations = answer.detail(error_details_pb2.PreconditionFailure()).violations
    assert [(violation.type, violation.description) for violation in violations] == [("RUN_MISMATCH", answer.message)]
    assert executions(repo) == []


async def test_a_busy_agent_says_when_to_try_again(ask: Ask, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sprite_agent.control.engine.LANE_WAIT", 0.1)
    repo.ask_approval()
    turn(repo, sleep_before=1)
    first = asyncio.ensure_future(ask.control())
    await asyncio.to_thread(until, lambda: executions(repo), "the first control runs")

    answer = await ask.control(idempotencyKey="key-2")

    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "CONTROL_BUSY")
    assert answer.detail(error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() == 1000
    assert (await first).response.result.executed


@pytest.mark.parametrize("text", ["x", "\u00e9", "\U0001f642"])
async def test_an_error_arrives_whole_however_much_text_it_has(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    long = text * 5000
    error = LoopNotFound(
        long, details={f"name{n}": long for n in range(20)}, violations=[(f"field{n}", long) for n in range(20)]
    )
    monkeypatch.setattr(Repo, "loops", raising(error))

    for _ in range(OFTEN):
        answer = await ask("GetInfo", pb.GetInfoRequest())

        assert answer.code is grpc.StatusCode.NOT_FOUND
        assert answer.reason == "LOOP_NOT_FOUND"


@pytest.mark.parametrize("text", ["x", "\U0001f642"])
async def test_a_loop_id_as_long_as_a_request_is_refused_as_any_other(ask: Ask, text: str) -> None:
    for _ in range(OFTEN):
        answer = await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id=text * 10_000))

        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
        assert answer.reason == "LOOP_ID_INVALID"


async def test_a_request_over_the_limit_is_refused(stub: Stub, agent: Agent) -> None:
    answer = await ask_server(stub, agent.metadata)(
        "GetSnapshot", pb.GetSnapshotRequest(loop_id="x" * (MAX_REQUEST_BYTES + 1))
    )

    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_of_a_request_that_is_no_message_a_peer_learns_nothing_of_the_code(agent: Agent) -> None:
    async with grpc.aio.insecure_channel(agent.address) as channel:
        get_info: Any = channel.unary_unary(f"/{SERVICE.full_name}/GetInfo")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get_info(b"\xff no message", metadata=agent.metadata, timeout=DEADLINE)

    assert "class" not in str(caught.value.details())


# What a control needs.


@pytest.mark.parametrize("seconds", [None, 125, 3600])
async def test_a_control_without_a_deadline_or_with_a_longer_one_is_refused(
    ask: Ask, repo: LoopFiles, seconds: float | None
) -> None:
    repo.ask_approval()

    answer = await ask.control(seconds=seconds)

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DEADLINE_INVALID")
    assert executions(repo) == []


async def test_a_control_with_the_longest_deadline_is_run(ask: Ask) -> None:
    for number in range(OFTEN):
        answer = await ask.control("cancel", seconds=120, idempotencyKey=f"key-{number}")

        assert (answer.code, answer.message) == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize("part", ["", "confirmation", "provenance"])
async def test_a_control_with_a_field_unknown_here_is_refused(ask: Ask, repo: LoopFiles, part: str) -> None:
    repo.ask_approval()
    message = control_message(provenance={"managerId": "m", "host": "h", "attempt": 1})
    (getattr(message, part) if part else message).MergeFromString(b"\xb8\x3e\x01")  # field 999 is 1

    answer = await ask("ExecuteControl", message)

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_FIELDS")
    assert answer.fields == {part}
    assert executions(repo) == []


@pytest.mark.parametrize("intent", [0, 4, 99])
async def test_an_intent_that_is_unset_or_unknown_is_refused(ask: Ask, repo: LoopFiles, intent: int) -> None:
    message = control_message()
    message.intent = intent  # type: ignore[assignment]  # the wire can carry any number

    answer = await ask("ExecuteControl", message)

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INTENT_UNSUPPORTED")
    assert executions(repo) == []


async def test_an_empty_control_is_refused(ask: Ask) -> None:
    answer = await ask("ExecuteControl", pb.ExecuteControlRequest())

    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "IDEMPOTENCY_KEY_MISSING")


async def test_a_caller_that_hangs_up_does_not_cut_the_command_short(
    start_agent: Callable[..., AgentProgram], agent: Agent, repo: LoopFiles, tmp_path: Path
) -> None:
    program = start_agent("--listen", f"unix:{tmp_path}/program.sock")
    repo.ask_approval()
    turn(repo, sleep_before=0.5)
    async with grpc.aio.insecure_channel(program.address()) as channel:
        stub: Stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
        call = stub.ExecuteControl(control_message(confirmation=SKIPS), metadata=agent.metadata, timeout=DEADLINE)
        await asyncio.to_thread(until, lambda: executions(repo), "the command runs")

        call.cancel()
        answer = await ask_server(stub, agent.metadata).control()

    assert (answer.code, answer.message) == (grpc.StatusCode.OK, "")
    assert (answer.response.result.executed, answer.response.result.replayed) == (True, True)
    assert len(executions(repo)) == 1


async def test_an_agent_outlives_a_caller_that_hangs_up(
    stub: Stub, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def waiting(*_: object, **__: object) -> None:
        begun.set()
        go_on.wait(DEADLINE)
        raise LoopNotFound("enough")

    monkeypatch.setattr(Repo, "read_loop", waiting)
    with structlog.testing.capture_logs() as log:
        call = stub.GetSnapshot(pb.GetSnapshotRequest(loop_id=LOOP), metadata=agent.metadata, timeout=DEADLINE)
        assert await asyncio.to_thread(begun.wait, DEADLINE)
        call.cancel()
        go_on.set()
        await asyncio.to_thread(until, lambda: log, "the handler has ended")

        answer = await ask_server(stub, agent.metadata)("GetInfo", pb.GetInfoRequest())

    assert answer.code is grpc.StatusCode.OK


async def test_controls_that_wait_leave_room_for_reads(
    stub: Stub, agent: Agent, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Semaphore(0)
    go_on = threading.Event()

    def waiting(*_: object, **__: object) -> None:
        begun.release()
        go_on.wait(DEADLINE)
        raise LoopNotFound("enough")

    monkeypatch.setattr("sprite_agent.control.engine.ControlEngine._lead", waiting)
    ask = ask_server(stub, agent.metadata)
    controls = [asyncio.ensure_future(ask.control(idempotencyKey=f"key-{number}")) for number in range(MAX_CONTROLS)]
    for _ in controls:
        assert await asyncio.to_thread(begun.acquire, timeout=DEADLINE)

    one_more = await ask.control(idempotencyKey="one-more")
    read = await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP))
    go_on.set()

    assert (one_more.reason, read.code) == ("CONTROL_BUSY", grpc.StatusCode.OK)
    assert {answer.reason for answer in await asyncio.gather(*controls)} == {"LOOP_NOT_FOUND"}


# Bugs.


def raising(error: Exception) -> Callable[..., Any]:
    def method(*_: object, **__: object) -> Any:
        raise error

    return method


@pytest.mark.parametrize(
    ("broken", "method", "message"),
    [
        ("loops", "GetInfo", pb.GetInfoRequest()),
        ("read_loop", "GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP)),
        ("execute", "ExecuteControl", control_message()),
        ("get_control", "GetControl", pb.GetControlRequest(loop_id=LOOP, idempotency_key="key-1")),
    ],
)
async def test_of_a_bug_a_peer_learns_an_id_that_finds_its_text_in_the_log(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, broken: str, method: str, message: Message
) -> None:
    monkeypatch.setattr(Repo, broken, raising(BUG))
    with structlog.testing.capture_logs() as log:
        answer = await ask(method, message)

    expect_bug(answer, log)


async def test_a_peer_that_waits_for_the_connection_does_not_wait_until_a_large_log_was_read(
    stub: Stub, agent: Agent, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.append(numbered(1000, width=100))
    is_connected, advance = threading.Event(), LogIndex.advance

    def waiting(index: LogIndex, *args: Any, **options: Any) -> bool:
        assert is_connected.wait(DEADLINE)
        return advance(index, *args, **options)

    monkeypatch.setattr(LogIndex, "advance", waiting)
    call = stub.StreamEvents(pb.StreamEventsRequest(loop_id=LOOP), metadata=agent.metadata, timeout=DEADLINE)

    await call.wait_for_connection()
    is_connected.set()

    assert sum([len(response.events) async for response in call]) == 1000


async def test_of_a_bug_in_a_stream_a_peer_learns_an_id_that_finds_its_text_in_the_log(
    stub: Stub, agent: Agent, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.append(line(event()))
    whole = Repo.stream_events

    async def breaking(core: Repo, query: Any, **options: Any) -> Any:
        async for batch in whole(core, query, **options):
            yield batch
        raise BUG

    monkeypatch.setattr(Repo, "stream_events", breaking)
    with structlog.testing.capture_logs() as log:
        responses, answer = await stream(stub, agent)

    assert [len(response.events) for response in responses] == [1]
    expect_bug(answer, log)


def calls(log: Any) -> list[dict[str, Any]]:
    """The lines of calls; the agent has others."""
    return [entry for entry in log if entry["event"] == "call"]


def expect_bug(answer: Answer, log: Any) -> None:
    log = calls(log)
    assert (answer.code, answer.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")
    expect_trailers(answer, executed="unknown", trace_id=None, failed=True)
    assert "secret" not in repr(answer)
    assert "path" not in repr(answer)
    assert len(log) == 1
    assert (log[0]["log_level"], log[0]["exc_info"]) == ("error", BUG)
    assert log[0]["error_id"] == answer.trailers["x-ops-error-id"]
    assert str(log[0]["error_id"]) in answer.message


def test_the_text_of_a_bug_is_in_the_log_and_the_values_around_it_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    payload = "what the operator " + "wrote"
    logs.configure("info")
    try:
        structlog.get_logger("bug").error("call", exc_info=raised_beside(payload))
    finally:
        structlog.reset_defaults()

    entry = json.loads(capsys.readouterr().err)
    assert SECRET in str(entry["exception"])
    assert payload not in str(entry)


def raised_beside(request: str) -> Exception:
    try:
        if request:
            raise BUG
    except RuntimeError as error:
        return error
    return BUG


# Streams.


async def test_a_stream_starts_where_it_is_asked_to(stub: Stub, agent: Agent, repo: LoopFiles) -> None:
    repo.append(*[line(event(n=number)) for number in range(1, 4)])
    token = (await stream(stub, agent, max_events=2))[0][-1].resume_token

    def lines(responses: list[pb.StreamEventsResponse]) -> list[int]:
        return [found.cursor.event_line_offset for response in responses for found in response.events]

    assert lines((await stream(stub, agent))[0]) == [1, 2, 3]
    assert lines((await stream(stub, agent, event_line_offset=1))[0]) == [2, 3]
    assert lines((await stream(stub, agent, resume_token=token))[0]) == [3]
    assert lines((await stream(stub, agent, max_events=2))[0]) == [1, 2]


@pytest.mark.usefixtures("steady")
async def test_a_stream_says_where_it_stands(stub: Stub, agent: Agent, repo: LoopFiles) -> None:
    repo.append(line(event()), b"not json\n", b"\n")

    responses, answer = await stream(stub, agent, skip_malformed=True, trace_id="trace-7")

    assert answer.code is grpc.StatusCode.OK
    (response,) = responses
    assert (response.cursor.event_line_offset, response.cursor.event_line_count, response.caught_up) == (1, 3, True)
    assert [(record.first_line, record.last_line, record.size_bytes) for record in response.skipped] == [(2, 2, 9)]
    assert MOMENT.fullmatch(response.emitted_at)
    assert [mirror.event_from_message(found)["traceId"] for found in response.events] == ["trace-7"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"resume_token": ""}, "RESUME_TOKEN_INVALID"),
        ({"event_line_offset": -1}, "CURSOR_INVALID"),
        ({"event_line_offset": 1}, "CURSOR_BEYOND_END"),
        ({"max_events": -1}, "REQUEST_INVALID"),
        ({"heartbeat_interval": {"nanos": 1}}, "REQUEST_INVALID"),
        ({"heartbeat_interval": {"seconds": 61}}, "REQUEST_INVALID"),
        ({"loop_id": "other"}, "LOOP_NOT_FOUND"),
    ],
)
async def test_a_stream_that_cannot_be_is_refused_without_a_response(
    stub: Stub, agent: Agent, members: dict[str, Any], reason: str
) -> None:
    responses, answer = await stream(stub, agent, **members)

    assert (responses, answer.reason) == ([], reason)


# Draining.


@contextlib.asynccontextmanager
async def serving(service: SpriteAgentService, folder: Path) -> AsyncIterator[Stub]:
    """A server around a servicer that the test can drain while it is asked."""
    with ThreadPoolExecutor(4) as pool:
        server = grpc.aio.server(migration_thread_pool=pool)
        service_pb2_grpc.add_SpriteAgentServiceServicer_to_server(service, server)
        address = f"unix:{folder}/service.sock"
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            yield service_pb2_grpc.SpriteAgentServiceStub(channel)
        await server.stop(0)


async def test_draining_ends_a_stream_with_ok_and_says_where_to_resume(
    service: SpriteAgentService, agent: Agent, repo: LoopFiles, tmp_path: Path
) -> None:
    repo.append(line(event(n=1)))
    async with serving(service, tmp_path) as stub:
        call = stub.StreamEvents(pb.StreamEventsRequest(loop_id=LOOP, follow=True), timeout=DEADLINE)
        arriving = aiter(call)
        responses = [await anext(arriving)]
        service.drain()
        responses += [response async for response in arriving]

        assert await call.code() is grpc.StatusCode.OK
    assert [len(response.events) for response in responses] == [1, 0]
    repo.append(line(event(n=2)))
    async with grpc.aio.insecure_channel(agent.address) as channel:
        rest, _ = await stream(
            service_pb2_grpc.SpriteAgentServiceStub(channel), agent, resume_token=responses[-1].resume_token
        )
    assert [found.cursor.event_line_offset for response in rest for found in response.events] == [2]


async def test_draining_refuses_control_and_streams_but_not_reads(
    service: SpriteAgentService, agent: Agent, repo: LoopFiles, tmp_path: Path
) -> None:
    repo.ask_approval()
    async with serving(service, tmp_path) as stub:
        ask = ask_server(stub, ())
        service.drain()

        control = await ask.control()
        responses, refused = await stream(stub, agent)
        snapshot = await ask("GetSnapshot", pb.GetSnapshotRequest(loop_id=LOOP))
        info = await ask("GetInfo", pb.GetInfoRequest())

    assert (control.code, control.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert control.detail(error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() == 2000
    assert (responses, refused.reason) == ([], "DRAINING")
    assert (snapshot.code, info.code) == (grpc.StatusCode.OK, grpc.StatusCode.OK)
    assert executions(repo) == []
