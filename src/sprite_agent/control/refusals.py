"""Notes refusals in the audit, but no more of them than an attacker may make the disk work for."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sprite_agent.errors import JournalCorrupt, JournalUnavailable, Refused
from sprite_agent.quota import Quota

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.callers import Caller
    from sprite_agent.contract.envelopes import ControlRequest
    from sprite_agent.control.journal import Journal


class RefusalNotes:
    """The refusals of one engine. Lives as long as it; any thread may call."""

    def __init__(self, quota: Quota | None = None) -> None:
        self._quota = quota or Quota()

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
        """Notes one refusal, unless there were too many; a journal that can't be written changes no answer.

        How many were left out stands in the next one that is not.
        """
        left_out = self._quota.take()
        if left_out is not None:
            with contextlib.suppress(JournalCorrupt, JournalUnavailable):
                journal().note("refused", {**facts, **({"leftOutBefore": left_out} if left_out else {})})
