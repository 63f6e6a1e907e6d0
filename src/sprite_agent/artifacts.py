"""Reads the runtime's artifacts below one repo, trusting nothing about them.

Sandbox code can put anything at these paths. So a path is opened component by component
without following links, only regular files are read, and no more of them than a limit.
The runtime rewrites some files by truncate-and-write, so a document that does not parse
is read again for a moment before it counts as broken.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import heapq
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sprite_agent.contract import json_text
from sprite_agent.contract.loop_ids import LOOP_ID, check_loop_id
from sprite_agent.errors import ArtifactMalformed, ArtifactNotRegular, ContractError, LoopNotFound, SystemExhausted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.contract.envelopes import ArtifactRef
    from sprite_agent.contract.json_text import OpenObject
    from sprite_agent.errors import OpsError

LOOPS = ".superloop/loops"
STATE = ".superloop/state.json"
ACTIVE_RUN = ".superloop/active-run.json"

MAX_DOCUMENT_BYTES = 512 * 1024
"""A document that goes into a snapshot as a whole is not larger: five of them fit a message."""
MAX_SUMMARY_BYTES = 8 * 1024 * 1024
"""run-summary.json grows by some 5 KB with each iteration; only its last entry goes into a snapshot."""
MAX_MARKS = 250_000
"""Commas and opening brackets of a document: nearly as many values it may have, each of which takes some hundred bytes
once it is parsed, and the whole process waits meanwhile. The runtime's documents have one in forty bytes.
"""

MAX_LOOPS = 50_000
"""So many ids fit a message."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_REPO = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""How they are opened."""
_PIECE = 64 * 1024
_MAX_READS = 6
_REREAD_PAUSE = 0.02
_SETTLED = 0.05
"""Seconds after which a file's times have changed if it has: they are kept in ticks of some milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopPaths:
    """Where one loop's artifacts are, relative to the repo."""

    root: str
    events: str
    run_summary: str
    approval: str
    heartbeat: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A JSON document as it was found: its value, None where there is no file, and what the file was."""

    value: OpenObject | None
    ref: ArtifactRef


@functools.lru_cache(maxsize=1024)
def loop_paths(loop_id: str) -> LoopPaths:
    """The artifact paths of a loop.

    Raises:
        LoopIdInvalid: the id is not a single plain path component.
    """
    check_loop_id(loop_id)
    root = f"{LOOPS}/{loop_id}"
    return LoopPaths(
        root=root,
        events=f"{root}/events.jsonl",
        run_summary=f"{root}/run-summary.json",
        approval=f"{root}/approval.json",
        heartbeat=f"{root}/heartbeat.v1.json",
    )


class ArtifactFiles:
    """The files below one repo, named by their paths relative to it, with slashes.

    Holds nothing open between calls; any thread may call.
    """

    def __init__(self, repo: Path) -> None:
        self.repo = repo

    def open(self, path: str) -> int | None:
        """A read-only descriptor of the regular file at `path`, or None where there is nothing.

        The caller closes it.

        Raises:
            ArtifactNotRegular: a component is a link, or the file is no regular file, or is somebody else's and has
                another name elsewhere.
            ArtifactMalformed: the system refuses it for another reason.
        """
        parent, _, name = path.rpartition("/")
        folder = self.open_folder(parent)
        if folder is None:
            return None
        try:
            return self._open_in(folder, name, path)
        finally:
            os.close(folder)

    def status(self, path: str) -> os.stat_result | None:
        """The status of the regular file at `path`, or None where there is nothing.

        Raises:
            ArtifactNotRegular, ArtifactMalformed: as `open`.
        """
        parent, _, name = path.rpartition("/")
        folder = self.open_folder(parent)
        if folder is None:
            return None
        sought_at = time.time()
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            self._check(status, folder, path, sought_at)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(path, error) from error
        finally:
            os.close(folder)
        return status

    def _open_in(self, folder: int, name: str, path: str) -> int | None:
        sought_at = time.time()
        try:
            descriptor = os.open(name, _FILE, dir_fd=folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(path, error) from error
        try:
            self._check(os.fstat(descriptor), folder, path, sought_at)
        except ArtifactNotRegular:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, status: os.stat_result, folder: int, path: str, sought_at: float) -> None:
        """Returns if the file with this status, sought in the folder open as `folder` at that time, may be read.

        Whoever may write to the folder could make a second name of a file there that it can't read itself, and take
        that away again before the names are counted: the file has changed by it.
        """
        if not stat.S_ISREG(status.st_mode):
            fault = "is not a regular file"
        elif status.st_uid == os.fstat(folder).st_uid:
            return
        elif status.st_nlink > 1:
            fault = "belongs to another user than its folder, and has another name"
        elif (
            not status.st_mode & stat.S_IROTH
            and status.st_ctime > sought_at - _SETTLED
            and not _hard_links_are_protected()
        ):
            fault = "belongs to another user than its folder, and may have had another name a moment ago"
        else:
            return
        raise ArtifactNotRegular(f"{self.repo / path} {fault}", details={"path": path})

    def open_folder(self, path: str) -> int | None:
        """A descriptor of the folder at `path`, or None where there is nothing. The caller closes it.

        Raises:
            ArtifactNotRegular: a component is a link, or no folder.
        """
        folder = None
        for part in (str(self.repo), *path.split("/")):
            try:
                below = os.open(part, _REPO if folder is None else _FOLDER, dir_fd=folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise self._refused(path, error) from error
            finally:
                if folder is not None:
                    os.close(folder)
            folder = below
        return folder

    @contextlib.contextmanager
    def at_once(self) -> Iterator[ArtifactFiles]:
        """The same files, for a few reads in a row: each folder is looked for once in the block, not at each read."""
        kept = _KeptFolders(self.repo)
        try:
            yield kept
        finally:
            kept.close()

    def seems_to_have(self, loop_id: str) -> bool:
        """Whether there seems to be such a loop: a hint, for a fraction of what it takes to be sure.

        Raises:
            LoopIdInvalid
        """
        try:
            return stat.S_ISDIR(os.lstat(f"{self.repo}/{loop_paths(loop_id).root}").st_mode)
        except OSError:
            return False

    def require_loop(self, loop_id: str) -> LoopPaths:
        """The paths of a loop that has an artifact folder.

        Raises:
            LoopIdInvalid, ArtifactNotRegular
            LoopNotFound: there is no folder.
        """
        paths = loop_paths(loop_id)
        folder = self.open_folder(paths.root)
        if folder is None:
            raise LoopNotFound(f"required artifact root missing: {self.repo / paths.root}", details={"loopId": loop_id})
        os.close(folder)
        return paths

    def loops(self) -> list[str]:
        """Ids of the loops that have an artifact folder, sorted; of more than `MAX_LOOPS` the first."""
        folder = self.open_folder(LOOPS)
        if folder is None:
            return []
        try:
            with os.scandir(folder) as entries:
                names = (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
                return heapq.nsmallest(MAX_LOOPS, filter(LOOP_ID.fullmatch, names))
        finally:
            os.close(folder)

    def read_document(self, path: str, *, limit: int = MAX_DOCUMENT_BYTES) -> Document:
        """The JSON object in the file at `path`, of at most `limit` bytes.

        Raises:
            ArtifactNotRegular
            ArtifactMalformed: it is too large, no JSON object, or rewritten while it is read, also after re-reading
                it for a tenth of a second.
        """
        reads = 0
        while True:
            reads += 1
            try:
                content, ref = self._read(path, limit)
                value = None if content is None else json_text.parse_object(content.strip())
                return Document(value=value, ref=ref)
            except ContractError as error:
                if reads == _MAX_READS:
                    raise ArtifactMalformed(
                        f"{self.repo / path} can't be read: {error} (read {reads} times)", details={"path": path}
                    ) from error
            time.sleep(_REREAD_PAUSE)

    def _read(self, path: str, limit: int) -> tuple[bytes | None, ArtifactRef]:
        """What the file holds and is; raises ContractError when it was rewritten meanwhile."""
        descriptor = self.open(path)
        if descriptor is None:
            return None, missing_ref(path)
        try:
            content = os.read(descriptor, _PIECE)
            status = os.fstat(descriptor)
            if len(content) == _PIECE:  # else it ended there: it is a regular file
                content, status = _read_all(descriptor, limit, status)
        except OSError as error:
            raise self._refused(path, error) from error
        finally:
            os.close(descriptor)
        if len(content) > limit:
            raise ArtifactMalformed(f"{self.repo / path} is larger than {limit} bytes", details={"path": path})
        if len(content) > MAX_MARKS and sum(map(content.count, (b",", b"[", b"{"))) > MAX_MARKS:
            raise ArtifactMalformed(
                f"{self.repo / path} has more than {MAX_MARKS} commas and opening brackets", details={"path": path}
            )
        return content, {
            "path": path,
            "exists": True,
            "sizeBytes": len(content),
            "lineCount": content.count(b"\n"),
            "sha256": hashlib.sha256(content).hexdigest(),
            "mtimeEpoch": status.st_mtime_ns // 10**9,  # as a float it could be the next second
        }

    def _refused(self, path: str, error: OSError) -> OpsError:
        if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.ENXIO}:
            return ArtifactNotRegular(
                f"{self.repo / path} is reached through a link or is no regular file", details={"path": path}
            )
        fault = f"{self.repo / path} can't be read: {error.strerror}"
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            return SystemExhausted(fault, retry_after=1.0)
        return ArtifactMalformed(fault, details={"path": path})


@functools.cache
def _hard_links_are_protected() -> bool:
    """Whether the system lets nobody give a second name to a file that they can't read and write themselves."""
    try:
        return Path("/proc/sys/fs/protected_hardlinks").read_text() == "1\n"
    except OSError:
        return False


class _KeptFolders(ArtifactFiles):
    """Keeps each folder open that a file was opened in. Belongs to one thread; close it."""

    def __init__(self, repo: Path) -> None:
        super().__init__(repo)
        self._folders: dict[str, int | None] = {}

    def open(self, path: str) -> int | None:
        """See `ArtifactFiles`."""
        parent, _, name = path.rpartition("/")
        if parent not in self._folders:
            self._folders[parent] = self.open_folder(parent)
        folder = self._folders[parent]
        return None if folder is None else self._open_in(folder, name, path)

    def close(self) -> None:
        """Closes the folders."""
        for folder in self._folders.values():
            if folder is not None:
                os.close(folder)


def _read_all(descriptor: int, limit: int, before: os.stat_result) -> tuple[bytes, os.stat_result]:
    """What a file holds from its beginning, and what it is: as it was `before`, or ContractError is raised.

    One that takes several reads could be of two contents, each of which parses to the end of the other.
    """
    with open(descriptor, "rb", closefd=False) as file:  # by its descriptor
        file.seek(0)
        content = file.read(limit + 1)
    after = os.fstat(descriptor)
    for name in ("st_size", "st_mtime_ns", "st_ctime_ns"):
        if getattr(before, name) != getattr(after, name):
            raise ContractError("it was rewritten while it was read")
    return content, after


def missing_ref(path: str) -> ArtifactRef:
    """What is said of a file that is not there."""
    return {"path": path, "exists": False, "sizeBytes": 0, "lineCount": 0, "sha256": None, "mtimeEpoch": None}
