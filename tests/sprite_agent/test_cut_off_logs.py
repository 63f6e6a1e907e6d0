"""A log that is cut off, and there again a moment later, in the midst of whatever is done with it: nothing is lost."""

# ruff: noqa: SLF001  # between two system calls of one step

from __future__ import annotations

import itertools
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.errors import EventsNotFound
from sprite_agent.event_log import index, resume
from sprite_agent.event_log.reader import LogReader
from sprite_agent.event_log.resume import Trail
from sprite_agent.event_log.stream import _Stream
from sprite_agent.repo import Repo
from support.following import lines_of, replay, subscribe
from support.logs import numbered
from support.repos import LoopFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from sprite_agent.errors import EventMalformed, OpsError

WIDTHS = pytest.mark.parametrize("width", [0, 2000], ids=["shorter than the window", "longer"])


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    return LoopFiles(tmp_path / "repo")


@pytest.fixture
async def repo(loop: LoopFiles, tmp_path: Path) -> AsyncIterator[Repo]:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
    yield repo
    repo.close()


@pytest.mark.parametrize("chunk", [2, 3, 4])
@pytest.mark.parametrize("restored", ["rewrite", "replace"])
async def test_between_two_chunks(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, restored: str, chunk: int
) -> None:
    """What was taken before it was cut off is sent; then decides what is there, the same file or another."""
    content = numbered(1000, width=200)
    loop.append(content)
    repo.read_loop("demo")
    read_chunk, chunks = LogReader._read_chunk, itertools.count(1)

    def while_it_is_cut_off(reader: LogReader, end: int) -> None:
        cut = next(chunks) == chunk
        if cut:
            loop.truncate(0)
        try:
            read_chunk(reader, end)
        finally:
            if cut:
                getattr(loop, restored)(content)

    monkeypatch.setattr(LogReader, "_read_chunk", while_it_is_cut_off)
    async with subscribe(repo, follow=True) as follower:
        assert await follower.until_lines(1000) == list(range(1, 1001))


@WIDTHS
async def test_between_reading_and_asking_why_nothing_came(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    loop.append(numbered(10, width=width))
    whole = numbered(11, width=width)
    read_chunk, why_not_whole = LogReader._read_chunk, Trail.why_not_whole
    cuts: list[int] = []

    def while_it_is_cut_off(reader: LogReader, end: int) -> None:
        if not cuts:
            cuts.append(end)
            loop.truncate(0)
        read_chunk(reader, end)

    def when_it_is_back(trail: Trail, *words: Any) -> OpsError:
        loop.rewrite(whole)
        return why_not_whole(trail, *words)

    async with subscribe(repo, follow=True, max_events=100) as follower:
        await follower.until_lines(10)
        monkeypatch.setattr(LogReader, "_read_chunk", while_it_is_cut_off)
        monkeypatch.setattr(Trail, "why_not_whole", when_it_is_back)
        loop.append(numbered(1, first=11, width=width))

        assert await follower.until_lines(11) == list(range(1, 12))
    assert cuts


class Os:
    """`os` for one module; before a `pread` that `when` picks, something happens."""

    def __init__(self, when: Callable[[int], bool], happens: Callable[[], None]) -> None:
        self._when, self._happens = when, happens

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pread(self, log: int, size: int, at: int) -> bytes:
        """See `os.pread`."""
        if self._when(size):
            self._happens()
        return os.pread(log, size, at)


@pytest.mark.parametrize("moment", ["digest", "newline", "beginning"])
async def test_while_a_place_is_looked_for(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    content = numbered(300, width=200)
    loop.append(content)
    cuts: list[str] = []

    def cut_off() -> None:
        if not cuts:
            cuts.append(moment)
            loop.truncate(0)
            threading.Timer(0.05, loop.rewrite, [content + numbered(1, first=301)]).start()

    def cut_off_first(*words: Any) -> Any:
        cut_off()
        return digest_at(*words)

    def checks_beginning(_size: int) -> bool:
        return sys._getframe(2).f_code.co_name == "check_beginning"

    async with subscribe(repo, follow=True) as follower:
        await follower.until_lines(300)
        if moment == "digest":
            digest_at = index.LogIndex._digest_at
            monkeypatch.setattr(index.LogIndex, "_digest_at", cut_off_first)
        elif moment == "newline":
            monkeypatch.setattr(index, "os", Os(lambda size: size == 1, cut_off))
        else:
            monkeypatch.setattr(resume, "os", Os(checks_beginning, cut_off))
        loop.replace(content)  # the same in another file: the follower goes to its place again

        assert await follower.until_lines(301) == list(range(1, 302))
    assert cuts


@WIDTHS
async def test_while_a_reader_is_made(repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    loop.append(numbered(10, width=width))
    whole = numbered(11, width=width)
    init = Trail.__init__
    cuts: list[int | None] = []

    def while_it_is_cut_off(trail: Trail, log: int | None = None, *words: Any) -> None:
        cut = log is not None and not cuts
        if cut:
            cuts.append(log)
            loop.truncate(0)
        try:
            init(trail, log, *words)
        finally:
            if cut:
                loop.rewrite(whole)

    async with subscribe(repo, follow=True) as follower:
        await follower.until_lines(10)
        monkeypatch.setattr(Trail, "__init__", while_it_is_cut_off)
        loop.replace(whole)

        assert await follower.until_lines(11) == list(range(1, 12))
        last = follower.seen[-1]
    assert cuts
    loop.append(numbered(1, first=12, width=width))
    assert lines_of(await replay(repo, resume_token=last.resume_token)) == [12]


async def test_a_stream_that_is_to_end_as_it_misses_its_log_says_where_to_resume(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(numbered(3))
    turn = _Stream._turn

    def meanwhile(stream: _Stream) -> EventMalformed | None:
        try:
            return turn(stream)
        except EventsNotFound:
            repo._stream_end.requested = True
            raise

    monkeypatch.setattr(_Stream, "_turn", meanwhile)
    async with subscribe(repo, follow=True) as follower:
        await follower.until_lines(3)
        loop.log.unlink()

        last = (await follower.to_end())[-1]
    assert last.events == []
    assert last.cursor["eventLineOffset"] == 3
