"""The lifecycle status of a run, from its artifacts: a truth table, first match wins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprite_agent.contract.events import event_name
from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import Json, RunStatus

_STOP_EVENTS = ("loop_stop", "rate_limit_stop", "no_progress_stop")
_FAILURES = ("error", "timeout", "blocked", "rate_limited")


def run_status(
    loop_id: str, *, approval: Json | None, summary: Json | None, state: Json | None, last_event: dict[str, Any] | None
) -> RunStatus:
    """The status of the loop's latest run.

    Args:
        loop_id: the loop.
        approval: content of approval.json.
        summary: latest summary entry.
        state: content of state.json.
        last_event: last record of the log.
    """
    table: tuple[tuple[RunStatus, bool], ...] = (
        ("awaiting_approval", member(approval, "status") == "pending"),
        ("complete", member(summary, "completion_ok") is True),
        ("running", member(state, "active") is True and member(state, "current_loop_id") == loop_id),
        ("stopped", event_name(last_event) in _STOP_EVENTS),
        ("failed", member(last_event, "status") in _FAILURES),
        ("idle", state is not None and _is_absent_or_false(state.get("active")) and summary is not None),
    )
    return next((status for status, holds in table if holds), "unknown")


def _is_absent_or_false(value: Any) -> bool:
    return value is None or value is False
