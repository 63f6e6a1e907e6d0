"""Wakes whoever follows a log when its folder changes: inotify where there is one, and a slow poll beneath it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    def follow(self, open_folder: Callable[[], int | None]) -> Iterator[Changes]:
        """Changes, from now on, in the folder that `open_folder` gives a descriptor of, to be closed, or None."""
        changes = Changes(self, open_folder)
        changes.look_anew()
        try:
            yield changes
        finally:
            changes.end()

    def close(self) -> None:
        """Ends all watching; followers go on by polling."""
        if self._inotify is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None
        self._followers.clear()

    def add(self, open_folder: Callable[[], int | None], changed: asyncio.Event) -> int | None:
        """Has `changed` set from now on when the folder changes. Gives a number for `remove`; None: it can't be."""
        if not sys.platform.startswith("linux"):
            return None
        from inotify_simple import INotify, flags  # noqa: PLC0415  # there is none elsewhere

        mask = flags.MODIFY | flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.MOVED_FROM
        try:
            folder = open_folder()
        except OpsError:
            return None  # whoever reads there says what is wrong
        if folder is None:
            return None
        try:
            if self._inotify is None:
                self._inotify = INotify(nonblocking=True)
                self._loop = asyncio.get_running_loop()
                self._loop.add_reader(self._inotify.fileno(), self._wake)
            # By its descriptor: a path could lead elsewhere by now.
            watch = int(self._inotify.add_watch(f"/proc/self/fd/{folder}", mask))
        except OSError:
            return None  # the system's limit is reached: polling does
        finally:
            os.close(folder)
        self._followers.setdefault(watch, set()).add(changed)
        return watch

    def remove(self, watch: int, changed: asyncio.Event) -> None:
        """Has `changed` no longer set."""
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

    def __init__(self, folders: FolderWatch, open_folder: Callable[[], int | None]) -> None:
        self._folders = folders
        self._open_folder = open_folder
        self._changed = asyncio.Event()
        self._watch: int | None = None

    def look_anew(self) -> None:
        """Watches what is at the folder's path now."""
        before, self._watch = self._watch, self._folders.add(self._open_folder, self._changed)
        if before is not None and before != self._watch:
            self._folders.remove(before, self._changed)

    def end(self) -> None:
        """Watches no more."""
        if self._watch is not None:
            self._folders.remove(self._watch, self._changed)

    async def wait(self, timeout: float) -> bool:  # noqa: ASYNC109  # a poll's period, not a failure
        """Returns after a change, and now and then without one, after `timeout` seconds at the latest: whether one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(
                self._changed.wait(), min(timeout, POLL_ALONE if self._watch is None else POLL_WITH_INOTIFY)
            )
        changed = self._changed.is_set()
        self._changed.clear()
        return changed
