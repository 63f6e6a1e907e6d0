"""Tells health checks whether control can be served: reads go on where it can't."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from sprite_agent.errors import InternalError
from sprite_agent.face.healths import NOT_SERVING, SERVING

if TYPE_CHECKING:
    from sprite_agent.errors import OpsError
    from sprite_agent.face.healths import Healths
    from sprite_agent.face.metrics import AgentMetrics
    from sprite_agent.repo import Repo

INTERVAL = 5.0
"""Seconds between two looks."""

_log = structlog.get_logger("sprite_agent.face.readiness")


class ControlReadiness:
    """The health of control under a name of its own. Lives as long as its server."""

    def __init__(self, name: str, repo: Repo, healths: Healths, metrics: AgentMetrics) -> None:
        self._name = name
        self._repo = repo
        self._healths = healths
        self._metrics = metrics
        self._told: str | None = "not looked at yet"

    async def watch(self) -> None:
        """Looks, and looks again; ends when it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL)

    async def look(self) -> None:
        """Looks once, and tells if something has changed."""
        fault: OpsError | None
        try:
            fault = await asyncio.to_thread(self._repo.control_fault)
        except Exception as error:  # noqa: BLE001  # of a bug the next look must still tell, and this one not the last
            fault = InternalError(f"control could not be looked at: {error!r}")
        reason = None if fault is None else fault.reason
        if reason == self._told:
            return
        self._told = reason
        self._metrics.control_serving.set(fault is None)
        self._healths.set(self._name, NOT_SERVING if fault else SERVING)
        if fault is None:
            _log.info("control is served")
        else:
            _log.error("control can't be served", reason=fault.reason, message=fault.message)
