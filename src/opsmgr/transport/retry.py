"""When and how often a request is tried again: bounded attempts, a budget, full jitter."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from opsmgr.errors import in_doubt
from sprite_agent.errors import OpsError, SignatureReplayed, SignatureStale

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from opsmgr.transport.base import Attempts

_T = TypeVar("_T")

_MOST_DOUBLINGS = 30
"""Far beyond any cap; more would not fit a float in the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How much trying again may cost. Times in seconds."""

    attempts: int = 6
    budget: float = 60.0
    """From the first attempt to the last one's start."""
    base: float = 0.2
    cap: float = 10.0

    def backoff(self, failures: int, asked: float | None) -> float:
        """The wait after so many failures in a row; what the agent asked for, where it did, is the least."""
        jittered = random.uniform(0, min(self.cap, self.base * 2 ** min(failures - 1, _MOST_DOUBLINGS)))  # noqa: S311  # spreads load
        return jittered if asked is None else max(asked, jittered)


@dataclass(kw_only=True, slots=True)
class Retries:
    """The tries at one thing. `progress` begins them anew: a budget is for one interruption."""

    policy: RetryPolicy
    attempts: Attempts
    _failures: int = 0
    _signed_anew: bool = False
    _unknown: bool = False
    """What became of one of the tries is not known."""
    _since: float = field(default_factory=time.monotonic)

    def progress(self) -> None:
        """Something was achieved."""
        self._failures = 0
        self._signed_anew = False
        self._unknown = False
        self._since = time.monotonic()

    def wait_after(self, error: OpsError) -> float:
        """Seconds to wait before the next try.

        A signature that came too late, or twice, is made anew at once, and once: it is the clocks' fault otherwise.

        Raises:
            OpsError: `error`, when it is not retryable or there is to be no further try; `in_doubt`, where an earlier
                one may have run something.
        """
        self._failures += 1
        error.attempts = self._failures
        if self._unknown:
            error = in_doubt(error)
        self._unknown = error.executed is None
        if isinstance(error, SignatureStale | SignatureReplayed) and not self._signed_anew:
            self._signed_anew, wait = True, 0.0
        elif error.retryable:
            wait = self.policy.backoff(self._failures, error.retry_after)
        else:
            raise error
        spent = time.monotonic() - self._since
        if self._failures >= self.policy.attempts or spent + wait > self.policy.budget:
            raise error
        self.attempts.failed(error.reason, wait=wait)
        return wait


async def retried(call: Callable[[], Awaitable[_T]], retries: Retries) -> _T:
    """The answer of `call`, tried again while that makes sense.

    Raises:
        OpsError: of the last try.
    """
    while True:
        try:
            return await call()
        except OpsError as error:
            wait = retries.wait_after(error)
        await asyncio.sleep(wait)
