"""Files that hold secrets, or what is as good as one: who else may touch them, and how they are replaced."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO


def read_token(path: Path | None, variable: str) -> str | None:
    """The token in the file at `path`, else in the environment's `variable`; None: there is none.

    Raises:
        ValueError: the file can't be read, is empty, holds more than a token, or others may read it.
    """
    if path is None:
        token = os.environ.get(variable, "")
        return check_token(token, f"${variable}") if token else None
    try:
        token = read_private(path, "token file").decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"token file {path} is no text") from error
    return check_token(token, f"token file {path}")


def read_private(path: Path, what: str) -> bytes:
    """The content of a file that nobody but its owner may read; messages call it `what`.

    Raises:
        ValueError: the file can't be read, or others may read it.
    """
    return _read(path, what, forbidden=stat.S_IRWXG | stat.S_IRWXO, otherwise="can be read by others; chmod 600 it")


def read_guarded(path: Path, what: str) -> bytes:
    """The content of a file that nobody but its owner may change; messages call it `what`.

    Raises:
        ValueError: the file can't be read, or others may change it.
    """
    return _read(path, what, forbidden=stat.S_IWGRP | stat.S_IWOTH, otherwise="can be changed by others; chmod go-w it")


def replace_guarded(path: Path, content: bytes) -> None:
    """Puts `content` into a file, whole or not at all; a new one is for its owner only, an old one stays whose it was.

    Raises:
        OSError: it can't be done, and nothing has changed.
    """
    target = path.resolve()
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with _created(draft) as file:
            if target.exists():
                before = target.stat()
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def create_private(path: Path, content: bytes) -> None:
    """Makes a file that nobody but its owner may read.

    Raises:
        FileExistsError: there is one.
        OSError: it can't be made.
    """
    with _created(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """Held while a file is read, changed and put back: nobody else does so meanwhile.

    Raises:
        OSError: there is no folder for it.
    """
    # The folder is locked: the file is another one afterwards.
    folder = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        os.fsync(folder)
    finally:
        os.close(folder)


def _created(path: Path) -> BinaryIO:
    """A new file for its owner only."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _read(path: Path, what: str, *, forbidden: int, otherwise: str) -> bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & forbidden:
                raise ValueError(f"{what} {path} {otherwise}")
            return file.read()
    except OSError as error:
        raise ValueError(f"{what} {path} can't be read: {error.strerror}") from error


def check_token(token: str, where: str) -> str:
    """`token`, if it can be one; messages call its place `where`.

    Raises:
        ValueError: it can't.
    """
    if not token.isascii() or not token.isprintable() or len(token.split()) != 1:
        raise ValueError(f"{where} must hold one token and nothing else, in printable ASCII")
    return token
