"""What one caller may have of the agent: so many streams, and so many control calls a second.

Only calls of known callers are counted, so that strangers, half-open connections
included, use up nobody's share.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from sprite_agent.errors import RateLimited, StreamLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_STREAMS = 64
"""A manager follows each loop of the repo by a stream of its own, and an agent serves all the loops of its repo."""
CONTROL_RATE = 50
"""Control calls a second that a caller may go on making."""
BURST = 4
"""So many seconds' worth of them may come at once."""
STREAM_RETRY = 2.0
"""Seconds: streams of a manager that was restarted are found dead by then, or soon after."""
_SECOND = 10**9
_KEPT = 1_000
"""Callers whose last control calls are remembered before those that are long past are forgotten."""


class CallerLimits:
    """Counts by caller. One for a server; its life is the server's."""

    def __init__(
        self,
        *,
        max_streams: int = MAX_STREAMS,
        control_rate: int = CONTROL_RATE,
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.max_streams = max_streams
        self.control_rate = control_rate
        self._each = _SECOND // control_rate
        self._now = now
        # Guards both tables: control is counted in threads, streams in the event loop. Held for the counting only.
        self._lock = threading.Lock()
        self._streams: Counter[tuple[str, bool]] = Counter()
        self._used_up: dict[str, int] = {}
        """By caller: when the calls it has made would be over, had they come one by one at the rate (ns)."""

    @contextlib.contextmanager
    def stream(self, caller: str, *, follow: bool) -> Iterator[None]:
        """Counts a stream of the caller's for as long as the block lasts; those that follow apart from those that end.

        A manager that may follow no further loop can still read it now and then.

        Raises:
            StreamLimit: it has as many as it may have.
        """
        with self._lock:
            if self._streams[caller, follow] >= self.max_streams:
                raise StreamLimit(
                    f"{caller} has {self.max_streams} streams open, as many as a caller may have; end one first",
                    details={"caller": caller, "limit": self.max_streams},
                    retry_after=STREAM_RETRY,
                )
            self._streams[caller, follow] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[caller, follow] -= 1
                if not self._streams[caller, follow]:
                    del self._streams[caller, follow]

    def count_control(self, caller: str) -> None:
        """Counts a control call of the caller's.

        Raises:
            RateLimited: it makes them faster than it may.
        """
        with self._lock:
            now = self._now()
            if len(self._used_up) >= _KEPT:
                self._used_up = {name: until for name, until in self._used_up.items() if until > now}
            until = max(now, self._used_up.get(caller, now)) + self._each
            wait = until - now - BURST * _SECOND
            if wait > 0:
                raise RateLimited(
                    f"{caller} makes more than {self.control_rate} control calls a second",
                    details={"caller": caller, "perSecond": self.control_rate},
                    retry_after=wait / _SECOND,
                )
            self._used_up[caller] = until
