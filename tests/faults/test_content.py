"""T14: whatever a log holds, nothing of it is the agent's failure, and nothing of it is altered.

tests/data/content.json has the cases: each a name, what it is (an event, malformed records, or nothing but
blank lines), and its text in parts, [text, how often], each character of which is a byte.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.contract.json_text import OpenObject
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ArtifactMalformed, EventMalformed
from support.figures import found
from support.following import Follower
from support.repos import LOOP, event, line

if TYPE_CHECKING:
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.contract.streaming import EventBatch, SkippedRecord
    from support.repos import LoopFiles

CORPUS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "content.json").read_bytes())
CASES = pytest.mark.parametrize("case", CORPUS, ids=[case["name"] for case in CORPUS])

FIRST, LAST = line(event(n=1)), line(event(n=2))


def content_of(case: dict[str, Any]) -> bytes:
    """The bytes of a case."""
    return b"".join(text.encode("latin-1") * times for text, times in case["parts"])


def lines_in(log: bytes, first: int, last: int) -> bytes:
    """The lines from `first` to `last` of a log, with their newlines."""
    return b"".join(part + b"\n" for part in log.split(b"\n")[first - 1 : last])


async def replay(transport: Transport, **members: Any) -> tuple[list[EventEnvelope], list[SkippedRecord]]:
    """All events and all skipped records of the log."""
    seen: list[EventBatch] = []
    async with Follower(transport.events(EventQuery(loop_id=LOOP, **members))) as following:
        seen = await following.to_end()
    assert seen[-1].caught_up
    return [found for batch in seen for found in batch.events], [skip for batch in seen for skip in batch.skipped]


def assert_valid(envelope: EventEnvelope, log: bytes) -> None:
    """The envelope keeps the schema, and its raw text is, byte for byte, what the log has there."""
    validate("loop_run_event", envelope)
    raw, last = envelope["event"]["raw"], envelope["cursor"]["eventLineOffset"]
    assert isinstance(raw, OpenObject)
    text = raw.text.encode()
    assert lines_in(log, last - text.count(b"\n"), last) == text + b"\n"
    payload = envelope["event"]["payload"]
    if payload is not None:
        assert isinstance(payload, OpenObject)
        assert payload.text.encode() in text


@CASES
async def test_no_content_stops_a_stream_that_skips_and_none_is_altered(
    transport: Transport, repo: LoopFiles, case: dict[str, Any]
) -> None:
    log = FIRST + content_of(case) + LAST
    repo.rewrite(log)

    events, skipped = await replay(transport, skip_malformed=True)

    lines = [envelope["cursor"]["eventLineOffset"] for envelope in events]
    assert (lines[0], lines[-1]) == (1, log.count(b"\n"))
    for envelope in events:
        assert_valid(envelope, log)
    for record in skipped:
        text = lines_in(log, record.first_line, record.last_line)
        assert (record.size_bytes, record.sha256) == (len(text), hashlib.sha256(text).hexdigest())
        assert record.reason
        assert len(record.reason) < 500
        assert len(record.excerpt) <= 200
    kind = "event" if len(events) > 2 else "malformed" if skipped else "nothing"
    assert kind == case["is"]
    assert not (kind == "event" and skipped)
    if case is CORPUS[-1]:
        found(
            "T14",
            f"{len(CORPUS)} contents, in both modes and a snapshot, on {transport.name}: no failure, none altered",
        )


@CASES
async def test_malformed_content_ends_a_strict_stream_with_its_line_after_all_before_it(
    transport: Transport, repo: LoopFiles, case: dict[str, Any]
) -> None:
    log = FIRST + content_of(case) + LAST
    repo.rewrite(log)

    if case["is"] == "malformed":
        async with Follower(transport.events(EventQuery(loop_id=LOOP))) as following:
            with pytest.raises(EventMalformed) as malformed:
                await following.to_end()
        assert following.lines == [1]
        assert malformed.value.details["line"] == "2"
    else:
        events, skipped = await replay(transport)
        assert (len(events), skipped) == (3 if case["is"] == "event" else 2, [])


@CASES
async def test_a_snapshot_of_whatever_content_is_valid_or_says_what_is_wrong(
    transport: Transport, repo: LoopFiles, case: dict[str, Any]
) -> None:
    """Only the last record counts; before a good one anything may stand."""
    repo.rewrite(FIRST + content_of(case))
    try:
        envelope = (await transport.snapshot(LOOP)).envelope
    except (EventMalformed, ArtifactMalformed):
        assert case["is"] == "malformed"
    else:
        validate("loop_run_snapshot", envelope)

    repo.append(LAST)

    envelope = (await transport.snapshot(LOOP)).envelope
    validate("loop_run_snapshot", envelope)
    log = repo.log.read_bytes()
    assert envelope["artifacts"]["events"]["sha256"] == hashlib.sha256(log).hexdigest()
    assert envelope["health"]["eventCount"] == envelope["artifacts"]["events"]["lineCount"] == log.count(b"\n")


def test_the_corpus_has_what_logs_were_seen_to_hold() -> None:
    names = {case["name"] for case in CORPUS}

    assert len(names) == len(CORPUS) >= 60
    assert {case["is"] for case in CORPUS} == {"event", "malformed", "nothing"}
