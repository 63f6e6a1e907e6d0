"""What a manager shows an agent, and what it asks of it: token, signatures, certificates."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsmgr.errors import InputInvalid
from sprite_agent.contract.addresses import is_local
from sprite_agent.contract.secrets import read_guarded, read_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from sprite_agent.contract.signatures import Signer

SIGNATURE_KEY = "x-ops-signature"  # as the contract's signatures has it, which takes long to import

TlsFiles = tuple[bytes, bytes | None, bytes | None]
"""The contents of CA, key and certificate."""
LOOK_SECONDS = 1.0
"""Least time between two looks at the files."""

# Parts of what gRPC says of a connection that was not made, and what they mean.
_NOT_CONNECTED = "failed to connect to all addresses"
_NOT_FOUND = ("DNS resolution failed", "errors resolving ")
_REASONS = (
    ("Hostname Verification Check failed", "its certificate is for another name"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not accepted"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
)
_HUNG_UP = ("Socket closed", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """All of it is optional, and TLS is used where there is a CA. Files are read when a transport is made."""

    token: str | None = field(default=None, repr=False)
    signer: Signer | None = None
    """Signs each attempt at each call."""
    tls_ca: Path | None = None
    """Certificates, one of which must have signed the agent's."""
    tls_cert: Path | None = None
    """The manager's own, for an agent that asks for one."""
    tls_key: Path | None = None
    tls_server_name: str | None = None
    """The name that the agent's certificate must have; None: that of the target."""

    def metadata(
        self, method: str, body: bytes, *, actor: str | None, trace_id: str | None
    ) -> tuple[tuple[str, str], ...]:
        """What goes with one attempt to send `body`; another attempt needs another."""
        given: list[tuple[str, str]] = []
        if self.token is not None:
            given.append(("authorization", f"Bearer {self.token}"))
        if self.signer is not None:
            signature = self.signer.sign(method, body, token=self.token, actor=actor, trace_id=trace_id)
            given.append((SIGNATURE_KEY, signature))
        return tuple(given)

    def read_tls(self, target: str) -> TlsFiles | None:
        """CA, key and certificate for the connection to `target`; None: it is made without TLS.

        Raises:
            InputInvalid: they can't be used, or are missing where they are needed.
        """
        try:
            local = is_local(target)
            if self.tls_ca is None:
                if self.tls_cert is not None or self.tls_key is not None:
                    raise ValueError("a TLS certificate needs the CA of the agent's beside it")
                if not local:
                    raise ValueError(
                        f"{target} is not on this machine: that needs TLS; give the CA of the agent's certificate, "
                        "or reach the agent through a tunnel to loopback or a Unix socket"
                    )
                return None
            return _read_files(self.tls_ca, self.tls_cert, self.tls_key)
        except ValueError as error:
            raise InputInvalid(str(error)) from error

    @staticmethod
    def was_connected(text: str) -> bool:
        """Whether `text`, gRPC's own of a failure, leaves open that something was sent."""
        return _NOT_CONNECTED not in text and not Credentials.was_unknown(text)

    @staticmethod
    def was_unknown(text: str) -> bool:
        """Whether `text` says that the target's name led nowhere."""
        return any(part in text for part in _NOT_FOUND)

    def explain(self, text: str) -> str | None:
        """What gRPC means by `text` where it could not connect; None: it says so itself."""
        if _NOT_CONNECTED not in text:
            return None
        if any(part in text for part in _HUNG_UP):
            wanted = "TLS" if self.tls_ca is None else "a certificate of this manager's, or another one"
            return f"it hung up before anything was asked; it may want {wanted}"
        return next((meaning for part, meaning in _REASONS if part in text), None)


class Renewal:
    """Credentials that are read anew when a file of theirs has changed. Lives as long as its transport.

    While a file can't be used, as in the midst of being replaced, the last ones count.
    """

    def __init__(self, read: Callable[[], Credentials], files: Iterable[Path | None]) -> None:
        """Reads them once.

        Raises:
            InputInvalid: they can't be read.
        """
        self._read = read
        self._files = [file for file in files if file is not None]
        self._seen = self._marks()
        self._looked = time.monotonic()
        self._current = read()

    def current(self) -> Credentials:
        """The credentials; another object when something has changed. Looks at the files once a second at most."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            marks = self._marks()
            if marks != self._seen:
                with contextlib.suppress(InputInvalid):
                    self._current, self._seen = self._read(), marks
        return self._current

    def _marks(self) -> list[tuple[int, int, int] | None]:
        return [_mark(file) for file in self._files]


def _mark(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_files(ca_file: Path, cert_file: Path | None, key_file: Path | None) -> TlsFiles:
    from sprite_agent.contract.certificates import check_ca, check_pair  # noqa: PLC0415  # as slow to import as gRPC

    ca = read_guarded(ca_file, "CA file")
    check_ca(ca, ca_file)
    if cert_file is None and key_file is None:
        return ca, None, None
    if cert_file is None or key_file is None:
        raise ValueError("a TLS certificate and its key go together")
    cert, key = read_guarded(cert_file, "certificate file"), read_private(key_file, "key file")
    check_pair(cert, key, cert_file=cert_file, key_file=key_file)
    return ca, key, cert
