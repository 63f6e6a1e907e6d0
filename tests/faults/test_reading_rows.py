"""E1 to E15: what the recorded adapters got wrong about logs and snapshots, and what is done here."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.cursors import load_cursor
from opsmgr.errors import InputInvalid
from opsmgr.passes.reconcile import ReconcileOptions, reconcile
from opsmgr.store import LoopStore, default_folder
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import (
    ArtifactMalformed,
    ArtifactNotRegular,
    CursorBeyondEnd,
    CursorInvalid,
    EventMalformed,
    HistoryRewritten,
    LogReplaced,
    LogTruncated,
)
from sprite_agent.event_log.newest import MAX_BATCH_BYTES, MAX_BATCH_EVENTS
from support.following import Follower
from support.logs import numbered
from support.repos import LOOP, event, line, put

if TYPE_CHECKING:
    from pathlib import Path

    from opsmgr.transport.base import Transport
    from sprite_agent.contract.streaming import EventBatch
    from support.repos import LoopFiles


async def replay(transport: Transport, **members: Any) -> list[EventBatch]:
    """All batches up to the end of the log."""
    async with Follower(transport.events(EventQuery(loop_id=LOOP, **members))) as following:
        return await following.to_end()


def lines_of(batches: list[EventBatch]) -> list[int]:
    """The line numbers of the events."""
    return [found["cursor"]["eventLineOffset"] for batch in batches for found in batch.events]


async def test_an_incomplete_last_line_is_not_there_yet(transport: Transport, repo: LoopFiles) -> None:
    """E1."""
    repo.append(numbered(2), numbered(1, first=3)[:-10])

    assert lines_of(await replay(transport)) == [1, 2]
    assert (await transport.snapshot(LOOP)).envelope["health"]["eventCount"] == 2

    repo.append(numbered(1, first=3)[-10:])
    assert lines_of(await replay(transport)) == [1, 2, 3]


async def test_a_last_line_that_is_an_object_without_a_newline_is_not_there_yet_either(
    transport: Transport, repo: LoopFiles
) -> None:
    """E2."""
    repo.append(numbered(2), numbered(1, first=3)[:-1])

    batches = await replay(transport)

    assert (lines_of(batches), batches[-1].cursor) == ([1, 2], {"eventLineOffset": 2, "eventLineCount": 2})
    assert lines_of(await replay(transport, after_line=2)) == []


async def test_two_lines_that_a_crash_glued_together_stop_nobody_who_skips(
    transport: Transport, repo: LoopFiles
) -> None:
    """E3."""
    repo.append(numbered(1), numbered(1, first=2)[:-10], numbered(1, first=3), numbered(1, first=4))

    batches = await replay(transport, skip_malformed=True)

    assert lines_of(batches) == [1, 3]
    assert [(record.first_line, record.size_bytes) for batch in batches for record in batch.skipped] == [
        (2, 2 * len(numbered(1)) - 10)
    ]
    with pytest.raises(EventMalformed):
        await replay(transport)


async def test_a_cursor_beyond_the_end_says_so_with_the_numbers(transport: Transport, repo: LoopFiles) -> None:
    """E4."""
    repo.append(numbered(3))

    with pytest.raises(CursorBeyondEnd) as refused:
        await replay(transport, after_line=9)

    assert refused.value.details == {"requested": "9", "available": "3"}


async def test_a_position_in_a_log_that_was_truncated_says_so(transport: Transport, repo: LoopFiles) -> None:
    """E5."""
    repo.append(numbered(3))
    token = (await replay(transport))[-1].resume_token
    repo.truncate(len(numbered(2)))

    with pytest.raises(LogTruncated):
        await replay(transport, resume_token=token)


@pytest.mark.parametrize(
    ("content", "lost"),
    [(numbered(9, first=2), LogReplaced), (numbered(2) + numbered(9, first=7), HistoryRewritten)],
    ids=["another log", "another history"],
)
async def test_a_longer_log_in_the_place_of_the_old_one_is_never_spliced_onto_it(
    transport: Transport, repo: LoopFiles, content: bytes, lost: type[Exception]
) -> None:
    """E6."""
    repo.append(numbered(3))
    token = (await replay(transport))[-1].resume_token
    repo.replace(content)

    with pytest.raises(lost):
        await replay(transport, resume_token=token)


@pytest.mark.parametrize("written", ['"٣"', '" 5"', '"-0"', '"1_0"', '"5"', "5.0", "-1", "true", str(2**64)])
def test_a_cursor_that_is_no_plain_number_is_refused(tmp_path: Path, written: str) -> None:
    """E7: what jq or int() would have taken, or rounded."""
    cursor = tmp_path / "cursor.json"
    cursor.write_text(f'{{"schemaVersion": "v1", "loopId": "{LOOP}", "eventLineOffset": {written}}}')

    with pytest.raises(InputInvalid):
        load_cursor(cursor, LOOP)


async def test_a_cursor_beyond_what_a_number_can_say_is_refused(transport: Transport, repo: LoopFiles) -> None:
    """E7."""
    with pytest.raises(CursorInvalid):
        await replay(transport, after_line=2**64)


@pytest.mark.parametrize("size", [128 * 1024 + 1, 1024 * 1024])
async def test_a_long_line_is_delivered_whole(transport: Transport, repo: LoopFiles, size: int) -> None:
    """E8."""
    bare = len(line(event(data={"text": ""})))
    repo.append(line(event(data={"text": "x" * (size - bare)})), numbered(1))
    assert repo.log.stat().st_size == size + len(numbered(1))

    batches = await replay(transport)

    assert lines_of(batches) == [1, 2]
    first = next(found for batch in batches for found in batch.events)
    assert len(first["event"]["raw"].text) == size - 1  # type: ignore[attr-defined]  # an OpenObject
    assert (await transport.snapshot(LOOP)).envelope["health"]["eventCount"] == 2


async def test_a_line_too_long_to_be_delivered_is_passed_over_and_told(transport: Transport, repo: LoopFiles) -> None:
    """E8."""
    repo.append(numbered(1), line(event(text="x" * (3 * 1024 * 1024))), numbered(1, first=3))

    batches = await replay(transport, skip_malformed=True)

    assert lines_of(batches) == [1, 3]
    assert [record.first_line for batch in batches for record in batch.skipped] == [2]


async def test_a_summary_of_a_thousand_iterations_makes_a_small_snapshot(transport: Transport, repo: LoopFiles) -> None:
    """E9."""
    repo.append(numbered(1))
    repo.summarize(*({"run_id": "run-1", "iteration": number, "text": "x" * 5_000} for number in range(1, 1001)))
    assert repo.run_summary.stat().st_size > 5_000_000

    envelope = (await transport.snapshot(LOOP)).envelope

    assert envelope["run"]["iteration"] == 1000
    assert len(json.dumps(envelope)) < 20_000


async def test_a_state_file_met_while_it_is_rewritten_is_read_again(transport: Transport, repo: LoopFiles) -> None:
    """E10: the runtime empties it first."""
    repo.append(numbered(1))
    repo.state.write_bytes(b"")
    writer = threading.Timer(0.03, lambda: put(repo.state, {"active": True, "current_loop_id": LOOP}))
    writer.start()

    envelope = (await transport.snapshot(LOOP)).envelope

    assert envelope["run"]["status"] == "running"
    await asyncio.to_thread(writer.join)


async def test_a_state_file_that_stays_broken_fails_closed_and_is_named(transport: Transport, repo: LoopFiles) -> None:
    """E10."""
    repo.append(numbered(1))
    repo.state.write_bytes(b"")

    with pytest.raises(ArtifactMalformed, match=r"state\.json"):
        await transport.snapshot(LOOP)


@pytest.mark.parametrize("record", [b"[1]\n", b"3\n", b"null\n", b'{"event":{}}\n', b'{"a":NaN}\n', b'{"a":1e400}\n'])
async def test_a_record_that_is_no_event_is_told_and_passed(
    transport: Transport, repo: LoopFiles, record: bytes
) -> None:
    """E11: test_content.py has the whole list."""
    repo.append(numbered(1), record, numbered(1, first=3))

    batches = await replay(transport, skip_malformed=True)

    assert lines_of(batches) == [1, 3]


async def test_no_envelope_counts_fewer_lines_than_it_has_passed(transport: Transport, repo: LoopFiles) -> None:
    """E12: while lines arrive all the time."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            repo.append(numbered(20))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True))) as following:
            await following.until_lines(3000)
    finally:
        stop.set()
        await asyncio.to_thread(writer.join)

    cursors = [batch.cursor for batch in following.seen]
    cursors += [found["cursor"] for batch in following.seen for found in batch.events]
    assert all(cursor["eventLineOffset"] <= cursor["eventLineCount"] for cursor in cursors)


async def test_thousands_of_new_events_are_ingested_in_one_reconcile(transport: Transport, repo: LoopFiles) -> None:
    """E13: the recorded adapters took five a second, and gave up after 150."""
    repo.append(numbered(5_000))
    began = time.monotonic()

    await reconcile(transport, LoopStore(default_folder(repo.repo, LOOP)), ReconcileOptions(loop_id=LOOP))

    cursor = load_cursor(LoopStore(default_folder(repo.repo, LOOP)).cursor, LOOP)
    assert cursor.line == 5_000
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("name", ["heartbeat.v1.json", "events.jsonl"])
async def test_an_artifact_that_is_a_link_is_not_read(
    transport: Transport, repo: LoopFiles, tmp_path: Path, name: str
) -> None:
    """E14: test_paths.py has every component."""
    (tmp_path / "secret").write_bytes(b'{"secret": true}\n')
    (repo.folder / name).unlink(missing_ok=True)
    (repo.folder / name).symlink_to(tmp_path / "secret")

    with pytest.raises(ArtifactNotRegular):
        await transport.snapshot(LOOP)


@pytest.mark.usefixtures("steady")
async def test_all_events_at_once_come_in_pages(transport: Transport, repo: LoopFiles) -> None:
    """E15."""
    repo.append(numbered(3_000), numbered(300, first=3001, width=5_000))

    batches = await replay(transport, max_events=0)

    assert len(lines_of(batches)) == 3_300
    assert max(len(batch.events) for batch in batches) == MAX_BATCH_EVENTS
    texts = [[getattr(found["event"]["raw"], "text", "") for found in batch.events] for batch in batches]
    assert max(len("".join(batch)) for batch in texts) <= MAX_BATCH_BYTES
