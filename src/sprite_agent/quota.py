"""A quota of so many things a minute: for what others can cause, and the disk has to pay for."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PER_MINUTE = 100


class Quota:
    """Counts one kind of thing. Lives as long as who does it; any thread may call."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # Guards what follows; held for the counting only.
        self._lock = threading.Lock()
        self._minute = -1
        self._done = 0
        self._left_out = 0

    def take(self) -> int | None:
        """How many were left out since the last one that was not; None: this one is to be left out too."""
        with self._lock:
            minute = int(self._now() // 60)
            if minute != self._minute:
                self._minute, self._done = minute, 0
            if self._done >= PER_MINUTE:
                self._left_out += 1
                return None
            self._done += 1
            left_out, self._left_out = self._left_out, 0
            return left_out
