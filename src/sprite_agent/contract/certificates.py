"""Certificates and keys in PEM: what both programs ask of them before they use them.

Dates are left to the other side of each connection: the clock of a VM that just woke may be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes


def check_ca(pem: bytes, where: Path) -> None:
    """Returns if what was read from `where` holds certificates.

    Raises:
        ValueError: it does not.
    """
    _load(pem, f"CA file {where}")


def check_pair(cert: bytes, key: bytes, *, cert_file: Path, key_file: Path) -> None:
    """Returns if the first certificate of `cert` and `key` belong together.

    Raises:
        ValueError: they do not, or one of them is none that gRPC can use.
    """
    leaf = _load(cert, f"certificate file {cert_file}")[0]
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (TypeError, ValueError) as error:  # TypeError: it has a password
        raise ValueError(f"key file {key_file} must hold one private key in PEM, without a password") from error
    if not _usable(private):
        raise ValueError(f"key file {key_file} must hold an RSA key, or an ECDSA one on P-256 or P-384")
    if private.public_key() != leaf.public_key():
        raise ValueError(f"key file {key_file} is not the key of the certificate in {cert_file}")


def _usable(key: PrivateKeyTypes) -> bool:
    """Whether gRPC can shake hands with it; with another, every connection would just end."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)
    return isinstance(key, rsa.RSAPrivateKey)


def _load(pem: bytes, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"{what} holds no certificate in PEM, or a broken one") from error
