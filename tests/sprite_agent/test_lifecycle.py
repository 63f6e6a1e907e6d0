"""The lifecycle status is a truth table over the artifacts, and the first match wins."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sprite_agent.contract.events import event_name
from sprite_agent.lifecycle import run_status

Json = dict[str, Any]

HOLDS: dict[str, Json] = {
    "awaiting_approval": {"approval": {"status": "pending"}},
    "complete": {"summary": {"completion_ok": True}},
    "running": {"state": {"active": True, "current_loop_id": "demo"}},
    "stopped": {"last_event": {"event": "loop_stop"}},
    "failed": {"last_event": {"status": "error"}},
    "idle": {"state": {"active": False}, "summary": {}},
    "unknown": {},
}
"""What makes each status hold, in the order of precedence."""

PAIRS = [pair for pair in itertools.combinations(HOLDS, 2) if pair != ("running", "idle")]
"""A state is active or not: running and idle never hold together."""


def status(**artifacts: Json) -> str:
    """The status of loop demo; what is not given is not there."""
    none: dict[str, Any] = {"approval": None, "summary": None, "state": None, "last_event": None}
    return run_status("demo", **{**none, **artifacts})


@pytest.mark.parametrize("name", HOLDS)
def test_a_status_holds_where_its_row_does(name: str) -> None:
    assert status(**HOLDS[name]) == name


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_first_of_two_statuses_that_hold_wins(first: str, second: str) -> None:
    both = {
        name: {**HOLDS[second].get(name, {}), **HOLDS[first].get(name, {})} for name in HOLDS[first] | HOLDS[second]
    }

    assert status(**both) == first


@pytest.mark.parametrize("decision", ["approved", "rejected", "PENDING", "", None, True, ["pending"]])
def test_only_a_pending_approval_awaits_one(decision: Any) -> None:
    assert status(approval={"status": decision}) == "unknown"


@pytest.mark.parametrize("completion", [False, None, 1, "true", {}])
def test_only_completion_ok_true_is_complete(completion: Any) -> None:
    assert status(summary={"completion_ok": completion}) == "unknown"


@pytest.mark.parametrize(
    "state",
    [
        {"active": True, "current_loop_id": "other"},
        {"active": True, "current_loop_id": None},
        {"active": True},
        {"active": 1, "current_loop_id": "demo"},
        {"active": "true", "current_loop_id": "demo"},
        {"active": False, "current_loop_id": "demo"},
        {"current_loop_id": "demo"},
    ],
)
def test_only_an_active_state_with_this_loop_is_running(state: Json) -> None:
    assert status(state=state) == "unknown"


@pytest.mark.parametrize("name", ["loop_stop", "rate_limit_stop", "no_progress_stop"])
@pytest.mark.parametrize("key", ["event", "type"])
def test_each_stop_event_last_in_the_log_means_stopped(key: str, name: str) -> None:
    assert status(last_event={key: name}) == "stopped"


@pytest.mark.parametrize("event_status", ["error", "timeout", "blocked", "rate_limited"])
def test_each_failure_status_last_in_the_log_means_failed(event_status: str) -> None:
    assert status(last_event={"event": "role_end", "status": event_status}) == "failed"


@pytest.mark.parametrize(
    "event",
    [
        {"event": "loop_complete"},
        {"event": "role_end", "status": "ok"},
        {"event": "role_end", "status": ["error"]},
        {"event": ["loop_stop"]},
        {"event": {"name": "loop_stop"}},
        {"message": "error"},
        {},
    ],
)
def test_any_other_last_event_means_neither_stopped_nor_failed(event: Json) -> None:
    assert status(last_event=event) == "unknown"


@pytest.mark.parametrize("state", [{"active": False}, {"active": None}, {}, {"active": False, "current_loop_id": "x"}])
def test_a_state_that_is_not_active_and_a_summary_entry_are_idle(state: Json) -> None:
    assert status(state=state, summary={"completion_ok": False}) == "idle"


def test_a_state_that_is_not_active_without_a_summary_entry_is_not_idle() -> None:
    assert status(state={"active": False}) == "unknown"


def test_a_summary_entry_without_a_state_is_not_idle() -> None:
    assert status(summary={}) == "unknown"


@pytest.mark.parametrize("active", ["false", "", 0, 0.0, [], {}, 1])
def test_an_active_that_is_neither_false_nor_absent_is_not_idle(active: Any) -> None:
    assert status(state={"active": active}, summary={}) == "unknown"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ({"event": "loop_start"}, "loop_start"),
        ({"type": "loop_start"}, "loop_start"),
        ({"event": "loop_start", "type": "other"}, "loop_start"),
        ({"event": None, "type": "loop_start"}, "loop_start"),
        ({"event": "", "type": "loop_start"}, ""),
        ({}, None),
        (None, None),
    ],
)
def test_the_name_of_an_event_is_its_event_else_its_type(line: Json | None, name: str | None) -> None:
    assert event_name(line) == name
