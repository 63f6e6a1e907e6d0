"""What health checks are told, and those who watch: none of them can keep the agent, or another, waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Mapping

_Answer = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING = _Answer.SERVING, _Answer.NOT_SERVING


class Healths(health_pb2_grpc.HealthServicer):
    """The health of one server's services. Lives as long as its server, in its event loop.

    That of grpcio-health-checking writes to a watcher under the lock by which a status is set: whoever watches and
    takes nothing keeps it, and no status of that service is told, or can be set, any more.
    """

    def __init__(self, statuses: Mapping[str, Any]) -> None:
        """Takes what is so at first; the server as a whole, whose name is empty, is serving."""
        self._statuses = {"": SERVING, **statuses}
        self._changed = asyncio.Event()
        """Set, and another one, with each change."""
        self._has_ended = False

    def set(self, service: str, status: Any) -> None:
        """Says how a service is from now on; after the end, nothing."""
        if not self._has_ended:
            self._statuses[service] = status
            self._tell()

    def end(self) -> None:
        """Nothing is served any more, and never will be again."""
        self._has_ended = True
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._tell()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> _Answer:  # noqa: N802  # so named by gRPC
        """See the proto of grpc.health.v1."""
        status = self._statuses.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
        return _Answer(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802  # likewise
        """Likewise. Of changes that come while the watcher takes nothing it is told the last."""
        told = None
        while True:
            changed = self._changed  # before the status is looked at, else a change between the two would be missed
            status = self._statuses.get(request.service, _Answer.SERVICE_UNKNOWN)
            if status == told:
                await changed.wait()
            else:
                await context.write(_Answer(status=status))
                told = status

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
