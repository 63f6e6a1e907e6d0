"""One suite over both transports: the same answers, valid by their schemas, and the same error for the same failure."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from opsmgr.transport.local import LocalTransport
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent import __version__, artifacts
from sprite_agent.artifacts import MAX_DOCUMENT_BYTES, MAX_LOOPS
from sprite_agent.contract import json_text
from sprite_agent.contract.envelopes import GATES
from sprite_agent.contract.json_text import OpenObject
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.contract.validation import validate
from sprite_agent.errors import (
    ArtifactMalformed,
    ControlBusy,
    ControlNotFound,
    CursorBeyondEnd,
    EventMalformed,
    IdempotencyKeyReused,
    LogReplaced,
    LogTruncated,
    LoopIdInvalid,
    OpsError,
    RequestInvalid,
    RequestRefused,
    RuntimeMissing,
)
from sprite_agent.face.server import running
from sprite_agent.snapshot import MAX_SNAPSHOT_BYTES
from support.following import Follower
from support.repos import LOOP, MOMENT, STANDIN, event, line, lines, put
from support.runtime import LOOKS_ONCE, SKIPS, WAITS, executions, request, run, turn
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from opsmgr.transport.base import Snapshot, Transport
    from sprite_agent.contract.envelopes import ControlRequest
    from sprite_agent.contract.streaming import EventBatch
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

    Both = tuple[Transport, Transport]
    Arrange = Callable[[LoopFiles], object]

CASES = sorted(case.parent for case in (Path(__file__).parents[1] / "data" / "golden").glob("*/case.json"))
ODD = b"""{ "active" : false,\r
  "big":9007199254740993, "bigger" : 1180591620717411303424, "int": 3, "float": 3.0, "exp":1E2, "small":1.50e-7,
  "zero":-0, "text":"\\u00e9\xc3\xa9\\/", "twice":1, "twice":2,  "deep":[[ ],{ } ] }
"""
"""A document in which every number and every blank is spelled as few writers would."""


@pytest.fixture
def both(local: LocalTransport, remote: SpriteServiceTransport) -> Both:
    """The two transports to the same repo."""
    return local, remote


def asked(intent: str = "approve", **members: Any) -> ControlRequest:
    """A control request, which may be one that can't be."""
    return cast("ControlRequest", request(intent, **members))


def query(**members: Any) -> EventQuery:
    """A query for the loop; one that follows beats every minute unless told otherwise."""
    return EventQuery(**{"loop_id": LOOP, "heartbeat_interval": 60.0, **members})


async def events(transport: Transport, **members: Any) -> list[EventBatch]:
    """Every batch of a subscription that ends by itself."""
    async with Follower(transport.events(query(**members))) as follower:
        return await follower.to_end()


async def delivered(transport: Transport, **members: Any) -> tuple[list[int], OpsError | None]:
    """The lines of the events that a subscription brings until it ends, and the error it ends with."""
    follower = Follower(transport.events(query(**members)))
    async with follower:
        try:
            await follower.to_end()
        except OpsError as error:
            return follower.lines, error
    return follower.lines, None


def lines_of(batches: list[EventBatch]) -> list[int]:
    """The line numbers of the events in batches."""
    return [found["cursor"]["eventLineOffset"] for batch in batches for found in batch.events]


def texts(envelopes: list[Any]) -> list[bytes]:
    """Envelopes as they are printed, all emitted at one moment."""
    return [json_text.encode({**envelope, "emittedAt": MOMENT}) for envelope in envelopes]


def comparable(batches: list[EventBatch]) -> list[EventBatch]:
    """Batches, all emitted at one moment."""
    return [
        replace(
            batch,
            emitted_at=MOMENT,
            events=[{**found, "emittedAt": MOMENT} for found in batch.events],
        )
        for batch in batches
    ]


async def facts(failing: Awaitable[object]) -> dict[str, Any]:
    """Everything a failure says, apart from where its log line is."""
    with pytest.raises(OpsError) as caught:
        await failing
    error = caught.value
    return {
        "class": type(error),
        "message": error.message,
        "details": error.details,
        "fields": [field for field, _ in error.violations],
        "retry_after": error.retry_after,
        "retryable": error.retryable,
        "executed": error.executed,
    }


# Info.


async def test_info_says_who_answers(transport: Transport, repo: LoopFiles) -> None:
    (repo.runtime / "loops" / "another").mkdir()

    info = await transport.info()

    assert (info.agent_version, info.repo_path, info.loops) == (__version__, str(repo.repo), ["another", LOOP])
    assert (info.instance_id is None) is (transport.name == "local")


# Snapshots.


async def snapshots(both: Both, **members: Any) -> tuple[Snapshot, Snapshot]:
    return await both[0].snapshot(LOOP, **members), await both[1].snapshot(LOOP, **members)


def arrange_empty(_: LoopFiles) -> None:
    """A loop that has a log and nothing else."""


def arrange_played(repo: LoopFiles) -> None:
    """What a whole run of the stand-in leaves."""
    run(repo, "--iterations", "2")


def arrange_odd(repo: LoopFiles) -> None:
    """Documents and events with odd spellings, over several lines."""
    repo.append(b" \n", lines(event("usage_check", n=1)), line(event(n=2)))
    for path in (repo.state, repo.approval, repo.heartbeat):
        put(path, ODD)
    put(repo.run_summary, b'{"entries":[{"run_id":"r", "iteration":"7", \n"data":' + ODD + b"}]}")


def arrange_gates(repo: LoopFiles) -> None:
    """A summary entry with further gates among the known ones, as real runs have."""
    order = ("tests", "validation", "prerequisites", "checklist", "evidence", "zeal", "lifecycle", "approval")
    repo.summarize({"run_id": "r", "iteration": 1, "gates": dict.fromkeys(order, "ok")})


def arrange_stuck(repo: LoopFiles) -> None:
    """A summary entry whose stuck has its members the other way round."""
    repo.summarize({"run_id": "r", "iteration": 1, "stuck": {"threshold": 3, "streak": 0}})


def arrange_floats(repo: LoopFiles) -> None:
    """Whole numbers written as floats where the contract has integers."""
    put(repo.run_summary, b'{"entries":[{"iteration":3.0,"stuck":{"streak":1.0,"threshold":3e0}}]}')


def arrange_large(repo: LoopFiles) -> None:
    """Documents as large as they may be."""
    text = "x" * (MAX_DOCUMENT_BYTES - 200)
    for path in (repo.state, repo.active_run, repo.approval, repo.heartbeat):
        put(path, {"text": text})
    gates = dict.fromkeys(("tests", "validation", "prerequisites", "checklist", "evidence"), "ok")
    put(repo.run_summary, {"entries": [{"gates": {**gates, "approval": text}}]})


@pytest.mark.parametrize(
    "arrange",
    [arrange_empty, arrange_played, arrange_odd, arrange_gates, arrange_stuck, arrange_floats, arrange_large],
)
async def test_a_snapshot_is_the_same_text_on_both(both: Both, repo: LoopFiles, arrange: Arrange) -> None:
    arrange(repo)

    one, two = await snapshots(both, trace_id="trace-7")

    validate("loop_run_snapshot", one.envelope)
    validate("loop_run_snapshot", two.envelope)
    assert {**one.envelope, "emittedAt": MOMENT} == {**two.envelope, "emittedAt": MOMENT}
    assert one.resume_token == two.resume_token
    assert texts([one.envelope]) == texts([two.envelope])


async def test_open_objects_keep_their_text(transport: Transport, repo: LoopFiles) -> None:
    arrange_odd(repo)

    envelope = (await transport.snapshot(LOOP)).envelope

    state = envelope["runtime"]["superloopState"]
    assert isinstance(state, OpenObject)
    assert state.text == ODD.decode().strip()
    assert (state["big"], state["bigger"], state["twice"]) == (9007199254740993, 2**70, 2)
    assert (envelope["run"]["iteration"], envelope["cursor"]["eventLineCount"]) == (7, 10)


async def test_trace_and_run_id_are_passed_on(transport: Transport, repo: LoopFiles) -> None:
    repo.append(line(event()))

    given = (await transport.snapshot(LOOP, trace_id="trace-\u00e9", run_id="run-9")).envelope
    plain = (await transport.snapshot(LOOP)).envelope

    assert (given["traceId"], given["run"]["runId"]) == ("trace-\u00e9", "run-9")
    assert (plain["traceId"], plain["run"]["runId"]) == (None, "run-1")


async def test_the_events_after_a_snapshots_token_are_those_it_has_not_counted(
    transport: Transport, repo: LoopFiles
) -> None:
    repo.append(line(event(n=1)), line(event(n=2)))
    snapshot = await transport.snapshot(LOOP)
    repo.append(line(event(n=3)))

    batches = await events(transport, resume_token=snapshot.resume_token)

    assert (snapshot.envelope["cursor"]["eventLineCount"], lines_of(batches)) == (2, [3])


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_recorded_case_is_the_same_on_both(both: Both, repo: LoopFiles, case: Path) -> None:
    loop_id = json.loads((case / "case.json").read_bytes())["loop"]
    shutil.copytree(case / "repo", repo.repo, dirs_exist_ok=True)
    (repo.runtime / "loops" / loop_id).mkdir(exist_ok=True)

    async def outcome(transport: Transport) -> list[Any]:
        found: list[Any] = []
        try:
            snapshot = await transport.snapshot(loop_id)
            found += [*texts([snapshot.envelope]), snapshot.resume_token]
        except OpsError as error:
            found += [type(error), error.message, error.details]
        follower = Follower(transport.events(query(loop_id=loop_id)))
        async with follower:
            try:
                await follower.to_end()
            except OpsError as error:
                found += [type(error), error.message, error.details]
        return [*found, *comparable(follower.seen)]

    assert await outcome(both[0]) == await outcome(both[1])


# Events.


def five(repo: LoopFiles) -> None:
    """Five events between blank lines, one of them over several lines."""
    repo.append(
        line(event(n=1)),
        b"\n",
        line(event(n=2)),
        lines(event("usage_check", n=3)),
        line(event(n=4)),
        b" \t\n",
        line(event(n=5)),
        b"\n",
    )


FIVE = [1, 3, 11, 12, 14]


async def test_all_events_come_in_order(transport: Transport, repo: LoopFiles) -> None:
    five(repo)

    batches = await events(transport, trace_id="trace-7")

    assert lines_of(batches) == FIVE
    assert batches[-1].caught_up
    assert batches[-1].cursor == {"eventLineOffset": 14, "eventLineCount": 15}
    for batch in batches:
        for found in batch.events:
            validate("loop_run_event", found)
            assert found["traceId"] == "trace-7"


@pytest.mark.parametrize("after", range(16))
async def test_events_after_a_line(transport: Transport, repo: LoopFiles, after: int) -> None:
    five(repo)

    assert lines_of(await events(transport, after_line=after)) == [number for number in FIVE if number > after]


async def test_events_after_a_token(transport: Transport, repo: LoopFiles) -> None:
    five(repo)
    for count in range(1, 6):
        token = (await events(transport, max_events=count))[-1].resume_token

        assert lines_of(await events(transport, resume_token=token)) == FIVE[count:]


async def test_a_token_of_one_transport_is_one_of_the_other(both: Both, repo: LoopFiles) -> None:
    five(repo)

    for one, other in (both, both[::-1]):
        token = (await events(one, max_events=2))[-1].resume_token
        assert lines_of(await events(other, resume_token=token)) == FIVE[2:]


@pytest.mark.parametrize("most", [0, 1, 3, 5, 6])
async def test_no_more_events_come_than_asked_for(transport: Transport, repo: LoopFiles, most: int) -> None:
    five(repo)

    assert lines_of(await events(transport, max_events=most)) == FIVE[: most or None]


async def test_a_following_subscription_gives_what_is_there_and_what_comes(
    transport: Transport, repo: LoopFiles
) -> None:
    repo.append(line(event(n=1)))
    async with Follower(transport.events(query(follow=True, max_events=3))) as follower:
        assert await follower.until_lines(1) == [1]
        repo.append(line(event(n=2)))
        assert await follower.until_lines(2) == [1, 2]
        repo.append(line(event(n=3)), line(event(n=4)))
        await follower.to_end()

    assert follower.lines == [1, 2, 3]


async def test_batches_are_the_same_on_both(both: Both, repo: LoopFiles) -> None:
    run(repo, "--iterations", "3")
    repo.append(b"not json\n", line(event(data={"n": 2**70})), b"{\n", line(event(data=3)), b'{"torn')

    one, two = [await events(transport, skip_malformed=True, trace_id="trace-7") for transport in both]

    assert comparable(one) == comparable(two)
    assert texts([found for batch in one for found in batch.events]) == texts(
        [found for batch in two for found in batch.events]
    )


async def test_a_malformed_record_ends_a_subscription_after_everything_before_it(
    transport: Transport, repo: LoopFiles
) -> None:
    repo.append(line(event(n=1)), line(event(n=2)), b"not json\n", line(event(n=4)))

    seen, failure = await delivered(transport)

    assert seen == [1, 2]
    assert isinstance(failure, EventMalformed)
    assert failure.message.startswith("line 3 of the event log is malformed: not JSON")
    assert failure.details == {"line": "3", "lastLine": "3"}


async def test_a_subscription_is_not_caught_up_before_a_malformed_record(transport: Transport, repo: LoopFiles) -> None:
    repo.append(line(event(n=1)), b"not json\n")

    async with Follower(transport.events(query())) as follower:
        with pytest.raises(EventMalformed):
            await follower.to_end()

    assert {batch.caught_up for batch in follower.seen} == {False}


async def test_skipped_records_are_reported_and_passed_over(transport: Transport, repo: LoopFiles) -> None:
    repo.append(
        line(event(n=1)), b"not json\n", line(event(n=3)), b"[1,\n", line(event(timestamp="")), line(event(n=6))
    )

    batches = await events(transport, skip_malformed=True)
    skipped = [record for batch in batches for record in batch.skipped]

    assert lines_of(batches) == [1, 3, 6]
    assert [(record.first_line, record.last_line) for record in skipped] == [(2, 2), (4, 4), (5, 5)]
    assert (skipped[0].excerpt, skipped[0].size_bytes) == ("not json", 9)
    assert lines_of(await events(transport, skip_malformed=True, resume_token=batches[-1].resume_token)) == []


@pytest.mark.parametrize("text", [b"\xff" * 300, "\u4e16".encode() * 300, b"x" * 300], ids=["bytes", "wide", "plain"])
async def test_an_excerpt_is_at_most_200_characters_long(transport: Transport, repo: LoopFiles, text: bytes) -> None:
    repo.append(text + b"\n")

    (batch,) = await events(transport, skip_malformed=True)

    assert 0 < len(batch.skipped[0].excerpt) <= 200


# The cases of the issue.


async def test_an_object_over_several_lines_is_one_event_with_its_text(transport: Transport, repo: LoopFiles) -> None:
    text = lines(event("usage_check", data={"provider": "x", "usage": {"percent": 12}}))
    repo.append(line(event(n=1)), text, line(event(n=2)))

    found = [found for batch in await events(transport) for found in batch.events]

    count = text.count(b"\n")
    assert [one["cursor"]["eventLineOffset"] for one in found] == [1, 1 + count, 2 + count]
    raw = found[1]["event"]["raw"]
    assert isinstance(raw, OpenObject)
    assert raw.text == text.decode().rstrip("\n")
    assert found[1]["event"]["payload"] == {"provider": "x", "usage": {"percent": 12}}
    # Printed it is one line.
    assert texts(found)[1].count(b"\n") == 0
    assert (await transport.snapshot(LOOP)).envelope["cursor"]["eventLineCount"] == 2 + count


async def test_a_torn_tail_is_neither_event_nor_error_until_its_newline_comes(
    transport: Transport, repo: LoopFiles
) -> None:
    whole = line(event(n=2))
    repo.append(line(event(n=1)), whole[:20])

    envelope = (await transport.snapshot(LOOP)).envelope
    batches = await events(transport)

    assert (envelope["cursor"]["eventLineCount"], envelope["health"]["lastEventName"]) == (1, "iteration_start")
    assert (lines_of(batches), batches[-1].caught_up) == ([1], True)
    assert batches[-1].cursor == {"eventLineOffset": 1, "eventLineCount": 1}
    repo.append(whole[20:])
    assert lines_of(await events(transport, resume_token=batches[-1].resume_token)) == [2]


BAD_LINES: list[Any] = [
    pytest.param(b"not json\n", id="no json"),
    pytest.param(b'{"timestamp":"t","event":"x"\n', id="cut off"),
    pytest.param(b'{"timestamp":"t","event":"x"}{"timestamp":"t","event":"y"}\n', id="two glued"),
    pytest.param(b'{"timestamp":"t","event":"x","data":{"n":NaN}}\n', id="NaN"),
    pytest.param(b'{"timestamp":"t","event":"x","data":{"n":-Infinity}}\n', id="Infinity"),
    pytest.param(b'{"timestamp":"t","event":"x","data":{"n":1e999}}\n', id="1e999"),
    pytest.param(b'{"timestamp":"t","event":"x","data":{"s":"\\ud800"}}\n', id="lone surrogate"),
    pytest.param(b'{"timestamp":"t","event":"x","message":"\xff\xfe"}\n', id="invalid UTF-8"),
    pytest.param(b"\xff\xfe\n", id="bytes"),
    pytest.param(b'["timestamp","event"]\n', id="array"),
    pytest.param(b"7\n", id="number"),
    pytest.param(line(event(data=[1])), id="payload array"),
    pytest.param(line(event(data="text")), id="payload text"),
    pytest.param(line(event(data=7)), id="payload number"),
    pytest.param(line(event(data=True)), id="payload boolean"),
    pytest.param(line(event(timestamp=None)), id="no timestamp"),
    pytest.param(line(event(event=None)), id="no name"),
    pytest.param(line(event(iteration=1.5)), id="half an iteration"),
    pytest.param(line(event(iteration=2**63)), id="iteration 2**63"),
    pytest.param(line(event(data={"n": "x" * 1_048_576})), id="longer than 1 MiB"),
]


@pytest.mark.parametrize("bad", BAD_LINES)
async def test_a_bad_line_in_the_middle_fails_closed_with_its_line_and_can_be_skipped(
    transport: Transport, repo: LoopFiles, bad: bytes
) -> None:
    repo.append(line(event(n=1)), bad, line(event(n=3)))

    seen, failure = await delivered(transport)
    skipping = await events(transport, skip_malformed=True)

    assert seen == [1]
    assert isinstance(failure, EventMalformed)
    assert failure.message.startswith("line 2 of the event log is malformed: ")
    assert lines_of(skipping) == [1, 3]
    assert [(record.first_line, record.size_bytes) for batch in skipping for record in batch.skipped] == [(2, len(bad))]
    # It is neither the last line nor an event's, so a snapshot is none the worse for it.
    assert (await transport.snapshot(LOOP)).envelope["cursor"]["eventLineCount"] == 3


@pytest.mark.parametrize("number", [9007199254740993, -9007199254740993, 2**63, 2**64, 2**70, -(2**70), 10**1000])
async def test_integers_in_data_are_exact_however_large(transport: Transport, repo: LoopFiles, number: int) -> None:
    repo.append(line(event(data={"n": number, "deep": [{"n": number}]})))

    (batch,) = await events(transport)

    payload, raw = batch.events[0]["event"]["payload"], batch.events[0]["event"]["raw"]
    assert payload == {"n": number, "deep": [{"n": number}]}
    assert raw["data"] == payload
    assert str(number).encode() in texts([batch.events[0]])[0]


async def test_numbers_keep_their_spelling(transport: Transport, repo: LoopFiles) -> None:
    spelled = '{"a": 1.0, "b":1e2,"c" :-0, "d":1.50, "e":12345678901234567890.0}'
    repo.append(f'{{"timestamp":"t","event":"x","data":{spelled}}}\n'.encode())

    (batch,) = await events(transport)

    payload = batch.events[0]["event"]["payload"]
    assert isinstance(payload, OpenObject)
    assert payload.text == spelled


async def test_a_bad_last_line_fails_a_snapshot_closed(both: Both, repo: LoopFiles) -> None:
    repo.append(line(event(n=1)), b'{"timestamp":"t","event":"x","data":{"n":NaN}}\n')

    found = [await facts(transport.snapshot(LOOP)) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"] is EventMalformed
    assert found[0]["message"].startswith("line 2 of the event log is malformed")


# Failures of reading.


def missing_log(repo: LoopFiles) -> None:
    repo.log.unlink()


def linked_log(repo: LoopFiles) -> None:
    repo.log.rename(repo.folder / "elsewhere")
    repo.log.symlink_to("elsewhere")


def linked_loop(repo: LoopFiles) -> None:
    repo.folder.rename(repo.runtime / "elsewhere")
    repo.folder.symlink_to("../elsewhere")


def folder_for_log(repo: LoopFiles) -> None:
    repo.log.unlink()
    repo.log.mkdir()


READ_FAILURES: list[Any] = [
    pytest.param(lambda _: None, "other", "LOOP_NOT_FOUND", id="no such loop"),
    pytest.param(lambda _: None, "", "LOOP_ID_INVALID", id="no loop id"),
    pytest.param(lambda _: None, "../demo", "LOOP_ID_INVALID", id="path as loop id"),
    pytest.param(lambda _: None, "a..b", "LOOP_ID_INVALID", id="dots"),
    pytest.param(lambda _: None, "x" * 65, "LOOP_ID_INVALID", id="long loop id"),
    pytest.param(lambda _: None, "d\u00e9mo", "LOOP_ID_INVALID", id="loop id not ASCII"),
    pytest.param(lambda _: None, "demo\n", "LOOP_ID_INVALID", id="loop id with a line break"),
    pytest.param(lambda _: None, "demo\udcff", "LOOP_ID_INVALID", id="loop id that is no text"),
    pytest.param(missing_log, LOOP, "EVENTS_NOT_FOUND", id="no log"),
    pytest.param(linked_log, LOOP, "ARTIFACT_NOT_REGULAR", id="log is a link"),
    pytest.param(linked_loop, LOOP, "ARTIFACT_NOT_REGULAR", id="loop is a link"),
    pytest.param(folder_for_log, LOOP, "ARTIFACT_NOT_REGULAR", id="log is a folder"),
]
SNAPSHOT_FAILURES: list[Any] = [
    pytest.param(lambda repo: put(repo.state, b"{"), LOOP, "ARTIFACT_MALFORMED", id="half a state"),
    pytest.param(lambda repo: put(repo.approval, b"[]"), LOOP, "ARTIFACT_MALFORMED", id="approval array"),
    pytest.param(lambda repo: put(repo.active_run, b'{"n":NaN}'), LOOP, "ARTIFACT_MALFORMED", id="NaN"),
    pytest.param(lambda repo: put(repo.heartbeat, b"\xff"), LOOP, "ARTIFACT_MALFORMED", id="bytes"),
    pytest.param(lambda repo: repo.summarize({"gates": 3}), LOOP, "ARTIFACT_MALFORMED", id="gates number"),
    pytest.param(lambda repo: repo.summarize({"iteration": -1}), LOOP, "ARTIFACT_MALFORMED", id="iteration -1"),
    pytest.param(lambda repo: repo.summarize({"iteration": "1e999"}), LOOP, "ARTIFACT_MALFORMED", id="iteration 1e999"),
    pytest.param(lambda repo: repo.summarize(3), LOOP, "ARTIFACT_MALFORMED", id="entry number"),
    pytest.param(lambda repo: repo.append(b"[]\n"), LOOP, "EVENT_MALFORMED", id="last line array"),
    pytest.param(lambda repo: repo.append(b"x\n"), LOOP, "EVENT_MALFORMED", id="last line not json"),
    pytest.param(
        lambda repo: put(repo.state, b'{"text":"' + b"x" * 9_000_000 + b'"}'), LOOP, "ARTIFACT_MALFORMED", id="9 MB"
    ),
]


@pytest.mark.parametrize(("arrange", "loop_id", "reason"), [*READ_FAILURES, *SNAPSHOT_FAILURES])
async def test_a_snapshot_that_fails_fails_alike_on_both(
    both: Both, repo: LoopFiles, arrange: Arrange, loop_id: str, reason: str
) -> None:
    arrange(repo)

    found = [await facts(transport.snapshot(loop_id)) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"].reason == reason


STREAM_FAILURES: list[Any] = [
    pytest.param({"after_line": -1}, "CURSOR_INVALID", id="line below 0"),
    pytest.param({"after_line": 3}, "CURSOR_BEYOND_END", id="line beyond the end"),
    pytest.param({"after_line": 2**63}, "CURSOR_INVALID", id="line beyond int64"),
    pytest.param({"resume_token": ""}, "RESUME_TOKEN_INVALID", id="empty token"),
    pytest.param({"resume_token": "r1.x"}, "RESUME_TOKEN_INVALID", id="no token"),
    pytest.param({"resume_token": "\udcff"}, "RESUME_TOKEN_INVALID", id="token that is no text"),
    pytest.param({"resume_token": f"r1.{'0' * 16}.1.5.{'0' * 32}"}, "LOG_REPLACED", id="token of another log"),
    pytest.param({"max_events": -1}, "REQUEST_INVALID", id="less than no events"),
    pytest.param({"trace_id": "x" * 8_193}, "REQUEST_INVALID", id="long trace id"),
    pytest.param({"heartbeat_interval": 0.0}, "REQUEST_INVALID", id="no heartbeat"),
    pytest.param({"heartbeat_interval": 61.0}, "REQUEST_INVALID", id="slow heartbeat"),
    pytest.param({"heartbeat_interval": float("inf")}, "REQUEST_INVALID", id="heartbeat never"),
    pytest.param({"heartbeat_interval": float("nan")}, "REQUEST_INVALID", id="heartbeat NaN"),
    pytest.param({"heartbeat_interval": -5.0}, "REQUEST_INVALID", id="heartbeat below 0"),
]


@pytest.mark.parametrize(("members", "reason"), STREAM_FAILURES)
async def test_a_subscription_that_cannot_be_is_refused_alike_on_both(
    both: Both, repo: LoopFiles, members: dict[str, Any], reason: str
) -> None:
    repo.append(line(event(n=1)), line(event(n=2)))

    found = [await facts(events(transport, **members)) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"].reason == reason


@pytest.mark.parametrize(("arrange", "loop_id", "reason"), READ_FAILURES)
async def test_a_subscription_to_what_is_not_there_is_refused_alike_on_both(
    both: Both, repo: LoopFiles, arrange: Arrange, loop_id: str, reason: str
) -> None:
    arrange(repo)

    found = [await facts(events(transport, loop_id=loop_id)) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"].reason == reason


async def test_more_events_than_a_number_can_say_are_no_limit(transport: Transport, repo: LoopFiles) -> None:
    repo.append(line(event(n=1)))

    assert lines_of(await events(transport, max_events=2**63)) == [1]


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        pytest.param(lambda repo: repo.replace(line(event("other")) * 9), LogReplaced, id="replaced by a longer one"),
        pytest.param(lambda repo: repo.rewrite(line(event("other")) * 2), LogReplaced, id="rewritten"),
        pytest.param(lambda repo: repo.truncate(len(line(event(n=1)))), LogTruncated, id="truncated"),
        pytest.param(lambda repo: repo.truncate(0), LogTruncated, id="emptied"),
    ],
)
async def test_a_log_that_is_no_longer_the_same_is_told_alike_on_both(
    both: Both, repo: LoopFiles, change: Arrange, refused: type[OpsError]
) -> None:
    repo.append(line(event(n=1)), line(event(n=2)), line(event(n=3)))
    followers = [Follower(transport.events(query(follow=True))) for transport in both]
    for follower in followers:
        while not (await follower.next()).caught_up:
            pass
    tokens = [follower.seen[-1].resume_token for follower in followers]
    change(repo)

    following = [await facts(follower.next()) for follower in followers]
    resuming = [
        await facts(events(transport, resume_token=token)) for transport, token in zip(both, tokens, strict=True)
    ]

    assert following[0] == following[1]
    assert resuming[0] == resuming[1]
    assert following[0]["class"] is resuming[0]["class"] is refused


async def test_a_line_beyond_a_shorter_log_is_refused(transport: Transport, repo: LoopFiles) -> None:
    repo.append(line(event(n=1)), line(event(n=2)))
    repo.truncate(len(line(event(n=1))))

    _, failure = await delivered(transport, after_line=2)

    assert isinstance(failure, CursorBeyondEnd)
    assert failure.details == {"requested": "2", "available": "1"}


# Control.


async def test_an_approval_is_run_once_and_confirmed_by_the_recorded_decision(
    transport: Transport, repo: LoopFiles
) -> None:
    run(repo)
    wanted = asked(confirmation={**WAITS, "requiredEffect": "decision_recorded"}, note="looks right")

    result = await transport.execute(wanted)

    validate("control_result", result)
    assert (result["state"], result["status"], result["reason"]) == ("done", "confirmed", "decision_observed")
    assert (result["effect"], result["executed"], result["replayed"]) == ("decision_recorded", True, False)
    assert (result["requestedBy"], result["note"], result["exitCode"]) == ("ada", "looks right", 0)
    assert [execution["argv"] for execution in executions(repo)] == [result["command"]]
    assert json.loads(repo.approval.read_bytes())["status"] == "approved"


async def test_an_approval_that_no_run_consumes_is_ambiguous_and_says_why(
    transport: Transport, repo: LoopFiles
) -> None:
    run(repo)

    result = await transport.execute(asked())

    assert (result["status"], result["reason"]) == ("ambiguous", "timeout")
    assert result["detail"] == "decision recorded; no active run to consume it: start the run again"


async def test_a_rejection_is_confirmed(transport: Transport, repo: LoopFiles) -> None:
    run(repo)

    result = await transport.execute(asked("reject", confirmation=WAITS))

    assert (result["status"], result["reason"], result["effect"]) == ("confirmed", "rejection_observed", "completed")


@pytest.fixture
def live_run(repo: LoopFiles) -> Iterator[subprocess.Popen[bytes]]:
    """A run of the loop that goes on until it is cancelled."""
    command = [str(STANDIN), "run", "--repo", str(repo.repo), "--loop", LOOP, "--hang"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        until(lambda: b"role_start" in repo.log.read_bytes(), "the run has begun")
        yield process
        process.kill()


async def test_a_cancel_stops_the_run_and_is_confirmed(
    transport: Transport, repo: LoopFiles, live_run: subprocess.Popen[bytes]
) -> None:
    result = await transport.execute(asked("cancel", confirmation=WAITS))

    assert (result["status"], result["reason"]) == ("confirmed", "inactive_not_running")
    assert live_run.wait(DEADLINE) < 0
    assert not repo.active_run.exists()


@pytest.mark.parametrize("intent", ["cancel", "approve", "reject"])
async def test_what_is_so_already_is_not_run(transport: Transport, repo: LoopFiles, intent: str) -> None:
    if intent != "cancel":
        repo.ask_approval(status={"approve": "approved", "reject": "rejected"}[intent])

    result = await transport.execute(asked(intent))

    assert (result["status"], result["reason"], result["executed"]) == ("confirmed", "not_needed", False)
    assert (result["exitCode"], result["command"], executions(repo)) == (0, [], [])


async def test_a_command_that_fails_is_an_answer(transport: Transport, repo: LoopFiles) -> None:
    repo.ask_approval()
    turn(repo, exit_code=7, output="no luck", skip_effect=True)

    result = await transport.execute(asked())

    assert (result["status"], result["exitCode"], result["output"]) == ("failed_command", 7, "no luck")


@pytest.mark.parametrize("first", [0, 1], ids=["local first", "sprite_service first"])
async def test_a_key_is_run_once_whichever_transport_asks_again(both: Both, repo: LoopFiles, first: int) -> None:
    repo.ask_approval()
    one, other = both[first], both[1 - first]

    result = await one.execute(asked(confirmation=SKIPS))
    replays = [await transport.execute(asked(confirmation=SKIPS)) for transport in (one, other)]
    lookups = [await transport.get_control(LOOP, "key-1") for transport in (one, other)]

    assert (result["executed"], result["replayed"]) == (True, False)
    assert replays == lookups == [{**result, "replayed": True}] * 2
    assert len(executions(repo)) == 1


async def test_a_key_asked_for_over_both_at_once_is_run_once(both: Both, repo: LoopFiles) -> None:
    repo.ask_approval()
    turn(repo, sleep_before=0.3)

    results = await asyncio.gather(*[transport.execute(asked(confirmation=SKIPS)) for transport in both])

    assert sorted(result["replayed"] for result in results) == [False, True]
    assert len(executions(repo)) == 1


CONTROL_FAILURES: list[Any] = [
    pytest.param({"loopId": "other"}, "LOOP_NOT_FOUND", id="no such loop"),
    pytest.param({"loopId": "../demo"}, "LOOP_ID_INVALID", id="path as loop id"),
    pytest.param({"intent": "restart"}, "INTENT_UNSUPPORTED", id="no such intent"),
    pytest.param({"idempotencyKey": ""}, "IDEMPOTENCY_KEY_MISSING", id="no key"),
    pytest.param({"idempotencyKey": "a b"}, "IDEMPOTENCY_KEY_INVALID", id="key with a blank"),
    pytest.param({"idempotencyKey": "x" * 129}, "IDEMPOTENCY_KEY_INVALID", id="long key"),
    pytest.param({"requestedBy": ""}, "ACTOR_INVALID", id="nobody"),
    pytest.param({"requestedBy": "a\nb"}, "ACTOR_INVALID", id="actor with a line break"),
    pytest.param({"note": ""}, "NOTE_INVALID", id="empty note"),
    pytest.param({"note": "x" * 2001}, "NOTE_INVALID", id="long note"),
    pytest.param({"note": "a\udcff"}, "NOTE_INVALID", id="note that is no text"),
    pytest.param({"traceId": "x" * 257}, "REQUEST_INVALID", id="long trace id"),
    pytest.param({"confirmation": {"mode": "wait", "timeoutSeconds": 121}}, "REQUEST_INVALID", id="long wait"),
    pytest.param({"confirmation": {"mode": "perhaps"}}, "REQUEST_INVALID", id="no such mode"),
    pytest.param({"expectedIteration": -1}, "REQUEST_INVALID", id="iteration below 0"),
    pytest.param({"expectedIteration": 2**63}, "REQUEST_INVALID", id="iteration beyond int64"),
    pytest.param({"expectedRunId": "run-0"}, "RUN_MISMATCH", id="another run"),
    pytest.param({"expectedIteration": 7}, "ITERATION_MISMATCH", id="another iteration"),
    pytest.param({"expectedApprovalDigest": "0" * 64}, "APPROVAL_CHANGED", id="another approval"),
]


@pytest.mark.parametrize(("members", "reason"), CONTROL_FAILURES)
async def test_a_control_that_cannot_be_is_refused_alike_on_both(
    both: Both, repo: LoopFiles, members: dict[str, Any], reason: str
) -> None:
    repo.ask_approval()

    found = [await facts(transport.execute(asked(**members))) for transport in both]

    assert found[0] == found[1]
    assert (found[0]["class"].reason, found[0]["executed"]) == (reason, False)
    assert executions(repo) == []


async def test_a_control_without_a_key_at_all_is_refused_alike_on_both(both: Both, repo: LoopFiles) -> None:
    wanted: Any = {name: value for name, value in asked().items() if name != "idempotencyKey"}

    found = [await facts(transport.execute(wanted)) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"].reason == "IDEMPOTENCY_KEY_MISSING"


@pytest.mark.parametrize("intent", ["approve", "reject"])
@pytest.mark.parametrize("status", [None, "approved", "rejected", "none"])
async def test_a_decision_that_nobody_asked_for_is_refused_alike_on_both(
    both: Both, repo: LoopFiles, intent: str, status: str | None
) -> None:
    if status == {"approve": "approved", "reject": "rejected"}[intent]:
        return  # so already: see above
    if status is not None:
        repo.ask_approval(status=status)

    found = [await facts(transport.execute(asked(intent))) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"].reason == "APPROVAL_NOT_PENDING"


async def test_a_cancel_that_would_stop_another_loop_is_refused_alike_on_both(both: Both, repo: LoopFiles) -> None:
    put(repo.state, {"active": True, "current_loop_id": "another"})

    found = [await facts(transport.execute(asked("cancel"))) for transport in both]

    assert found[0] == found[1]
    assert (found[0]["class"].reason, found[0]["details"]) == ("LOOP_NOT_ACTIVE", {"activeLoopId": "another"})


async def test_a_key_of_another_request_is_refused_alike_on_both(both: Both, repo: LoopFiles) -> None:
    repo.ask_approval()
    await both[0].execute(asked(confirmation=SKIPS))

    found = [await facts(transport.execute(asked("reject"))) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"] is IdempotencyKeyReused
    assert len(executions(repo)) == 1


async def test_an_iteration_is_the_same_however_it_is_written(both: Both, repo: LoopFiles) -> None:
    repo.summarize({"run_id": "run-1", "iteration": 1})
    repo.append(line(event()))
    document = asked("cancel", confirmation=SKIPS, expectedIteration=1.0)

    first, again = [await transport.execute(document) for transport in both]

    assert again == {**first, "replayed": True}


async def test_a_text_that_is_none_is_refused_alike_on_both(both: Both, repo: LoopFiles) -> None:
    repo.append(line(event()))
    lone = "\ud800"

    for transport in both:
        found = [
            await facts(transport.snapshot(LOOP, trace_id=lone)),
            await facts(transport.snapshot(LOOP, run_id=lone)),
            await facts(events(transport, trace_id=lone)),
            await facts(transport.get_control(LOOP, lone)),
        ]
        assert [each["class"] for each in found] == [RequestInvalid] * 4


async def test_a_key_that_nobody_used_is_not_found_alike_on_both(both: Both) -> None:
    found = [await facts(transport.get_control(LOOP, "key-9")) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"] is ControlNotFound


@pytest.mark.parametrize("loop_id", ["", "..", "a/b", ".hidden", "x" * 65, "\u00e4"])
async def test_a_key_of_no_possible_loop_is_refused_alike_on_both(both: Both, loop_id: str) -> None:
    found = [await facts(transport.get_control(loop_id, "key-1")) for transport in both]

    assert found[0] == found[1]
    assert found[0]["class"] is LoopIdInvalid


@pytest.mark.parametrize("runtime", [None, "/no/such/superloop"])
async def test_without_a_runtime_control_is_refused_alike_on_both(
    config: ServeConfig, repo: LoopFiles, runtime: str | None
) -> None:
    repo.ask_approval()
    config = replace(config, runtime=runtime)
    local = LocalTransport(config.repo, runtime=runtime, state_folder=config.state_folder)
    async with running(config) as address:
        remote = SpriteServiceTransport(address, token=config.token)
        transports: Both = local, remote
        found = [await facts(transport.execute(asked())) for transport in transports]
        await remote.close()
    await local.close()

    assert found[0] == found[1]
    assert found[0]["class"] is RuntimeMissing


async def test_while_another_command_runs_control_is_busy_alike_on_both(
    both: Both, remote: SpriteServiceTransport, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprite_agent.control.engine.LANE_WAIT", 0.1)
    monkeypatch.setattr(remote, "_policy", replace(remote._policy, attempts=1))  # noqa: SLF001  # one try, as over the other
    repo.ask_approval()
    turn(repo, sleep_before=1)
    first = asyncio.ensure_future(both[0].execute(asked(confirmation=SKIPS)))
    await asyncio.to_thread(until, lambda: executions(repo), "the first control runs")

    found = [await facts(transport.execute(asked(idempotencyKey="key-2"))) for transport in both]

    assert found[0] == found[1]
    assert (found[0]["class"], found[0]["retry_after"]) == (ControlBusy, 1.0)
    assert (await first)["executed"]


async def test_a_deadline_as_long_as_a_confirmation_may_take_is_accepted(transport: Transport) -> None:
    for number in range(10):
        wanted = asked("cancel", idempotencyKey=f"key-{number}", confirmation={**LOOKS_ONCE, "timeoutSeconds": 120})

        assert (await transport.execute(wanted))["reason"] == "not_needed"


async def test_what_the_journal_makes_of_refusals_is_nothing(transport: Transport, repo: LoopFiles) -> None:
    with pytest.raises(RequestRefused):
        await transport.execute(asked(requestedBy=""))

    with pytest.raises(ControlNotFound):
        await transport.get_control(LOOP, "key-1")


@pytest.mark.parametrize("size", [3_400_000, 3_600_000, 6_000_000])
async def test_a_snapshot_that_no_message_can_carry_is_refused_as_malformed(
    transport: Transport, repo: LoopFiles, size: int
) -> None:
    repo.append(line(event()))
    repo.summarize({"run_id": "run-1"}, updated_at="x" * size)

    if size < MAX_SNAPSHOT_BYTES:
        assert (await transport.snapshot(LOOP)).envelope["health"]["lastSummaryAt"] == "x" * size
    else:
        with pytest.raises(ArtifactMalformed, match=f"more than {MAX_SNAPSHOT_BYTES}"):
            await transport.snapshot(LOOP)


async def test_a_snapshot_of_the_largest_documents_is_answered(transport: Transport, repo: LoopFiles) -> None:
    gates = dict.fromkeys((*GATES, *map(str, range(40_000))), "")
    repo.append(line(event()))
    repo.summarize({"gates": gates})
    for path in (repo.state, repo.active_run, repo.heartbeat, repo.approval):
        put(path, b"{" + b" " * (MAX_DOCUMENT_BYTES - 2) + b"}")

    assert (await transport.snapshot(LOOP)).envelope["health"]["gates"] == gates


async def test_of_more_loops_than_a_message_can_carry_the_first_are_told(
    transport: Transport, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_LOOPS * (64 + 3) < 4 * 1024 * 1024 - 64 * 1024  # ids of the longest, each with its tag and its length
    monkeypatch.setattr(artifacts, "MAX_LOOPS", 3)
    for name in ("e", "b", "a", "c"):
        (repo.folder.parent / name).mkdir()

    assert (await transport.info()).loops == ["a", "b", "c"]
