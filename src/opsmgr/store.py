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
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class LoopStore:
    """The folder of one loop's manager artifacts. Makes what it needs when something is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state.json"
        self.cursor = folder / "cursor.json"
        self.health = folder / "health.json"
        self.agent = folder / "agent.json"
        self.intents = folder / "intents.jsonl"
        self.escalations = folder / "escalations.jsonl"
        self.reconcile_telemetry = folder / "telemetry" / "reconcile.jsonl"
        self.transport_health = folder / "telemetry" / "transport-health.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other managers out of the loop's files.

        Raises:
            LoopLocked: one is at work.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputInvalid(f"{self.folder} can't be used: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LoopLocked(f"another manager works on {self.folder}; wait for it to end") from error
            yield
        finally:
            os.close(lock)


def default_folder(repo: Path, loop_id: str) -> Path:
    """Where the manager's files of a loop are, in the repo it was told of."""
    return repo / ".superloop" / "ops-manager" / loop_id


def load(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Raises:
        InputInvalid: it can't be read, or is no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputInvalid(f"{path} can't be read: {error.strerror}") from error
    return _object(content, str(path))


def load_if_readable(path: Path) -> dict[str, Any] | None:
    """Likewise for a file that is about to be replaced: None also where it can't be read."""
    try:
        return load(path)
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
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 256 * 1024))
            lines = file.read().split(b"\n")[:-1]
        value = json_text.parse(lines[-1], max_depth=json_text.DOCUMENT_DEPTH) if lines else None
    except (FileNotFoundError, ContractError):
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
        path.parent.mkdir(parents=True, exist_ok=True)
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


def append(path: Path, document: dict[str, Any]) -> None:
    """Appends one line, in one write. Keys whose value is None are kept.

    Raises:
        InputInvalid: it can't be written.
    """
    line = json_text.encode(document) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, before)  # half a line would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputInvalid(f"{path} can't be written: {error.strerror}") from error


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json_text.parse(content, max_depth=json_text.DOCUMENT_DEPTH)
    except ContractError as error:
        raise InputInvalid(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputInvalid(f"{where} is no JSON object")
    return value
