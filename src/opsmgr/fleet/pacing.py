"""When a target that could not be read is tried again, and on which rung of the ladder. Pure but for its jitter."""

from __future__ import annotations

from dataclasses import dataclass, field

from opsmgr.transport.retry import RetryPolicy

_AWAKE = RetryPolicy(base=0.2, cap=10.0)
_ASLEEP = RetryPolicy(base=1.0, cap=60.0)
"""Trying may wake a Sprite, and a Sprite that is awake costs."""


@dataclass(kw_only=True, slots=True)
class Pacing:
    """The tries at one target since it was reached last. Times in seconds, by the monotonic clock."""

    poll_seconds: float
    failures: int = 0
    _since: float | None = field(default=None)
    _polled: float | None = field(default=None)

    def reached(self) -> None:
        """It streams, for long enough to be of use: everything begins anew."""
        self.failures = 0
        self._since = self._polled = None

    def lost(self, now: float) -> None:
        """It could not be streamed."""
        self.failures += 1
        if self._since is None:
            self._since = now

    def polled(self, now: float) -> None:
        """It was read, or tried to be, on a lower rung."""
        self._polled = now

    def is_poll_due(self, now: float, *, answers: bool) -> bool:
        """Whether to go down the ladder for once: when it has been lost for a while, at once where it answers."""
        last = self._polled if self._polled is not None else None if answers else self._since
        return last is None or now - last >= self.poll_seconds

    def wait(self, asked: float | None, *, asleep: bool) -> float:
        """Seconds until the next try; what the agent asked for, where it did, is the least."""
        return (_ASLEEP if asleep else _AWAKE).backoff(max(1, self.failures), asked)
