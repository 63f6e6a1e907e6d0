"""Tells whoever follows a log when its folder changes: by inotify, which there is not everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from inotify_simple import INotify

_OVERFLOW = -1
"""What changed when the system could keep no more: it may have been anything."""


class FolderWatch:
    """Watches folders for any number of followers, with one inotify instance. Belongs to one event loop."""

    _loop: asyncio.AbstractEventLoop
    _mask: int
    """What counts as a change."""

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._followers: dict[int, set[Changes]] = {}

    def follow(self, open_folder: Callable[[], int | None], on_change: Callable[[], None]) -> Changes:
        """Changes, from now on, in the folder that `open_folder` gives a descriptor of, to be closed, or None."""
        changes = Changes(self, open_folder, on_change)
        changes.look_anew()
        return changes

    def close(self) -> None:
        """Ends all watching; followers are told nothing more."""
        if self._inotify is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None
        self._followers.clear()

    def add(self, open_folder: Callable[[], int | None], changes: Changes) -> int | None:
        """Tells `changes` from now on when the folder changes. Gives a number for `remove`; None: it can't be."""
        if not sys.platform.startswith("linux"):
            return None
        try:
            folder = open_folder()
        except OpsError:
            return None  # whoever reads there says what is wrong
        if folder is None:
            return None
        try:
            inotify = self._inotify or self._begun()
            # By its descriptor: a path could lead elsewhere by now.
            watch = int(inotify.add_watch(f"/proc/self/fd/{folder}", self._mask))
        except OSError:
            return None  # the system's limit is reached: polling does
        finally:
            os.close(folder)
        self._followers.setdefault(watch, set()).add(changes)
        return watch

    def remove(self, watch: int, changes: Changes) -> None:
        """Tells `changes` no more."""
        followers = self._followers.get(watch, set())
        followers.discard(changes)
        if not followers and self._followers.pop(watch, None) is not None and self._inotify is not None:
            with contextlib.suppress(OSError):  # the folder itself is gone, and the watch with it
                self._inotify.rm_watch(watch)

    def _begun(self) -> INotify:
        from inotify_simple import INotify, flags  # noqa: PLC0415  # there is none elsewhere

        self._inotify = INotify(nonblocking=True)
        self._mask = flags.MODIFY | flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.MOVED_FROM
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fileno(), self._wake)
        return self._inotify

    def _wake(self) -> None:
        """Tells who watches what has changed."""
        if self._inotify is None:
            return
        changed = {event.wd for event in self._inotify.read(timeout=0)}
        for watch in tuple(self._followers) if _OVERFLOW in changed else changed:
            for changes in tuple(self._followers.get(watch, ())):  # who hears no more leaves
                changes.notice()


class Changes:
    """One follower's view of a folder. Close it at the end."""

    def __init__(
        self, folders: FolderWatch, open_folder: Callable[[], int | None], on_change: Callable[[], None]
    ) -> None:
        self._folders = folders
        self._open_folder = open_folder
        self._on_change = on_change
        self._watch: int | None = None
        self.are_there = False
        """There was a change since the follower has set this to False."""
        self.is_deaf = False
        """Told of another change before the follower saw to the last one, it hears of none until it looks anew.

        In a burst one may come every 20 us, and being told of each costs more, here and in the writer, than it says.
        """

    @property
    def are_told(self) -> bool:
        """Whether there is anything that tells of changes."""
        return self._watch is not None

    def look_anew(self) -> None:
        """Watches what is at the folder's path now."""
        self.is_deaf = False
        before, self._watch = self._watch, self._folders.add(self._open_folder, self)
        if before is not None and before != self._watch:
            self._folders.remove(before, self)

    def close(self) -> None:
        """Watches no more."""
        if self._watch is not None:
            self._folders.remove(self._watch, self)
            self._watch = None

    def notice(self) -> None:
        """There is a change."""
        if self.are_there and self._watch is not None:
            self.close()
            self.is_deaf = True
        self.are_there = True
        self._on_change()
