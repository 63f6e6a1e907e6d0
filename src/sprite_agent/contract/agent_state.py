"""What an agent says beside the envelopes: how far its journal has got, and what an operator should look into."""

from __future__ import annotations

from typing import NamedTuple


class JournalHead(NamedTuple):
    """How far a journal has got. It only ever goes forward, unless the agent's disk was rolled back."""

    id: str
    """Of the journal: a new one has a new id."""
    sequence: int
    """Of the last audit entry."""
    head: str
    """Its hash, which covers all before it: SHA-256, lower-case hex."""


class Finding(NamedTuple):
    """Something an operator should look into, which no envelope says."""

    reason: str
    message: str


APPROVAL_UNATTRIBUTED = "APPROVAL_UNATTRIBUTED"
"""An approval request was decided, and not through this agent: sandbox code can do that itself."""
