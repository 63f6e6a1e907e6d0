"""Looks at the way to an agent layer by layer, below what a transport shows of it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import grpc

    from opsmgr.transport.credentials import Credentials

PROBE_TIMEOUT = 5.0
"""Seconds for each look."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""What an HTTP/2 client begins with: the preface and an empty SETTINGS frame."""
_SETTINGS = 4
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
_HEALTH = "/grpc.health.v1.Health/Check"

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def resolve(address: str) -> str:
    """Where the address leads to.

    Raises:
        OSError: nowhere.
    """
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        return f"socket {path}" if await asyncio.to_thread(_is_socket, path) else f"{path}, which is no socket"
    host, port = _host_port(address)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, proto=6)
    return ", ".join(dict.fromkeys(str(each[4][0]) for each in found))


@contextlib.asynccontextmanager
async def connected(address: str, tls: ssl.SSLContext | None = None, name: str | None = None) -> AsyncIterator[Stream]:
    """A connection, with TLS where a context is given; `name`: that which the certificate must have.

    Raises:
        OSError, ssl.SSLError: it can't be made.
    """
    host = None if tls is None else name or _name(address)
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        stream = await asyncio.open_unix_connection(path, ssl=tls, server_hostname=host)
    else:
        to, port = _host_port(address)
        stream = await asyncio.open_connection(to, port, ssl=tls, server_hostname=host)
    try:
        yield stream
    finally:
        stream[1].transport.abort()  # TLS would wait for the other side to say goodbye
        await asyncio.sleep(0)  # the event loop closes the socket in its next round


def tls_context(credentials: Credentials) -> ssl.SSLContext:
    """What gRPC would make of the credentials' files.

    Raises:
        OSError, ssl.SSLError: they can't be used.
    """
    context = ssl.create_default_context(cafile=_text(credentials.tls_ca))
    # Python's own are others in each version. To gRPC any of the CAs is an end of the chain, and none is read strictly.
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    if credentials.tls_cert is not None:
        context.load_cert_chain(credentials.tls_cert, credentials.tls_key)
    return context


def certificate_ends(writer: asyncio.StreamWriter) -> datetime | None:
    """Until when the certificate of the other side counts."""
    shown = writer.get_extra_info("peercert") or {}
    ends = shown.get("notAfter")
    return None if ends is None else datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)


async def speaks_http2(stream: Stream) -> str | None:
    """What is wrong with how the other side answers an HTTP/2 client; None: nothing.

    Raises:
        OSError, ssl.SSLError: it hung up, with TLS for want of a certificate.
    """
    reader, writer = stream
    writer.write(_PREFACE)
    await writer.drain()
    head = await reader.read(9)
    if head.startswith(_TLS_RECORDS):
        return "it speaks TLS; give the CA of its certificate"
    if not head:
        return "it hung up; it may want TLS, or a certificate"
    if len(head) < 9 or head[3] != _SETTINGS:  # noqa: PLR2004  # the head of a frame
        return f"it answered with {head[:9]!r}, no SETTINGS"
    return None


async def serving(channel: grpc.aio.Channel, service: str) -> str:
    """How the agent says that a service of its is: SERVING, NOT_SERVING, UNKNOWN.

    Raises:
        grpc.aio.AioRpcError: it does not say.
    """
    ask = channel.unary_unary(
        _HEALTH,
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await ask(health_pb2.HealthCheckRequest(service=service), timeout=PROBE_TIMEOUT)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _is_socket(path: str) -> bool:
    import stat  # noqa: PLC0415  # of this line only
    from pathlib import Path  # noqa: PLC0415  # likewise

    return stat.S_ISSOCK(Path(path).stat().st_mode)


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _name(address: str) -> str:
    """The name that gRPC asks for in the certificate of an address."""
    return "localhost" if address.startswith("unix:") else _host_port(address)[0]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
