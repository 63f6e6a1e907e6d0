"""A certificate authority of the tests' own, and what it signs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

DAY = timedelta(days=1)
AGENT = ("localhost", "127.0.0.1", "sprite-1.sprites.internal")
"""Names that an agent's certificate has, unless others are wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A certificate and its key, PEM."""

    cert: bytes
    key: bytes

    def put(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Puts them into files, in place of those that are there; the key's for its owner only."""
        return put(folder / f"{name}.pem", self.cert), put(folder / f"{name}.key", self.key, mode=0o600)


class Authority:
    """One CA: a root, or one that another, `above` it, has a certificate for."""

    def __init__(self, name: str = "CA of the tests", *, above: Authority | None = None) -> None:
        self.name = _named(name)
        self.key = ec.generate_private_key(ec.SECP256R1())
        signer = above or self
        now = datetime.now(UTC)
        self._cert = (
            x509.CertificateBuilder(signer.name, self.name, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now - 30 * DAY)
            .not_valid_after(now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(signer.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        """Its own certificate: what those who trust it hold."""
        return self._cert.public_bytes(Encoding.PEM)

    def issue(self, *names: str, until: timedelta = DAY, key: CertificateIssuerPrivateKeyTypes | None = None) -> Pair:
        """A certificate for host names and IP addresses; by default what an agent has."""
        names = names or AGENT
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        cert = (
            x509.CertificateBuilder(self.name, _named(names[0]), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now + until)
            .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
            # Authorities may have the same name: it is by this that the right one is found.
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Pair(
            cert=cert.public_bytes(Encoding.PEM),
            key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )


def put(path: Path, content: bytes, *, mode: int = 0o644) -> Path:
    """Puts a file in place of the one that is there, whole."""
    draft = path.with_name(f"{path.name}.draft")
    draft.touch(mode=mode)
    draft.chmod(mode)
    draft.write_bytes(content)
    return draft.replace(path)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
