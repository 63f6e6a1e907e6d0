"""Remembers which signatures were used, each until it would no longer be taken anyway."""

from __future__ import annotations

import heapq
import threading
import time
from typing import TYPE_CHECKING

from sprite_agent.errors import ReplayCacheFull, SignatureReplayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sprite_agent.callers import Proof

CAPACITY = 100_000
"""Signatures that are remembered at a time: 1,600 a second, each of which may be used within a minute."""


class Replays:
    """The signatures that one agent has taken. Lives as long as its server; any thread may call.

    Nothing is forgotten before its time: with no room left the next one is refused. A clock
    that was set back makes no old signature new: what may have been forgotten is refused too.
    """

    def __init__(self, *, capacity: int = CAPACITY, now: Callable[[], float] = time.time) -> None:
        """`now`: Unix time, by the clock that the signatures are checked by."""
        self._capacity = capacity
        self._now = now
        # Guards what follows; held for looking up and noting only.
        self._lock = threading.Lock()
        self._used: set[tuple[str, str]] = set()
        self._ends: list[tuple[float, tuple[str, str]]] = []
        """A heap: what ends first is first."""
        self._forgotten = float("-inf")
        """The latest end of those that were forgotten."""

    def prime(self, used: Iterable[tuple[str, str, float]]) -> None:
        """Notes signatures that were used before this agent started: (key id, nonce, Unix time of its end)."""
        with self._lock:
            for key_id, nonce, ends in used:
                self._note((key_id, nonce), ends)

    def take(self, proof: Proof) -> None:
        """Notes that a signature is used; the last of its checks.

        Raises:
            SignatureReplayed: it was used before, or may have been.
            ReplayCacheFull: there is no room to remember it.
        """
        name = (proof.key_id, proof.nonce)
        with self._lock:
            self._forget()
            if name in self._used or proof.expires <= self._forgotten:
                raise SignatureReplayed(
                    "the signature was used before; sign each attempt anew", details={"keyId": proof.key_id}
                )
            if len(self._used) >= self._capacity:
                wait = max(0.0, self._ends[0][0] - self._now())
                raise ReplayCacheFull(
                    f"{self._capacity} signatures were used of late, as many as can be remembered; the first is"
                    f" forgotten in {wait:.0f} s",
                    details={"capacity": self._capacity},
                )
            self._note(name, proof.expires)

    def _note(self, name: tuple[str, str], ends: float) -> None:
        if name not in self._used:
            self._used.add(name)
            heapq.heappush(self._ends, (ends, name))

    def _forget(self) -> None:
        now = self._now()
        while self._ends and self._ends[0][0] < now:
            ends, name = heapq.heappop(self._ends)
            self._used.discard(name)
            self._forgotten = max(self._forgotten, ends)
