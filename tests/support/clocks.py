"""The clock of an event loop, which goes as fast as a test wants it to."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


class LoopClock:
    """The running event loop's clock. It goes on by itself, and what is due in an hour is due when it was set forward.

    Lives as long as the `monkeypatch` that it was given. What a test waits for is to be far
    beyond what a machine may stand still for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", self.now)

    def now(self) -> float:
        """Seconds, as `time.monotonic` counts them."""
        return time.monotonic() + self._ahead

    async def forward(self, seconds: float) -> None:
        """Returns when so many seconds have passed, and what was due has had its turn."""
        self._ahead += seconds
        for _ in range(3):
            await asyncio.sleep(0)
