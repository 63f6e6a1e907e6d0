"""The agent's own folder, outside the repo: the journal and the locks. Sandbox code must not be able to write it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sprite_agent.errors import ControlBusy, JournalUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

_POLL = 0.02


class StateFolder:
    """One repo's state folder. Making one touches nothing: the folder is made when something is written."""

    def __init__(self, path: Path, repo: Path) -> None:
        """Raises ValueError when the folder is below the repo, which the sandbox can write."""
        self.path = path
        if path.resolve().is_relative_to(repo.resolve()):
            raise ValueError(f"state folder {path} is inside the repo {repo}, which sandbox code can write")

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.path / "journal.sqlite3"

    def make(self) -> None:
        """Makes the folder, for this user only.

        Raises:
            JournalUnavailable: it can't be made.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise JournalUnavailable(f"state folder {self.path} can't be made: {error.strerror}") from error

    @contextlib.contextmanager
    def agent_lock(self) -> Iterator[None]:
        """Held for as long as an agent serves the repo.

        Raises:
            BlockingIOError: another agent does.
        """
        self.make()
        with _open(self.path / "agent.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            yield

    @contextlib.contextmanager
    def lane(self, timeout: float) -> Iterator[int]:
        """Held while a command runs: one at a time in the repo, whichever process runs it.

        Gives the lock's descriptor: a process that inherits it keeps the lane if this one is killed.

        Raises:
            ControlBusy: another one still runs after `timeout` seconds.
        """
        self.make()
        with _open(self.path / "lane.lock") as lock:
            until = time.monotonic() + timeout
            while not _locked(lock):
                if time.monotonic() >= until:
                    raise ControlBusy("another command runs in this repo; try again in a second", retry_after=1.0)
                time.sleep(_POLL)
            try:
                yield lock
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # also where some process still has the descriptor


def default_path(repo: Path) -> Path:
    """Where a repo's state folder is unless told otherwise: below $XDG_STATE_HOME, else ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sprite-agent" / hashlib.sha256(os.fsencode(repo.resolve())).hexdigest()[:16]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor  # closing it releases its lock
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
