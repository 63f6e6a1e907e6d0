"""Notes refusals in the audit, but no more of them than an attacker may make the disk work for."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sprite_agent.errors import JournalCorrupt, JournalUnavailable, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.callers import Caller
    from sprite_agent.contract.envelopes import ControlRequest
    from sprite_agent.control.journal import Journal

PER_MINUTE = 100
"""Notes; how many more there were stands in the first one of the next minute."""


class RefusalNotes:
    """The refusals of one engine. Lives as long as it; any thread may call."""

    def __init__(self) -> None:
        # Guards the count of this minute.
        self._lock = threading.Lock()
        self._minute = 0
        self._noted = 0
        self._left_out = 0

    @contextlib.contextmanager
    def noted(self, request: ControlRequest, caller: Caller, journal: Callable[[], Journal]) -> Iterator[None]:
        """Notes the refusal that the block ends with, if it does."""
        try:
            yield
        except (JournalCorrupt, JournalUnavailable):
            raise  # there is nowhere to note it
        except Refused as refusal:
            names = ("loopId", "idempotencyKey", "intent", "requestedBy")
            facts = {name: request[name] for name in names}  # type: ignore[literal-required]  # four of its keys
            self.note(journal, {"reason": refusal.reason, **facts, "caller": asdict(caller)})
            raise

    def note(self, journal: Callable[[], Journal], facts: dict[str, Any]) -> None:
        """Notes one refusal, unless there were too many; a journal that can't be written changes no answer."""
        left_out = self._take_turn()
        if left_out is not None:
            with contextlib.suppress(JournalCorrupt, JournalUnavailable):
                journal().note("refused", {**facts, **({"leftOutBefore": left_out} if left_out else {})})

    def _take_turn(self) -> int | None:
        """How many were left out before; None: this one is left out too."""
        with self._lock:
            minute = int(time.monotonic() // 60)
            if minute != self._minute:
                self._minute, self._noted = minute, 0
            if self._noted >= PER_MINUTE:
                self._left_out += 1
                return None
            self._noted += 1
            left_out, self._left_out = self._left_out, 0
            return left_out
