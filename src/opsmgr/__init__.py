"""The manager outside the Sprite: sees, follows and controls Superloop runs. docs/library.md shows how to use it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sprite_agent import __version__

if TYPE_CHECKING:
    from opsmgr.client import Client, connect
    from opsmgr.cursors import Position
    from opsmgr.errors import AgentStateRolledBack, InputInvalid, LoopLocked, NoAnswer, NotReached, TransportRefused
    from opsmgr.event_stream import EventStream
    from opsmgr.intents.control import new_key
    from opsmgr.targets import Target
    from opsmgr.transport.base import AgentInfo, Snapshot
    from opsmgr.transport.retry import RetryPolicy
    from sprite_agent.contract.agent_state import Finding
    from sprite_agent.contract.envelopes import (
        ConfirmationRecord,
        ControlEffect,
        ControlResult,
        ControlStatus,
        EventEnvelope,
        Intent,
        RunStatus,
        SnapshotEnvelope,
    )
    from sprite_agent.contract.streaming import SkippedRecord
    from sprite_agent.errors import (
        ControlNotFound,
        EventMalformed,
        IdempotencyKeyReused,
        LimitReached,
        LoopNotFound,
        NotAuthenticated,
        NotFound,
        NotNow,
        OpsError,
        PositionLost,
        PreconditionRefused,
        Refused,
        RequestRefused,
        ScopeMissing,
    )

_HOMES = {
    "opsmgr.client": ("Client", "connect"),
    "opsmgr.intents.control": ("new_key",),
    "opsmgr.cursors": ("Position",),
    "opsmgr.errors": (
        "AgentStateRolledBack",
        "InputInvalid",
        "LoopLocked",
        "NoAnswer",
        "NotReached",
        "TransportRefused",
    ),
    "opsmgr.event_stream": ("EventStream",),
    "opsmgr.targets": ("Target",),
    "opsmgr.transport.base": ("AgentInfo", "Snapshot"),
    "opsmgr.transport.retry": ("RetryPolicy",),
    "sprite_agent.contract.agent_state": ("Finding",),
    "sprite_agent.contract.envelopes": (
        "ConfirmationRecord",
        "ControlEffect",
        "ControlResult",
        "ControlStatus",
        "EventEnvelope",
        "Intent",
        "RunStatus",
        "SnapshotEnvelope",
    ),
    "sprite_agent.contract.streaming": ("SkippedRecord",),
    "sprite_agent.errors": (
        "ControlNotFound",
        "EventMalformed",
        "IdempotencyKeyReused",
        "LimitReached",
        "LoopNotFound",
        "NotAuthenticated",
        "NotFound",
        "NotNow",
        "OpsError",
        "PositionLost",
        "PreconditionRefused",
        "Refused",
        "RequestRefused",
        "ScopeMissing",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # what a test holds against the above
    "AgentInfo",
    "AgentStateRolledBack",
    "Client",
    "ConfirmationRecord",
    "ControlEffect",
    "ControlNotFound",
    "ControlResult",
    "ControlStatus",
    "EventEnvelope",
    "EventMalformed",
    "EventStream",
    "Finding",
    "IdempotencyKeyReused",
    "InputInvalid",
    "Intent",
    "LimitReached",
    "LoopLocked",
    "LoopNotFound",
    "NoAnswer",
    "NotAuthenticated",
    "NotFound",
    "NotNow",
    "NotReached",
    "OpsError",
    "Position",
    "PositionLost",
    "PreconditionRefused",
    "Refused",
    "RequestRefused",
    "RetryPolicy",
    "RunStatus",
    "ScopeMissing",
    "SkippedRecord",
    "Snapshot",
    "SnapshotEnvelope",
    "Target",
    "TransportRefused",
    "__version__",
    "connect",
    "new_key",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, no sooner: the command line's --help must not wait for gRPC."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
