"""Tells when a stream has been silent for too long: not what its reader takes for a message, only waiting counts."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType


class Silence:
    """Raises TimeoutError from a block in which a call has brought nothing for too long, and cancels the call.

    One timer for all of a stream's messages: `asyncio.timeout` around each took a fifth of what a follower does.
    Close it at the end.
    """

    def __init__(self, call: Any, most: float) -> None:
        """`most`: seconds, of each time that somebody reads."""
        self.most = most
        self._call = call
        self._since = math.inf
        self._is_over = False
        self._timer = asyncio.get_running_loop().call_later(most, self._check)

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._since = math.inf
        if self._is_over and kind is asyncio.CancelledError and not is_cancelled():
            raise TimeoutError from error

    def close(self) -> None:
        """Watches no more."""
        self._timer.cancel()

    def _check(self) -> None:
        left = min(self._since + self.most - time.monotonic(), self.most)
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._check)
        else:
            self._is_over = True
            self._call.cancel()


def is_cancelled() -> bool:
    """Whether somebody wants this task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
