"""Whose an approval decision is: one without our mark, or with a mark of something else, was not made through us."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprite_agent.contract.agent_state import APPROVAL_UNATTRIBUTED, Finding
from sprite_agent.contract.json_text import member
from sprite_agent.control.evidence import baseline_from, decided_by, subject_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprite_agent.control.journal_rows import Entry

_INTENTS = {"approved": "approve", "rejected": "reject"}


def find_unattributed(loop_id: str, approval: Any, find_execution: Callable[[str], Entry | None]) -> Finding | None:
    """The finding that an approval request was decided by somebody else; None: it was not.

    Args:
        loop_id: the loop.
        approval: content of its approval.json.
        find_execution: the journal's row of an execution, by the id that a mark ends with.
    """
    status = member(approval, "status")
    if not isinstance(status, str) or status not in _INTENTS:
        return None
    by = decided_by(approval)
    entry = find_execution(by.rpartition("#")[2]) if by else None
    if entry is not None and entry.mark == by and _decided_this(entry, loop_id, _INTENTS[status], approval):
        return None
    # Which request: a manager tells a finding that it knows from a new one by what is said.
    which = (subject_of(approval) or "")[:12]
    message = f"approval request {which} of loop {loop_id} was {status} by {by!r}, and not through this agent"
    return Finding(APPROVAL_UNATTRIBUTED, message)


def _decided_this(entry: Entry, loop_id: str, intent: str, approval: Any) -> bool:
    """Whether a row's command was to decide this very request in this way; a row without a command decided nothing."""
    result = entry.result
    asked = result["loopId"] == loop_id and result["intent"] == intent and bool(result["command"])
    return asked and baseline_from(entry.origin.baseline).evidence.subject == subject_of(approval)
