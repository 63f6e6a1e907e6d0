"""Wakes whoever follows a log when its folder changes: inotify where there is one, and a slow poll beneath it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from inotify_simple import INotify

POLL_WITH_INOTIFY = 1.0
"""Seconds. Network and overlay file systems may not report every change."""
POLL_ALONE = 0.1
"""Seconds, where there is no inotify."""


class FolderWatch:
    """Watches folders for any number of followers, with one inotify instance. Belongs to one event loop."""

    _loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._followers: dict[int, set[asyncio.Event]] = {}

    @contextlib.contextmanager
    def follow(self, folder: Path) -> Iterator[Changes]:
        """Changes in `folder`, from now on."""
        changed = asyncio.Event()
        watch = self._add(folder, changed)
        try:
            yield Changes(changed, POLL_ALONE if watch is None else POLL_WITH_INOTIFY)
        finally:
            if watch is not None:
                self._remove(watch, changed)

    def wake_all(self) -> None:
        """Wakes every follower."""
        for followers in self._followers.values():
            for changed in followers:
                changed.set()

    def close(self) -> None:
        """Ends all watching; followers go on by polling."""
        if self._inotify is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None
        self._followers.clear()

    def _add(self, folder: Path, changed: asyncio.Event) -> int | None:
        if not sys.platform.startswith("linux"):
            return None
        from inotify_simple import INotify, flags  # noqa: PLC0415  # there is none elsewhere

        mask = flags.MODIFY | flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.MOVED_FROM
        try:
            if self._inotify is None:
                self._inotify = INotify(nonblocking=True)
                self._loop = asyncio.get_running_loop()
                self._loop.add_reader(self._inotify.fileno(), self._wake)
            watch = int(self._inotify.add_watch(folder, mask))
        except OSError:
            return None  # no such folder, or the system's limit is reached: polling does
        self._followers.setdefault(watch, set()).add(changed)
        return watch

    def _remove(self, watch: int, changed: asyncio.Event) -> None:
        followers = self._followers.get(watch, set())
        followers.discard(changed)
        if not followers and self._followers.pop(watch, None) is not None and self._inotify is not None:
            with contextlib.suppress(OSError):  # the folder itself is gone, and the watch with it
                self._inotify.rm_watch(watch)

    def _wake(self) -> None:
        if self._inotify is None:
            return
        for watch in {event.wd for event in self._inotify.read(timeout=0)}:
            for changed in self._followers.get(watch, ()):
                changed.set()


class Changes:
    """One follower's view of a folder."""

    def __init__(self, changed: asyncio.Event, poll: float) -> None:
        self._changed = changed
        self._poll = poll

    async def wait(self, timeout: float) -> None:  # noqa: ASYNC109  # a poll's period, not a failure
        """Returns after a change, and now and then without one; after `timeout` seconds at the latest."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), min(timeout, self._poll))
        self._changed.clear()
