"""Raw events and whole ones say the same: what a receiver builds from a record is what the agent builds from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from opsmgr.transport.messages import batch_from
from sprite_agent.contract.json_text import OpenObject
from sprite_agent.errors import ContractError
from sprite_agent.v1 import service_pb2 as pb
from sprite_agent.v1 import service_pb2_grpc
from support.repos import LOOP, event, line, lines
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Agent

    from support.repos import LoopFiles

CORPUS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "content.json").read_bytes())
TRACE = "trace-1"


@pytest.fixture
async def stub(agent: Agent) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(agent.address) as channel:
        yield service_pb2_grpc.SpriteAgentServiceStub(channel)


async def answers(stub: Any, agent: Agent, **members: Any) -> list[pb.StreamEventsResponse]:
    """The responses of a stream that ends by itself."""
    request = pb.StreamEventsRequest(loop_id=LOOP, skip_malformed=True, trace_id=TRACE, **members)
    return [answer async for answer in stub.StreamEvents(request, metadata=agent.metadata, timeout=DEADLINE)]


def told(responses: list[pb.StreamEventsResponse]) -> list[Any]:
    """All that the responses say, but for when, and how they divide it: that depends on how fast the machine is."""
    found: list[Any] = []
    batches = [batch_from(response, TRACE) for response in responses]
    for envelope in (sent for batch in batches for sent in batch.events):
        texts = [part.text if isinstance(part, OpenObject) else part for part in _open_objects(envelope)]
        found.append(({**envelope, "emittedAt": ""}, texts))
    found += [record for batch in batches for record in batch.skipped]
    return [*found, batches[-1].cursor, batches[-1].resume_token, batches[-1].caught_up]


def _open_objects(envelope: Any) -> list[Any]:
    return [envelope["event"]["raw"], envelope["event"]["payload"]]


@pytest.mark.parametrize("case", CORPUS, ids=[case["name"] for case in CORPUS])
async def test_raw_events_make_the_envelopes_that_are_sent_whole(
    stub: Any, agent: Agent, repo: LoopFiles, case: dict[str, Any]
) -> None:
    content = b"".join(text.encode("latin-1") * times for text, times in case["parts"])
    repo.rewrite(line(event(n=1)) + content + lines(event("usage_check", data={"n": 2.50})))

    whole, raw = await answers(stub, agent), await answers(stub, agent, raw_events=True)

    assert told(raw) == told(whole)
    assert not any(response.raw_events or response.HasField("source") for response in whole)
    assert not any(response.events for response in raw)


async def test_raw_events_take_less_than_half_of_the_bytes(stub: Any, agent: Agent, repo: LoopFiles) -> None:
    repo.append(*(line(event(n=number, data={"text": "x" * 200})) for number in range(100)))

    whole, raw = await answers(stub, agent), await answers(stub, agent, raw_events=True)

    assert 2 * sum(map(pb.StreamEventsResponse.ByteSize, raw)) < sum(map(pb.StreamEventsResponse.ByteSize, whole))


async def test_what_comes_while_a_stream_follows_is_told_alike(stub: Any, agent: Agent, repo: LoopFiles) -> None:
    calls = [
        stub.StreamEvents(
            pb.StreamEventsRequest(loop_id=LOOP, trace_id=TRACE, follow=True, raw_events=raw), metadata=agent.metadata
        )
        for raw in (False, True)
    ]
    for call in calls:
        await call.read()
    repo.append(line(event(n=1)), lines(event("usage_check", n=2)), line(event(n=3)))

    said = []
    for call in calls:
        events: list[Any] = []
        while len(events) < 3:
            events += batch_from(await call.read(), TRACE).events
        said.append([{**envelope, "emittedAt": ""} for envelope in events])
        call.cancel()

    assert said[0] == said[1]
    assert [envelope["traceId"] for envelope in said[1]] == [TRACE] * 3


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no json", "not JSON"),
        ("[1]", "a JSON array"),
        ('{"timestamp":"t"}', "event.name"),
        ('{"timestamp":"t","event":"e","data":1}', "event.payload"),
        ('{"timestamp":"t","event":"e","x":1e999}', "out of range"),
    ],
)
def test_a_raw_event_that_is_none_is_refused(text: str, fault: str) -> None:
    message = pb.StreamEventsResponse(emitted_at="2026-01-01T00:00:00Z")
    message.source.repo_path, message.source.loop_id = "/repo", LOOP
    message.raw_events.add(line=1, json=text, record_count=1)

    with pytest.raises(ContractError, match=fault):
        batch_from(message)


EVENT = '{"timestamp":"t","event":"e"}'


@pytest.mark.parametrize(
    ("text", "record_count", "fault"),
    [
        ("", 0, "0 raw events are 0 lines"),
        (EVENT, 0, "0 raw events are 1 lines"),
        (EVENT, 2, "2 raw events are 1 lines"),
        (EVENT, -1, "-1 raw events"),
        (f"{EVENT}\n{EVENT}\n{EVENT}", 2, "2 raw events are 3 lines"),
        (f"{EVENT}\n{EVENT}", 1, "not JSON"),
        (f"{EVENT}\n", 2, "2 raw events are 1 lines"),
        (f"{EVENT}\n\n", 2, "not JSON"),
        (f"{EVENT}{EVENT}\n\n{EVENT}", 3, "not JSON"),
        (f'{EVENT} {EVENT}\n{{"timestamp":"t",\n"event":"e"}}', 3, "not JSON"),
        (f"{EVENT}\n[1]\n{EVENT}", 3, "a JSON array"),
        (f'{EVENT}\n{EVENT}\n{{"timestamp":"t"}}', 3, "event.name"),
    ],
)
def test_raw_events_that_are_not_as_many_events_as_they_are_said_to_be_are_refused(
    text: str, record_count: int, fault: str
) -> None:
    message = pb.StreamEventsResponse(emitted_at="2026-01-01T00:00:00Z")
    message.source.repo_path, message.source.loop_id = "/repo", LOOP
    message.raw_events.add(line=1, json=text, record_count=record_count)

    with pytest.raises(ContractError, match=fault):
        batch_from(message)


async def test_records_on_consecutive_lines_travel_together(stub: Any, agent: Agent, repo: LoopFiles) -> None:
    repo.append(line(event(n=1)) * 3, b"\n", line(event(n=5)), lines(event("usage_check", n=6)), line(event(n=7)) * 2)

    (response,) = await answers(stub, agent, raw_events=True)

    together = [(raw.line, raw.record_count) for raw in response.raw_events]
    after = lines(event("usage_check", n=6)).count(b"\n")
    assert together == [(1, 3), (5, 1), (5 + after, 1), (6 + after, 2)]


async def test_a_malformed_record_stops_only_those_after_it(stub: Any, agent: Agent, repo: LoopFiles) -> None:
    repo.append(line(event(n=1)) * 3, b'{"timestamp":1}\n', line(event(n=5)) * 2)

    (response,) = await answers(stub, agent, raw_events=True)

    assert [envelope["cursor"]["eventLineOffset"] for envelope in batch_from(response).events] == [1, 2, 3, 5, 6]
    assert [record.first_line for record in response.skipped] == [4]


def test_raw_events_without_a_source_are_refused() -> None:
    message = pb.StreamEventsResponse(emitted_at="2026-01-01T00:00:00Z")
    message.raw_events.add(line=1, json=EVENT, record_count=1)

    with pytest.raises(ContractError, match="source"):
        batch_from(message)
