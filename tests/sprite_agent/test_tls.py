"""The agent's TLS files: what is refused at the start, and what becomes of changes under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from sprite_agent.face.tls import CertificateFiles, TlsFiles
from support.certificates import Authority, put

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.certificates import Pair


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue()


@pytest.fixture
def files(tmp_path: Path, pair: Pair, authority: Authority) -> TlsFiles:
    """A right pair, and the CA of callers."""
    cert, key = pair.put(tmp_path, "agent")
    return TlsFiles(cert=cert, key=key, client_ca=put(tmp_path / "ca.pem", authority.pem))


def test_what_is_in_the_files_is_in_force(files: TlsFiles, pair: Pair, authority: Authority) -> None:
    current = CertificateFiles(files).current

    assert (current.cert, current.key, current.client_ca) == (pair.cert, pair.key, authority.pem)


# What is refused at the start.


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620, 0o610, 0o601])
def test_a_key_that_others_can_get_at_is_refused(files: TlsFiles, mode: int) -> None:
    files.key.chmod(mode)

    with pytest.raises(ValueError, match=rf"^key file {files.key} can be read by others; chmod 600 it$"):
        CertificateFiles(files)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_key_that_only_its_owner_can_get_at_will_do(files: TlsFiles, mode: int) -> None:
    files.key.chmod(mode)

    assert CertificateFiles(files).current.key


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o622])
@pytest.mark.parametrize("name", ["cert", "client_ca"])
def test_a_certificate_that_others_can_change_is_refused(files: TlsFiles, name: str, mode: int) -> None:
    path = getattr(files, name)
    path.chmod(mode)

    with pytest.raises(ValueError, match=rf"file {path} can be changed by others; chmod go-w it$"):
        CertificateFiles(files)


@pytest.mark.parametrize("name", ["cert", "key", "client_ca"])
def test_a_file_that_is_not_there_is_refused_by_name(files: TlsFiles, name: str) -> None:
    path = getattr(files, name)
    path.unlink()

    with pytest.raises(ValueError, match=rf"file {path} can't be read: No such file or directory$"):
        CertificateFiles(files)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"]
)
@pytest.mark.parametrize("name", ["cert", "client_ca"])
def test_what_is_no_certificate_is_refused(files: TlsFiles, name: str, content: bytes) -> None:
    path = getattr(files, name)
    path.write_bytes(content)

    with pytest.raises(ValueError, match=rf"file {path} holds no certificate in PEM"):
        CertificateFiles(files)


def with_password(pair: Pair) -> bytes:
    key = serialization.load_pem_private_key(pair.key, password=None)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )


@pytest.mark.parametrize("kind", ["empty", "garbage", "certificate", "with a password"])
def test_what_is_no_plain_key_is_refused(files: TlsFiles, pair: Pair, kind: str) -> None:
    contents = {"empty": b"", "garbage": b"x" * 100, "certificate": pair.cert, "with a password": with_password(pair)}
    files.key.write_bytes(contents[kind])

    with pytest.raises(ValueError, match=rf"^key file {files.key} must hold one private key in PEM") as caught:
        CertificateFiles(files)

    assert "secret" not in str(caught.value)


def test_a_key_of_another_certificate_is_refused(files: TlsFiles, authority: Authority) -> None:
    files.key.write_bytes(authority.issue().key)

    with pytest.raises(ValueError, match=rf"^key file {files.key} is not the key of the certificate in {files.cert}$"):
        CertificateFiles(files)


@pytest.mark.parametrize(
    ("make", "may"),
    [
        (lambda: rsa.generate_private_key(65537, 2048), True),
        (lambda: ec.generate_private_key(ec.SECP384R1()), True),
        (lambda: ec.generate_private_key(ec.SECP521R1()), False),
        (ed25519.Ed25519PrivateKey.generate, False),
    ],
    ids=["RSA", "P-384", "P-521", "Ed25519"],
)
def test_a_key_that_grpc_can_not_use_is_refused(
    files: TlsFiles, authority: Authority, *, make: Callable[[], Any], may: bool
) -> None:
    pair = authority.issue(key=make())
    put(files.cert, pair.cert)
    put(files.key, pair.key, mode=0o600)

    if may:
        assert CertificateFiles(files).current.key == pair.key
    else:
        with pytest.raises(ValueError, match=rf"^key file {files.key} must hold an RSA key, or an ECDSA one on P-256"):
            CertificateFiles(files)


def test_a_chain_is_taken_and_its_first_certificate_is_the_agents(files: TlsFiles, authority: Authority) -> None:
    pair = authority.issue()
    put(files.cert, pair.cert + authority.pem)
    put(files.key, pair.key, mode=0o600)
    assert CertificateFiles(files).current.cert == pair.cert + authority.pem

    put(files.cert, authority.pem + pair.cert)
    with pytest.raises(ValueError, match="is not the key of the certificate"):
        CertificateFiles(files)


# What becomes of changes.


def test_nothing_new_is_nothing(files: TlsFiles) -> None:
    certificates = CertificateFiles(files)

    assert certificates.renewed() is None
    files.cert.touch()
    assert certificates.renewed() is None


@pytest.mark.parametrize("how", ["replaced", "rewritten"])
def test_a_new_pair_comes_into_force_once(files: TlsFiles, authority: Authority, how: str) -> None:
    certificates = CertificateFiles(files)
    new = authority.issue()
    if how == "replaced":
        put(files.cert, new.cert)
        put(files.key, new.key, mode=0o600)
    else:
        files.cert.write_bytes(new.cert)
        files.key.write_bytes(new.key)

    renewed = certificates.renewed()

    assert renewed is not None
    assert (renewed.cert, renewed.key) == (new.cert, new.key)
    assert certificates.current == renewed
    assert certificates.renewed() is None


def test_a_new_authority_comes_into_force(files: TlsFiles) -> None:
    certificates = CertificateFiles(files)
    assert files.client_ca is not None
    other = Authority("another")
    put(files.client_ca, other.pem)

    renewed = certificates.renewed()

    assert renewed is not None
    assert renewed.client_ca == other.pem


def test_while_half_of_a_pair_is_in_place_the_old_one_stays_and_the_whole_one_is_taken(
    files: TlsFiles, authority: Authority
) -> None:
    certificates = CertificateFiles(files)
    old, new = certificates.current, authority.issue()

    put(files.cert, new.cert)
    assert certificates.renewed() is None
    assert certificates.current == old

    put(files.key, new.key, mode=0o600)
    renewed = certificates.renewed()
    assert renewed is not None
    assert renewed.key == new.key


BREAKS = {
    "no certificate": lambda files: files.cert.write_bytes(b"garbage"),
    "no file": lambda files: files.key.unlink(),
    "others can read the key": lambda files: files.key.chmod(0o644),
    "no authority": lambda files: files.client_ca.write_bytes(b""),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_can_not_be_used_leaves_the_old_in_force_and_is_logged_once(files: TlsFiles, name: str) -> None:
    certificates = CertificateFiles(files)
    old = certificates.current
    with structlog.testing.capture_logs() as log:
        BREAKS[name](files)
        for _ in range(5):
            assert certificates.renewed() is None

    assert certificates.current == old
    assert [(entry["log_level"], entry["event"]) for entry in log] == [("warning", "certificates: kept the old ones")]


def test_what_breaks_again_after_it_was_mended_is_logged_again(files: TlsFiles, pair: Pair) -> None:
    certificates = CertificateFiles(files)
    with structlog.testing.capture_logs() as log:
        for _ in range(2):
            files.cert.write_bytes(b"garbage")
            certificates.renewed()
            files.cert.write_bytes(pair.cert)
            assert certificates.renewed() is None

    assert len(log) == 2


def test_no_key_is_ever_logged(files: TlsFiles, authority: Authority, capfd: pytest.CaptureFixture[str]) -> None:
    certificates = CertificateFiles(files)
    new = authority.issue()
    put(files.key, new.key, mode=0o600)
    certificates.renewed()
    put(files.cert, new.cert)
    certificates.renewed()

    out, err = capfd.readouterr()
    assert "took the new ones" in out + err
    assert "PRIVATE" not in out + err
