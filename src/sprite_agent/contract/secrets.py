"""The bearer token, from a file or the environment; never from a command line."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def read_token(path: Path | None, variable: str) -> str | None:
    """The token in the file at `path`, else in the environment's `variable`; None: there is none.

    Raises:
        ValueError: the file can't be read, is empty, holds more than a token, or others may read it.
    """
    if path is None:
        token = os.environ.get(variable, "")
        return _checked(token, f"${variable}") if token else None
    try:
        with path.open() as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ValueError(f"token file {path} can be read by others; chmod 600 it")
            token = file.read().strip()
    except OSError as error:
        raise ValueError(f"token file {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"token file {path} is no text") from error
    return _checked(token, f"token file {path}")


def _checked(token: str, where: str) -> str:
    if not token.isascii() or not token.isprintable() or len(token.split()) != 1:
        raise ValueError(f"{where} must hold one token and nothing else, in printable ASCII")
    return token
