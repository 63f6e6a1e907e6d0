"""/metrics for Prometheus and /healthz for whoever restarts the daemon, over HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry

STALLED = 15.0
"""Seconds without a move after which the daemon is no longer healthy."""


class _Server(ThreadingMixIn, WSGIServer):
    """One thread a request: a slow reader holds up nobody."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that says nothing, or is reset, is nobody's concern."""


class _Server6(_Server):
    """Likewise, on IPv6."""

    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    """Its time limit ends a connection that says nothing."""

    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name it has there
        """Requests are not logged."""


@contextlib.contextmanager
def served(host: str, port: int, registry: CollectorRegistry, stalled_seconds: Callable[[], float]) -> Iterator[int]:
    """Answers inside the block; gives the port, which is a free one for 0.

    Raises:
        OSError: the address can't be had.
    """
    metrics = make_wsgi_app(registry)

    def answer(environ: Any, start: Any) -> Any:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start)
            case "/healthz":
                stalled = stalled_seconds()
                ok = stalled < STALLED
                status = "200 OK" if ok else "503 Service Unavailable"
                body = {"ok": ok, "stalledSeconds": round(stalled, 1)}
            case _:
                status, body = "404 Not Found", {"ok": False}
        start(status, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]

    server = make_server(host, port, answer, _Server6 if ":" in host else _Server, _Quiet)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
