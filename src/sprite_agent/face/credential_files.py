"""The credentials in force: read from their files, and read anew when those change, without a restart."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from sprite_agent.contract.secrets import read_guarded
from sprite_agent.face.credential_text import parse_keys, parse_tokens
from sprite_agent.face.credentials import Credentials, agreed_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INTERVAL = 1.0
"""Seconds between two looks at the files."""

_log = structlog.get_logger("sprite_agent.face.credentials")


@dataclass(frozen=True, kw_only=True, slots=True)
class CredentialSources:
    """Where an agent has its credentials from; without any everyone may do everything."""

    token: str | None = None
    """A bearer token that is good for everything. Not beside a token file."""
    token_file: Path | None = None
    trusted_keys: Path | None = None

    @property
    def need_token(self) -> bool:
        """Callers have to show a token, though there may be none that is right."""
        return self.token is not None or self.token_file is not None


class CredentialFiles:
    """The credentials in force. Lives as long as its server; any thread may call."""

    def __init__(self, sources: CredentialSources, *, now: Callable[[], float] = time.monotonic) -> None:
        """Reads the files.

        Raises:
            ValueError: what they hold can't be used; the message says what to do, and has no secret.
        """
        self.sources = sources
        self._now = now
        # Guards what follows. Held while the files are read: two callers must not log the same twice.
        self._lock = threading.Lock()
        self._contents = _read(sources)
        self._in_force = _parsed(sources, *self._contents)
        self._looked = now()
        self._complaint: str | None = None

    def in_force(self) -> Credentials:
        """The credentials, as the files had them a second ago at the earliest.

        While a file is not there, can be changed by others, or makes no sense, all of them stay as they were.
        """
        if self._now() - self._looked >= INTERVAL:
            self.reload()
        return self._in_force

    def reload(self) -> None:
        """Looks at the files at once.

        The contents are compared, not the dates: that takes some 50 us, and misses no change.
        """
        with self._lock:
            self._looked = self._now()
            try:
                contents = _read(self.sources)
                if contents != self._contents:
                    self._in_force = _parsed(self.sources, *contents)
                    self._contents = contents
                    _log.info("credentials: took the new ones", **_counts(self._in_force))
            except ValueError as error:
                if str(error) != self._complaint:
                    _log.error("credentials: kept the old ones", reason=str(error))
                self._complaint = str(error)
            else:
                self._complaint = None


def _read(sources: CredentialSources) -> tuple[bytes | None, bytes | None]:
    return (
        None if sources.token_file is None else read_guarded(sources.token_file, "token file"),
        None if sources.trusted_keys is None else read_guarded(sources.trusted_keys, "file of trusted keys"),
    )


def _parsed(sources: CredentialSources, tokens: bytes | None, keys: bytes | None) -> Credentials:
    agreed = () if sources.token is None else (agreed_token(sources.token),)
    try:
        found = () if tokens is None else parse_tokens(tokens)
    except ValueError as error:
        raise ValueError(f"token file {sources.token_file}: {error}") from error
    try:
        trusted = {} if keys is None else parse_keys(keys)
    except ValueError as error:
        raise ValueError(f"file of trusted keys {sources.trusted_keys}: {error}") from error
    digest = None if keys is None else hashlib.sha256(keys).hexdigest()
    return Credentials(tokens=agreed + found, keys=trusted, keys_digest=digest)


def _counts(found: Credentials) -> dict[str, int]:
    return {"tokens": len(found.tokens), "keys": len(found.keys)}
