"""Supervises many targets: one follower each, limits they share, and a status file that says how they are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import structlog

from opsmgr import store as files
from opsmgr.fleet.follower import Follower
from opsmgr.fleet.slots import Slots
from sprite_agent.contract import clock
from sprite_agent.contract.validation import validate
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opsmgr.config import FleetSettings
    from opsmgr.fleet.metrics import FleetMetrics
    from opsmgr.targets import Target

TICK = 1.0
"""Seconds between two looks at the targets."""
_START_SPREAD = 0.001
"""Seconds between the starts of two targets: thousands at once would time each other out."""

_log = structlog.get_logger("opsmgr.fleet")


class Supervisor:
    """The supervision of a set of targets. `run` it; end it by cancelling that.

    Each target has a task of its own, and what they share can't be held up by one of them.
    """

    def __init__(self, settings: FleetSettings, metrics: FleetMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._catch_ups = Slots(settings.max_catch_ups)
        self._passes = Slots(settings.max_passes)
        self._followers: dict[Target, tuple[Follower, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        """Have been cancelled. Never again: the first time they wait for the thread that writes, and then let go."""
        self._started_at = clock.now()
        self._ticked = time.monotonic()
        metrics.watch(self.views)

    def views(self) -> list[Any]:
        """How each target is now. Any thread may ask, while targets come and go."""
        return [follower.view for follower, _ in list(self._followers.values())]

    @property
    def stalled_seconds(self) -> float:
        """For how long nothing at all has moved: more than a few ticks, and the process does not do its work."""
        return max(0.0, time.monotonic() - self._ticked - TICK)

    def status(self) -> dict[str, Any]:
        """The status document, see schema/manager_status.schema.json."""
        return {
            "schemaVersion": "v1",
            "updatedAt": clock.now(),
            "pid": os.getpid(),
            "startedAt": self._started_at,
            "targets": [view.row() for view in self.views()],
        }

    async def supervise(self, targets: Iterable[Target]) -> None:
        """Supervises these from now on: those that are new or changed begin, those that are gone end."""
        wanted = dict.fromkeys(targets)
        gone = [target for target in self._followers if target not in wanted]
        await self._end(gone)
        for target in wanted:
            if target in self._followers:
                continue
            follower = Follower(
                target,
                settings=self._settings,
                catch_ups=self._catch_ups,
                passes=self._passes,
                metrics=self._metrics,
            )
            self._followers[target] = follower, asyncio.create_task(follower.run(), name=f"follow {target.name}")
            await asyncio.sleep(_START_SPREAD)

    async def run(self) -> None:
        """Keeps the status file current until cancelled; then ends the supervision of all."""
        try:
            while True:
                self._ticked = time.monotonic()
                await asyncio.to_thread(self._look)
                await asyncio.sleep(TICK)
        finally:
            await self._end(list(self._followers))
            with contextlib.suppress(OSError):  # where it can't be written it can't be left behind either
                self._settings.status_file.unlink()

    def _look(self) -> None:
        for follower, _ in list(self._followers.values()):
            try:
                follower.look_for_intents()
            except Exception:  # noqa: BLE001  # a bug met in one target must not end the supervision of the others
                _log.exception("a bug", target=follower.view.target.name)
        status = self.status()
        try:
            validate("manager_status", status)
            files.save(self._settings.status_file, status)
        except OpsError as error:
            _log.warning("the status file can't be written", error=error.message)

    async def _end(self, targets: Iterable[Target]) -> None:
        """Ends these, and returns once all have ended that were ever told to, by a call that was cancelled too."""
        for target in targets:
            follower, task = self._followers.pop(target)
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            self._metrics.forget(follower.view.target.name)
        if self._ending:
            await asyncio.wait(self._ending)  # gather would hand a cancellation on
