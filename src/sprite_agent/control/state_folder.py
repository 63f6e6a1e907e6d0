"""The agent's own folder, outside the repo: the journal and the locks. Sandbox code must not be able to write it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sprite_agent.errors import ControlBusy, JournalUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

BALLAST_BYTES = 1024 * 1024
"""Room that is given back when the disk is full, so that what a command did can still be recorded."""

_POLL = 0.02


class StateFolder:
    """One repo's state folder. Making one touches nothing: the folder is made when something is written."""

    def __init__(self, path: Path, repo: Path) -> None:
        """Raises ValueError when the folder is below the repo, which the sandbox can write."""
        self.path = path
        if path.resolve().is_relative_to(repo.resolve()):
            raise ValueError(f"state folder {path} is inside the repo {repo}, which sandbox code can write")
        self.journal = path / "journal.sqlite3"
        """The journal's file."""
        self.executions = path / "executions"
        """The folder of what executions leave behind."""
        self.ballast = path / "ballast"
        """A file that only takes room."""

    def make(self) -> None:
        """Makes the folder, for this user only.

        Raises:
            JournalUnavailable: it can't be made, is another user's, or others may look into it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError as error:
            raise JournalUnavailable(f"state folder {self.path} can't be made: {error.strerror}") from error
        if found.st_uid != os.geteuid():
            raise JournalUnavailable(f"state folder {self.path} belongs to another user, uid {found.st_uid}")
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise JournalUnavailable(f"state folder {self.path} is open to others; chmod 700 it")

    def has_journal(self) -> bool:
        """Whether there is a journal that this user may look at."""
        return os.path.exists(self.journal)  # noqa: PTH110  # Path.exists() raises where it may not look

    def journal_looks(self) -> list[tuple[int, int, int] | None]:
        """What tells whether anything about the journal's files has changed; None for each that is not there."""
        looks: list[tuple[int, int, int] | None] = []
        for name in (self.journal.name, f"{self.journal.name}-journal", "journal.id"):
            try:
                found = (self.path / name).stat()
            except OSError:
                looks.append(None)
            else:
                looks.append((found.st_ino, found.st_size, found.st_mtime_ns))
        return looks

    def ensure_ballast(self) -> None:
        """Makes the ballast where it is missing.

        Raises:
            OSError: the disk has no room for it.
        """
        if self.ballast.exists():
            return
        draft = self.path / f".ballast.{os.getpid()}.{threading.get_ident()}"
        try:
            draft.touch(mode=0o600)  # of one that was killed here with this pid, there may be one
            with draft.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
            draft.rename(self.ballast)
        finally:
            draft.unlink(missing_ok=True)

    def drop_ballast(self) -> None:
        """Gives the ballast's room back."""
        self.ballast.unlink(missing_ok=True)

    @contextlib.contextmanager
    def agent_lock(self) -> Iterator[None]:
        """Held for as long as an agent serves the repo.

        Raises:
            BlockingIOError: another agent does.
            JournalUnavailable: the folder can't be made or written.
        """
        self.make()
        with contextlib.ExitStack() as stack:
            with self._writing():
                lock = stack.enter_context(_open(self.path / "agent.lock"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            yield

    @contextlib.contextmanager
    def lane(self, timeout: float) -> Iterator[int]:
        """Held while a command runs: one at a time in the repo, whichever process runs it.

        Gives the lock's descriptor: a process that inherits it keeps the lane, until that ends or the lane is freed.

        Raises:
            ControlBusy: another one still runs after `timeout` seconds.
            JournalUnavailable: the folder can't be written.
        """
        with contextlib.ExitStack() as stack:
            with self._writing():
                # Not to be written through: the command inherits it, and may run sandbox code.
                lock = stack.enter_context(_open(self.path / "lane.lock", os.O_RDONLY))
            until = time.monotonic() + timeout
            while not _locked(lock):
                if time.monotonic() >= until:
                    raise ControlBusy("another command runs in this repo; try again in a second", retry_after=1.0)
                time.sleep(_POLL)
            yield lock

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises what keeps the block from writing to the folder as the agent's error; a lock that is held is none."""
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            advice = f"let uid {os.geteuid()} write there, or give another --state-dir"
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                advice = "try again"
            raise JournalUnavailable(
                f"state folder {self.path} can't be written: {error.strerror}; {advice}"
            ) from error


def free(lane: int) -> None:
    """Frees a lane that processes still running may have inherited: what it was held for has ended."""
    fcntl.flock(lane, fcntl.LOCK_UN)


@contextlib.contextmanager
def repo_lock(repo: Path) -> Iterator[None]:
    """Held for as long as an agent of this user serves the repo, whatever its state folder is.

    It is not in the repo: sandbox code could keep every agent from it there.

    Raises:
        BlockingIOError: another agent does.
        OSError, RuntimeError: there is no place for the lock.
    """
    path = default_path(repo).with_suffix(".lock")
    if path.resolve().is_relative_to(repo.resolve()):
        raise OSError(f"{path} is inside the repo")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def default_path(repo: Path) -> Path:
    """Where a repo's state folder is unless told otherwise: below $XDG_STATE_HOME, else ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sprite-agent" / hashlib.sha256(os.fsencode(repo.resolve())).hexdigest()[:16]


@contextlib.contextmanager
def _open(path: Path, access: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, access | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
