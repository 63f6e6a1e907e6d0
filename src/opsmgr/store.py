"""The manager's files for one loop: documents saved atomically, logs appended by line, one manager at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from typing import TYPE_CHECKING, Any

from opsmgr.errors import InputInvalid, LoopLocked
from sprite_agent.contract import json_text
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROTATE_BYTES = 16 * 1024 * 1024
"""A log that would get longer than this is begun anew, bytes."""
KEPT = 5
"""Logs of before are kept so many: file.jsonl.1 is the youngest."""
_LINE_BYTES = 256 * 1024
"""Of a log's end, where its last line is looked for."""


class LoopStore:
    """The folder of one loop's manager artifacts. Makes what it needs when something is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state.json"
        self.cursor = folder / "cursor.json"
        self.health = folder / "health.json"
        self.heartbeat = folder / "heartbeat.json"
        self.sequence = folder / "sequence-state.json"
        self.agent = folder / "agent.json"
        self.intents = folder / "intents.jsonl"
        self.escalations = folder / "escalations.jsonl"
        self.reconcile_telemetry = folder / "telemetry" / "reconcile.jsonl"
        self.heartbeat_telemetry = folder / "telemetry" / "heartbeat.jsonl"
        self.sequence_telemetry = folder / "telemetry" / "sequence.jsonl"
        self.transport_health = folder / "telemetry" / "transport-health.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other managers out of the loop's files.

        Raises:
            LoopLocked: one is at work.
        """
        try:
            _make_folder(self.folder)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputInvalid(f"{self.folder} can't be used: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LoopLocked(f"another manager works on {self.folder}; wait for it to end") from error
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a process that is just being started has the descriptor for a moment
        finally:
            os.close(lock)


def default_folder(repo: Path, loop_id: str) -> Path:
    """Where the manager's files of a loop are, in the repo it was told of."""
    return repo / ".superloop" / "ops-manager" / loop_id


def load(path: Path, kind: str | None = None) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. With a kind it is what schema/<kind>.schema.json says.

    Raises:
        InputInvalid: it can't be read, or is no such object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputInvalid(f"{path} can't be read: {error.strerror}") from error
    document = _object(content, str(path))
    try:
        if kind is not None:
            validate(kind, document)
    except ContractError as error:
        raise InputInvalid(f"{path} is no {kind}: {error}") from error
    return document


def load_if_readable(path: Path, kind: str | None = None) -> dict[str, Any] | None:
    """Likewise for a file that is about to be replaced: None also where it can't be read, or is something else."""
    try:
        return load(path, kind)
    except InputInvalid:
        return None


def load_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file that must be there.

    Raises:
        InputInvalid: it is not, can't be read, or holds no JSON object.
    """
    document = load(path)
    if document is None:
        raise InputInvalid(f"{path} is not there")
    return document


def load_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; blank lines are passed over.

    Raises:
        InputInvalid: it can't be read, or a line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputInvalid(f"{path} can't be read: {error.strerror}") from error
    return [
        _object(line, f"{path} line {number}") for number, line in enumerate(content.split(b"\n"), 1) if line.strip()
    ]


def last_line(path: Path) -> dict[str, Any] | None:
    """The last complete line's object of a log of ours; None where there is none that can be read."""
    line = _last_line(path)
    if line is None:  # as right after a rotation
        line = _last_line(_before(path, 1))
    try:
        value = None if line is None else json_text.parse(line, max_depth=json_text.DOCUMENT_DEPTH)
    except ContractError:
        return None
    return value if isinstance(value, dict) else None


def save(path: Path, document: dict[str, Any], *, indent: bool = True) -> None:
    """Replaces a file as a whole: after a crash it is the old one or the new one.

    Raises:
        InputInvalid: it can't be written.
    """
    text = json_text.encode(document)
    if indent:
        text = json_text.indented(text)
    try:
        _make_folder(path.parent)
        fresh = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        try:
            with fresh.open("xb") as file:
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputInvalid(f"{path} can't be written: {error.strerror}") from error


def append(path: Path, document: dict[str, Any], *, rotate_bytes: int = ROTATE_BYTES) -> None:
    """Appends one line, in one write, and rotates the log before it gets too long. Keys whose value is None are kept.

    Appenders in several processes lose, double or tear no line, across rotations too. A line
    that one of them left torn, being killed, is ended first.

    Raises:
        InputInvalid: it can't be written.
    """
    line = json_text.encode(document) + b"\n"
    try:
        _make_folder(path.parent)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                if _is_appended(descriptor, path, line, rotate_bytes):
                    return
            finally:
                os.close(descriptor)
    except OSError as error:
        raise InputInvalid(f"{path} can't be written: {error.strerror}") from error


@contextlib.contextmanager
def unrotated(path: Path) -> Iterator[None]:
    """Nobody rotates a log while the block runs; who wants to add to it waits.

    Raises:
        OSError: it can't be read.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):  # then there is nothing to rotate
            is_it = False
            while not is_it:
                log = stack.enter_context(path.open("rb"))
                fcntl.flock(log, fcntl.LOCK_SH)
                is_it = os.path.samestat(os.fstat(log.fileno()), path.stat())  # else it was rotated away just then
        yield


def logs(path: Path) -> list[Path]:
    """The files of a log that are there, oldest first."""
    return [log for log in (*(_before(path, age) for age in range(KEPT, 0, -1)), path) if log.exists()]


def _is_appended(descriptor: int, path: Path, line: bytes, rotate_bytes: int) -> bool:
    """Appends a line; if not, the log was or has just been rotated away, and a new one is to be opened."""
    # The lock is the log's own, held for one write or one rotation. It is given back with the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    found = os.fstat(descriptor)
    try:
        if not os.path.samestat(found, path.stat()):
            return False
    except FileNotFoundError:
        return False
    size = found.st_size
    if size and size + len(line) > rotate_bytes:
        _rotate(path)
        return False
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    if os.write(descriptor, line) < len(line):
        os.ftruncate(descriptor, size)  # half a line would spoil the next one
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return True


def _rotate(path: Path) -> None:
    """Makes a log the youngest of those before; the oldest goes where there are too many."""
    # The name itself is given up last: until then no other log can be opened, locked and rotated.
    free = next((age for age in range(1, KEPT) if not _before(path, age).exists()), KEPT)
    for age in range(free, 1, -1):
        _before(path, age - 1).replace(_before(path, age))
    path.replace(_before(path, 1))


def _before(path: Path, age: int) -> Path:
    return path.with_name(f"{path.name}.{age}")


def _make_folder(folder: Path) -> None:
    """Makes a folder, but no repo: a path in one that is not there is a mistyped one.

    Raises:
        InputInvalid: the repo has no .superloop.
        OSError
    """
    for above in folder.parents:
        if above.name == ".superloop" and not above.is_dir():
            raise InputInvalid(f"{above.parent} has no .superloop: it is no repo that Superloop has worked in")
    folder.mkdir(parents=True, exist_ok=True)


def _last_line(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LINE_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    return lines[-1] if lines else None


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json_text.parse(content, max_depth=json_text.DOCUMENT_DEPTH)
    except ContractError as error:
        raise InputInvalid(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputInvalid(f"{where} is no JSON object")
    return value
