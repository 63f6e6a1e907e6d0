"""Where the agent listens, and with what it shows who it is."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.face.tls import CertificateFiles, Certificates


def bind(server: grpc.aio.Server, listen: str, certificates: CertificateFiles | None) -> str:
    """Has `server` listen on a gRPC address, with TLS where there are certificates. Gives the address, with its port.

    Raises:
        ValueError: it can't.
    """
    path = listen.removeprefix("unix:") if listen.startswith("unix:") else None
    if path is not None:
        _refuse_if_in_use(path)
    try:
        with _for_its_owner_only():
            if certificates is None:
                port = server.add_insecure_port(listen)
            else:
                port = server.add_secure_port(listen, _credentials(certificates))
    except RuntimeError as error:
        raise ValueError(f"can't listen on {listen}: {_cause(listen) or error}") from error
    return listen if path is not None else f"{listen.rpartition(':')[0]}:{port}"


def _credentials(certificates: CertificateFiles) -> grpc.ServerCredentials:
    """TLS 1.2 or later, with whatever pair is in force when a connection begins."""

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        found = certificates.renewed()
        return None if found is None else _configuration(found)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(certificates.current),
        renewed,  # type: ignore[arg-type]  # None, which the stubs leave out: nothing has changed
        require_client_authentication=certificates.current.client_ca is not None,
    )


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.cert)], root_certificates=certificates.client_ca
    )


@contextlib.contextmanager
def _for_its_owner_only() -> Iterator[None]:
    """What is made in the block, such as a socket, has mode 0600 from its first moment."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _cause(listen: str) -> str | None:
    """Why an address can't be had, in the system's words, which gRPC leaves out; None: now it can."""
    path = listen.removeprefix("unix:") if listen.startswith("unix:") else None
    try:
        if path is not None:
            with socket.socket(socket.AF_UNIX) as probe, _for_its_owner_only():
                probe.bind(path)
            Path(path).unlink()
            return None
        host, _, port = listen.rpartition(":")
        for family, kind, _, _, address in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _refuse_if_in_use(path: str) -> None:
    """GRPC takes a Unix socket from whoever listens on it; one that was left behind may be taken."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise ValueError(f"can't listen on unix:{path}: another process does")
