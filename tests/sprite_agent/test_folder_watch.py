"""Whoever follows a folder hears of a change at once, and of a burst of them no more than is listened to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from typing import TYPE_CHECKING

import pytest
from inotify_simple import Event

from sprite_agent.event_log.folder_watch import FolderWatch
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sprite_agent.event_log.folder_watch import Changes


@pytest.fixture
async def folders() -> AsyncIterator[FolderWatch]:
    folders = FolderWatch()
    yield folders
    folders.close()


@pytest.fixture
def told() -> list[None]:
    """An entry for each time that the follower was told of a change."""
    return []


@pytest.fixture
async def changes(folders: FolderWatch, tmp_path: Path, told: list[None]) -> AsyncIterator[Changes]:
    open_folder = functools.partial(os.open, tmp_path, os.O_RDONLY)
    with contextlib.closing(folders.follow(open_folder, lambda: told.append(None))) as followed:
        yield followed


async def write(path: Path, times: int) -> None:
    """Appends, one after another, each noticed by itself."""
    for _ in range(times):
        with path.open("ab") as file:
            file.write(b"x")
        await asyncio.sleep(0.005)


async def test_each_change_that_is_seen_to_is_heard(changes: Changes, tmp_path: Path, told: list[None]) -> None:
    for _ in range(5):
        told.clear()
        await write(tmp_path / "file", 1)
        await eventually(lambda: bool(told), "it is told")
        assert changes.are_there
        changes.are_there = False
    assert not changes.is_deaf


async def test_in_a_burst_nothing_more_is_heard_until_it_looks_anew(
    changes: Changes, tmp_path: Path, told: list[None]
) -> None:
    await write(tmp_path / "file", 5)
    await eventually(lambda: changes.is_deaf, "it hears no more")
    assert changes.are_there
    assert not changes.are_told

    changes.are_there = False
    told.clear()
    await write(tmp_path / "file", 5)
    assert not changes.are_there
    assert not told

    changes.look_anew()
    await write(tmp_path / "file", 1)
    await eventually(lambda: bool(told), "it is told")
    assert not changes.is_deaf


async def test_everybody_is_told_where_the_system_has_kept_no_more(
    folders: FolderWatch, changes: Changes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    await eventually(lambda: changes.are_there, "it is told of that")
    changes.are_there = False
    open_other = functools.partial(os.open, other_folder, os.O_RDONLY)
    with contextlib.closing(folders.follow(open_other, lambda: None)) as other:
        monkeypatch.setattr(folders._inotify, "read", lambda timeout: [Event(-1, 0x4000, 0, "")])  # noqa: ARG005, SLF001  # as the system says it
        for _ in range(2):
            folders._wake()  # noqa: SLF001  # no test can fill the system's queue in reasonable time
            assert changes.are_there
            assert other.are_there

        assert changes.is_deaf
        assert other.is_deaf
