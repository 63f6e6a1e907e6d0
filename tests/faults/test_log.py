"""T12, T13: a log that is torn while it is written, and one that does not stay what it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import EventsNotFound, HistoryRewritten, LogReplaced, LogTruncated, LoopNotFound
from support.figures import found, scaled
from support.following import Follower
from support.history import EventHistory
from support.logs import numbered
from support.repos import LOOP
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import AgentProgram

    from opsmgr.transport.base import Transport
    from sprite_agent.errors import OpsError
    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it

LINES = scaled(4_000, 1_000_000)
KILLS = scaled(10, 200)
LONGEST_USUAL = 550
"""Bytes of a line, but for every five hundredth."""

WRITER = r"""
import json, os, random, sys
log, seed, first, last = sys.argv[1], *map(int, sys.argv[2:])
chance = random.Random(seed)
out = os.open(log, os.O_WRONLY | os.O_APPEND)
pending = b""
for number in range(first, last + 1):
    text = "\u00e9" * (chance.randrange(60_000) if number % 500 == 0 else chance.randrange(200))
    event = {"timestamp": "t", "event": "tick", "run_id": "run-1", "iteration": 1, "data": {"n": number, "text": text}}
    pending += json.dumps(event, ensure_ascii=False).encode() + b"\n"
    size = chance.choice([1, 30, 700, 9_000, 60_000, 300_000])
    while len(pending) > size:
        os.write(out, pending[:size])
        pending = pending[size:]
        size = chance.choice([1, 30, 700, 9_000, 60_000, 300_000])
os.write(out, pending)
"""


class KilledWriter:
    """Has the log written by programs that are killed wherever they are. The next one begins with a line of its own."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.torn = 0
        """How many of them have left a line without its end."""

    def run(self) -> int:
        """Writes as many lines or more, and gives their number; the last writer lives."""
        chance = random.Random(12)  # noqa: S311  # the same each time
        each = -(-LINES // (KILLS + 1))
        for number in range(KILLS):
            size = self._log.stat().st_size
            wanted = size + each * LONGEST_USUAL + chance.randrange(each * 100)
            with self._writer(number, 1 + number * each, LINES) as writer:
                until(lambda at=wanted: self._log.stat().st_size >= at, "the writer has written", deadline=60)  # type: ignore[misc]  # a default binds it
                writer.kill()
            with self._log.open("rb") as log:
                log.seek(-1, os.SEEK_END)
                self.torn += log.read() != b"\n"
        with self._writer(KILLS, 1 + KILLS * each, LINES) as writer:
            assert writer.wait(600) == 0
        return self._log.read_bytes().count(b"\n")

    def _writer(self, seed: int, first: int, last: int) -> subprocess.Popen[bytes]:
        words = [str(self._log), str(seed), str(first), str(last)]
        return subprocess.Popen([sys.executable, "-S", "-c", WRITER, *words], stdin=subprocess.DEVNULL)


@pytest.mark.timeout(scaled(240, 3600))
async def test_what_writers_that_are_killed_leave_is_delivered_line_by_line_once_and_in_order(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path
) -> None:
    """T12. One client follows throughout, another one comes anew again and again."""
    address = start_agent("--listen", f"unix:{tmp_path}/agent.sock").address()
    writer = KilledWriter(repo.log)
    writing = asyncio.create_task(asyncio.to_thread(writer.run))

    async def read(transport: SpriteServiceTransport, history: EventHistory, max_events: int) -> tuple[int, int]:
        token, skipped, streams, at_end = None, 0, 0, False
        while not at_end:
            query = EventQuery(
                loop_id=LOOP,
                resume_token=token,
                max_events=max_events,
                follow=True,
                skip_malformed=True,
                heartbeat_interval=2.0,
            )
            streams += 1
            async with contextlib.aclosing(transport.events(query)) as batches:
                async for batch in batches:
                    history.saw(batch)
                    skipped += len(batch.skipped)
                    token = batch.resume_token
                    at_end = writing.done() and batch.caught_up and batch.cursor["eventLineCount"] == writing.result()
                    if at_end:
                        break
        return skipped, streams

    one = SpriteServiceTransport(address, token=TOKEN)
    another = SpriteServiceTransport(address, token=TOKEN)
    with EventHistory(repo.log) as whole, EventHistory(repo.log) as parts:
        (skipped, _), (skipped_too, streams) = await asyncio.gather(
            read(one, whole, 0), read(another, parts, scaled(300, 30_000))
        )
        assert whole.at_end()
        assert parts.at_end()
    await one.close()
    await another.close()

    lines = await writing
    assert lines >= LINES
    assert (whole.events + skipped, parts.events + skipped_too) == (lines, lines)
    assert writer.torn > KILLS // 3
    assert skipped <= writer.torn
    found("T12", f"{lines} lines, {KILLS} kills, {writer.torn} torn, 1 + {streams} streams: 0 lost, 0 doubled")


# A log that does not stay what it was.

LOG = numbered(2_000, width=100)
"""Long enough for its middle to be far from its ends."""


def replace_byte(repo: LoopFiles) -> None:
    """Changes one byte in the middle, and nothing else."""
    with repo.log.open("r+b") as log:
        log.seek(LOG.index(b"xxx", len(LOG) // 2))
        log.write(b"y")


def replace_byte_and_append(repo: LoopFiles) -> None:
    """The same, and new lines with it."""
    replace_byte(repo)
    repo.append(numbered(3, first=2001))


def rotate(repo: LoopFiles) -> None:
    """Moves the log away and begins another, as log rotation does."""
    repo.log.rename(repo.log.with_suffix(".1"))
    repo.log.write_bytes(numbered(3, first=3001))


def remove_and_make_anew(repo: LoopFiles) -> None:
    """The same with the old one gone."""
    repo.log.unlink()
    repo.log.write_bytes(numbered(3000, first=3001, width=100))


def rewrite_slowly(repo: LoopFiles) -> None:
    """Empties the log and writes another into it, in pieces."""
    with repo.log.open("wb", buffering=0) as log:
        for number in range(20):
            log.write(numbered(200, first=3001 + 200 * number, width=100))
            time.sleep(0.002)  # as a program does that computes in between


def restore(repo: LoopFiles) -> None:
    """Puts back the runtime's folder as it was when the log had half its lines."""
    middle = LOG.index(b"\n", len(LOG) // 2) + 1
    checkpoint = repo.repo / "checkpoint"
    shutil.copytree(repo.runtime, checkpoint)
    (checkpoint / repo.log.relative_to(repo.runtime)).write_bytes(LOG[:middle])
    shutil.rmtree(repo.runtime)
    checkpoint.rename(repo.runtime)


def restore_and_grow(repo: LoopFiles) -> None:
    """The same, and the run goes on from there otherwise than before, beyond where it was."""
    checkpoint = repo.repo / "checkpoint"
    shutil.copytree(repo.runtime, checkpoint)
    middle = LOG.index(b"\n", len(LOG) // 2) + 1
    grown = LOG[:middle] + numbered(2_000, first=5001, width=100)
    (checkpoint / repo.log.relative_to(repo.runtime)).write_bytes(grown)
    shutil.rmtree(repo.runtime)
    checkpoint.rename(repo.runtime)


CHANGES: list[Any] = [
    pytest.param(lambda repo: repo.truncate(len(LOG) // 2), LogTruncated, id="truncated"),
    pytest.param(lambda repo: repo.truncate(len(LOG) - 1), LogTruncated, id="truncated by a byte"),
    pytest.param(lambda repo: repo.truncate(10), LogTruncated, id="truncated within its first line"),
    pytest.param(lambda repo: repo.truncate(0), LogTruncated, id="emptied"),
    pytest.param(lambda repo: repo.replace(numbered(9000, first=7)), LogReplaced, id="replaced by a longer one"),
    pytest.param(lambda repo: repo.replace(numbered(9, first=7)), LogReplaced, id="replaced by a shorter one"),
    pytest.param(
        lambda repo: repo.replace(LOG[:1000] + b"\n" + LOG), HistoryRewritten, id="replaced by one that begins alike"
    ),
    pytest.param(rewrite_slowly, LogReplaced, id="rewritten in place"),
    pytest.param(
        lambda repo: repo.rewrite(numbered(1, width=100) + numbered(9000, first=7)),
        HistoryRewritten,
        id="rewritten in place after its first line",
    ),
    pytest.param(replace_byte, HistoryRewritten, id="rewritten in the middle, as long"),
    pytest.param(replace_byte_and_append, HistoryRewritten, id="rewritten in the middle, and longer"),
    pytest.param(rotate, LogReplaced, id="rotated"),
    pytest.param(remove_and_make_anew, LogReplaced, id="removed and made anew"),
    pytest.param(restore, LogTruncated, id="checkpoint restored"),
    pytest.param(restore_and_grow, HistoryRewritten, id="checkpoint restored and grown otherwise"),
    pytest.param(lambda repo: repo.log.unlink(), EventsNotFound, id="removed"),
    pytest.param(lambda repo: shutil.rmtree(repo.folder), LoopNotFound, id="removed with its folder"),
]
GOES_ON: list[Any] = [
    pytest.param(lambda repo: repo.log.touch(), id="touched"),
    pytest.param(lambda repo: repo.log.chmod(0o600), id="chmod"),
    pytest.param(lambda repo: repo.replace(repo.log.read_bytes()), id="replaced by a copy"),
    pytest.param(lambda repo: repo.rewrite(repo.log.read_bytes()), id="rewritten as it was"),
]
_reasons: dict[str, set[str]] = {}


def following(transport: Transport, **members: Any) -> Follower:
    """A subscription that goes on at the end of the log."""
    return Follower(transport.events(EventQuery(**{"loop_id": LOOP, "follow": True, **members})))


def note(where: str, reason: str, change: Callable[[LoopFiles], None]) -> None:
    """Counts what was noticed."""
    _reasons.setdefault(where, set()).add(f"{reason} {id(change)}")
    if all(len(seen) == len(CHANGES) for seen in _reasons.values()) and len(_reasons) == 4:
        found("T13", f"{len(CHANGES)} changes, during and between streams, both transports: all told by their reason")


@pytest.mark.parametrize(("change", "lost"), CHANGES)
async def test_a_change_during_a_stream_is_told_by_its_reason_and_nothing_of_the_other_log_is_sent(
    transport: Transport, repo: LoopFiles, change: Callable[[LoopFiles], None], lost: type[OpsError]
) -> None:
    """T13."""
    repo.append(LOG)
    async with following(transport, heartbeat_interval=1.0) as follower:
        await follower.until_lines(2000)

        await asyncio.to_thread(change, repo)

        with pytest.raises(lost) as told:
            await follower.to_end()

    assert follower.lines == list(range(1, 2001))
    note(f"during {transport.name}", told.value.reason, change)


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize(("change", "lost"), CHANGES)
async def test_a_change_between_streams_is_told_by_its_reason(
    transport: Transport, repo: LoopFiles, change: Callable[[LoopFiles], None], lost: type[OpsError], *, follow: bool
) -> None:
    """T13."""
    repo.append(LOG)
    async with following(transport) as follower:
        await follower.until_lines(2000)
    token = follower.seen[-1].resume_token

    await asyncio.to_thread(change, repo)

    with pytest.raises(lost) as told:
        async with following(transport, resume_token=token, follow=follow) as resumed:
            await resumed.to_end()
    note(f"between {transport.name}", told.value.reason, change)


@pytest.mark.parametrize("change", GOES_ON)
async def test_a_change_that_leaves_the_content_as_it_was_ends_no_stream(
    transport: Transport, repo: LoopFiles, change: Callable[[LoopFiles], None]
) -> None:
    """T13."""
    repo.append(LOG)
    async with following(transport, heartbeat_interval=1.0) as follower:
        await follower.until_lines(2000)
        await asyncio.to_thread(change, repo)
        repo.append(numbered(3, first=2001))

        assert await follower.until_lines(2003) == list(range(1, 2004))
    first = next(batch for batch in follower.seen if batch.events)
    async with following(transport, resume_token=first.resume_token, follow=False) as resumed:
        await resumed.to_end()
    assert first.events[-1]["cursor"]["eventLineOffset"] + len(resumed.lines) == 2003


async def test_a_log_that_is_put_back_at_once_is_followed_in_its_new_folder(
    transport: Transport, repo: LoopFiles
) -> None:
    """T13: a checkpoint of this very moment was restored."""
    repo.append(LOG)
    async with following(transport) as follower:
        await follower.until_lines(2000)
        checkpoint = repo.repo / "checkpoint"
        shutil.copytree(repo.runtime, checkpoint)
        shutil.rmtree(repo.runtime)
        checkpoint.rename(repo.runtime)
        for number in range(2001, 2011):
            repo.append(numbered(1, first=number))
            await follower.until_lines(number)

    assert follower.lines == list(range(1, 2011))
