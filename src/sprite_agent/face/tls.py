"""The agent's certificate and key, and whose certificates callers must have: read, checked, and read anew."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from sprite_agent.contract.certificates import check_ca, check_pair
from sprite_agent.contract.secrets import read_guarded, read_private

if TYPE_CHECKING:
    from pathlib import Path

_log = structlog.get_logger("sprite_agent.face.tls")


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """Where they are; each is PEM."""

    cert: Path
    """The agent's certificate, and those between it and what callers trust."""
    key: Path
    client_ca: Path | None = None
    """Callers must show a certificate that one of these has signed; None: they are asked for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    """What the files hold; the key is the certificate's."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


class CertificateFiles:
    """The certificates in force. Lives as long as the server, whose threads ask it at every handshake."""

    def __init__(self, files: TlsFiles) -> None:
        """Reads the files.

        Raises:
            ValueError: what they hold can't be used; the message says what to do.
        """
        self._files = files
        # Guards what follows. Held while the files are read: two handshakes must not log the same twice.
        self._lock = threading.Lock()
        self.current = _read(files)
        _check(self.current, files)
        self._complaint: str | None = None

    def renewed(self) -> Certificates | None:
        """What has come into force since it was last asked; None: nothing, or nothing that can be used.

        The contents are compared, not the dates: that takes 50 us of a handshake's 2 ms, and misses no change.
        While a new pair is half in place, or broken, the old one stays.
        """
        with self._lock:
            try:
                found = _read(self._files)
                if found == self.current:
                    self._complaint = None
                    return None
                _check(found, self._files)
            except ValueError as error:
                if str(error) != self._complaint:
                    _log.warning("certificates: kept the old ones", reason=str(error))
                self._complaint = str(error)
                return None
            self._complaint = None
            self.current = found
            _log.info("certificates: took the new ones")
            return found


def _read(files: TlsFiles) -> Certificates:
    return Certificates(
        cert=read_guarded(files.cert, "certificate file"),
        key=read_private(files.key, "key file"),
        client_ca=None if files.client_ca is None else read_guarded(files.client_ca, "CA file"),
    )


def _check(found: Certificates, files: TlsFiles) -> None:
    check_pair(found.cert, found.key, cert_file=files.cert, key_file=files.key)
    if files.client_ca is not None and found.client_ca is not None:
        check_ca(found.client_ca, files.client_ca)
