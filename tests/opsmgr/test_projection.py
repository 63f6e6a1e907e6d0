"""The projection says what contract.md section 5 says of a snapshot, events and a previous state; or it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from conformance import documents
from opsmgr.errors import InputInvalid
from opsmgr.passes.projection import project
from sprite_agent.contract.validation import validate

LOOP = "loop"
WORKING = [
    "iteration_start",
    "role_start",
    "role_end",
    "iteration_end",
    "tests_start",
    "tests_end",
    "validation_start",
    "validation_end",
]
ACTIVE = {"active": True, "current_loop_id": LOOP}

Json = dict[str, Any]


def changed(document: Json, changes: Json) -> Json:
    """A copy with other values at some paths, given as run.status."""
    result = copy.deepcopy(document)
    for path, value in changes.items():
        *parents, name = path.split(".")
        place = result
        for parent in parents:
            place = place[parent]
        place[name] = value
    return result


def snapshot(changes: Json | None = None) -> Any:
    """A snapshot at line 9 of a loop that is at work; some of its members changed."""
    running = {"runtime.superloopState": ACTIVE, "cursor": {"eventLineOffset": 9, "eventLineCount": 9}}
    return changed(documents.SNAPSHOT, running | (changes or {}))


def event(name: str = "usage_check", changes: Json | None = None) -> Any:
    return changed(documents.EVENT, {"event.name": name} | (changes or {}))


def projected(found: Any, *events: Any, previous: Any = None) -> Json:
    """The projection of valid input: whatever it is, it keeps its schema."""
    state = project(LOOP, found, events, previous)
    validate("manager_state", state)
    return state


# What is taken over.


def test_run_source_and_cursor_are_the_snapshots() -> None:
    state = projected(
        snapshot({"run.runId": "run-7", "run.iteration": 3, "source.repoPath": "/srv/repo"}),
        event(changes={"run": {"runId": "another", "iteration": 9}, "cursor.eventLineOffset": 4}),
    )

    assert state["schemaVersion"] == "v1"
    assert state["run"] == {"runId": "run-7", "iteration": 3}
    assert state["source"] == {"repoPath": "/srv/repo", "loopId": LOOP}
    assert state["cursor"] == {"eventLineOffset": 9, "eventLineCount": 9}


def test_the_projection_shows_the_snapshots_health() -> None:
    gates = dict.fromkeys(("tests", "validation", "prerequisites", "checklist", "evidence", "approval"), "ok")
    health = {
        "eventCount": 9,
        "lastEventAt": "yesterday",
        "lastEventName": "loop_stop",
        "lastSummaryAt": None,
        "hasPendingApproval": True,
        "gates": gates,
        "stuck": {"streak": 2, "threshold": 3},
    }

    state = projected(snapshot({"run.status": "awaiting_approval", "health": health, "run.summary": None}))

    assert state["projection"] == {
        "status": "awaiting_approval",
        "hasPendingApproval": True,
        "completionOk": False,
        "gates": gates,
        "stuck": {"streak": 2, "threshold": 3},
        "active": True,
        "lastEventName": "loop_stop",
        "lastEventAt": "yesterday",
    }
    assert state["evidence"]["snapshotEnvelope"] == {
        "runStatus": "awaiting_approval",
        "lastEventName": "loop_stop",
        "hasPendingApproval": True,
    }


def test_gates_and_stuck_that_are_null_stay_null() -> None:
    state = projected(snapshot({"health.gates": None, "health.stuck": None}))

    assert state["projection"]["gates"] is None
    assert state["projection"]["stuck"] is None


def test_the_last_event_of_the_poll_is_the_evidence_whole() -> None:
    last = event("loop_stop", {"cursor.eventLineOffset": 9, "event.payload": {"why": 2**64}})

    assert projected(snapshot(), event("loop_start"), last)["evidence"]["lastEventEnvelope"] == last


def test_without_an_event_there_is_no_event_as_evidence() -> None:
    assert projected(snapshot())["evidence"]["lastEventEnvelope"] is None


@pytest.mark.parametrize(
    ("state", "active"),
    [
        ({"active": True}, True),
        ({"active": True, "current_loop_id": "another"}, True),
        ({"active": False}, None),
        ({}, None),
        ({"active": None}, None),
        ({"active": "true"}, None),
        ({"active": 1}, None),
        (None, None),
    ],
)
def test_active_is_true_or_null_and_never_false(state: Json | None, *, active: bool | None) -> None:
    assert projected(snapshot({"runtime.superloopState": state}))["projection"]["active"] is active


@pytest.mark.parametrize(
    ("summary", "completion_ok"),
    [
        ({"completion_ok": True}, True),
        ({"completion_ok": False}, False),
        ({}, False),
        ({"completion_ok": None}, False),
        ({"completion_ok": "true"}, False),
        ({"completion_ok": 1}, False),
        (None, False),
    ],
)
def test_completion_ok_is_the_summarys_true_or_else_false(summary: Json | None, *, completion_ok: bool) -> None:
    assert projected(snapshot({"run.summary": summary}))["projection"]["completionOk"] is completion_ok


# The transition.


@pytest.mark.parametrize("status", ["awaiting_approval", "complete", "running", "stopped", "failed", "idle", "unknown"])
def test_the_current_state_is_the_snapshots_status(status: str) -> None:
    state = projected(snapshot({"run.status": status}))

    assert state["transition"]["currentState"] == status
    assert state["projection"]["status"] == status


def test_the_last_event_of_the_poll_triggers_the_transition() -> None:
    state = projected(snapshot({"health.lastEventName": "another"}), event("loop_start"), event("loop_stop"))

    assert state["transition"]["triggeringSignal"] == "event:loop_stop"


def test_without_an_event_the_snapshots_status_triggers_the_transition() -> None:
    state = projected(snapshot({"run.status": "idle", "health.lastEventName": "loop_stop"}))

    assert state["transition"]["triggeringSignal"] == "snapshot_status:idle"


def test_the_previous_state_is_the_one_the_last_projection_ended_in() -> None:
    first = projected(snapshot({"run.status": "running"}))
    second = projected(snapshot({"run.status": "stopped"}), previous=first)
    third = projected(snapshot({"run.status": "idle"}), previous=second)

    assert [state["transition"]["previousState"] for state in (first, second, third)] == ["none", "running", "stopped"]


@pytest.mark.parametrize(
    "previous",
    [
        None,
        {},
        {"transition": None},
        {"transition": {}},
        {"transition": {"currentState": None}},
        {"cursor": {"eventLineOffset": 3}},
    ],
)
def test_a_previous_state_that_lacks_its_transition_counts_as_none(previous: Json | None) -> None:
    assert projected(snapshot(), previous=previous)["transition"]["previousState"] == "none"


@pytest.mark.parametrize(
    "previous",
    [
        {"transition": "running"},
        {"transition": ["running"]},
        {"transition": {"currentState": 5}},
        {"transition": {"currentState": {"status": "running"}}},
        {"cursor": 9},
        {"cursor": "9"},
        {"cursor": {"eventLineOffset": "9"}},
        {"cursor": {"eventLineOffset": 9.5}},
        {"cursor": {"eventLineOffset": True}},
    ],
)
def test_a_previous_state_of_another_shape_is_refused_or_taken_as_absent(previous: Json) -> None:
    try:
        state = project(LOOP, snapshot(), [], previous)
    except InputInvalid:
        return
    validate("manager_state", state)
    assert state["transition"]["previousState"] == "none"
    assert state["divergence"]["any"] is False


# Confidence.


def test_confidence_is_high_when_the_poll_brought_an_event() -> None:
    assert projected(snapshot(), event("usage_check"))["transition"]["confidence"] == "high"


def test_confidence_is_medium_when_the_poll_brought_no_event() -> None:
    assert projected(snapshot())["transition"]["confidence"] == "medium"


@pytest.mark.parametrize("events", [[], [event("usage_check")]])
def test_confidence_is_low_with_any_divergence_whether_or_not_there_was_an_event(events: list[Any]) -> None:
    state = projected(snapshot(), *events, previous={"cursor": {"eventLineOffset": 10}})

    assert state["divergence"]["any"] is True
    assert state["transition"]["confidence"] == "low"


# Divergence.


def flags(state: Json) -> set[str]:
    """The flags that are set; the summary of them agrees."""
    found = {name for name, value in state["divergence"]["flags"].items() if value}
    assert state["divergence"]["any"] is bool(found)
    assert state["divergence"]["flags"].keys() == {
        "activeMismatch",
        "approvalCompletionConflict",
        "cursorRegression",
    }
    return found


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("state", [None, {}, {"active": False}, {"active": "true"}])
def test_a_working_event_while_the_runtime_is_not_active_is_a_mismatch(name: str, state: Json | None) -> None:
    assert flags(projected(snapshot({"runtime.superloopState": state}), event(name))) == {"activeMismatch"}


@pytest.mark.parametrize("name", WORKING)
def test_a_working_event_while_the_runtime_is_active_is_no_mismatch(name: str) -> None:
    assert flags(projected(snapshot(), event(name))) == set()


@pytest.mark.parametrize(
    "name", ["loop_start", "loop_stop", "gates_evaluated", "approval_requested", "ROLE_START", "x"]
)
def test_another_event_while_the_runtime_is_not_active_is_no_mismatch(name: str) -> None:
    assert flags(projected(snapshot({"runtime.superloopState": None}), event(name))) == set()


def test_only_the_last_event_of_the_poll_makes_a_mismatch() -> None:
    found = snapshot({"runtime.superloopState": None})

    assert flags(projected(found, event("role_start"), event("loop_stop"))) == set()
    assert flags(projected(found, event("loop_stop"), event("role_start"))) == {"activeMismatch"}


def test_a_working_event_that_is_only_in_the_snapshot_makes_no_mismatch() -> None:
    found = snapshot({"runtime.superloopState": None, "health.lastEventName": "role_start"})

    assert flags(projected(found)) == set()


@pytest.mark.parametrize(
    ("pending", "summary", "expected"),
    [
        (True, {"completion_ok": True}, {"approvalCompletionConflict"}),
        (False, {"completion_ok": True}, set()),
        (True, {"completion_ok": False}, set()),
        (True, None, set()),
    ],
)
def test_an_approval_pending_while_the_completion_is_ok_is_a_conflict(
    summary: Json | None, expected: set[str], *, pending: bool
) -> None:
    assert flags(projected(snapshot({"health.hasPendingApproval": pending, "run.summary": summary}))) == expected


@pytest.mark.parametrize(
    ("before", "expected"),
    [(0, set()), (8, set()), (9, set()), (10, {"cursorRegression"}), (2**63 - 1, {"cursorRegression"})],
)
def test_a_previous_cursor_beyond_the_snapshots_is_a_regression(before: int, expected: set[str]) -> None:
    previous = {"cursor": {"eventLineOffset": before, "eventLineCount": before}}

    assert flags(projected(snapshot(), previous=previous)) == expected


@pytest.mark.parametrize(
    "previous", [None, {}, {"cursor": None}, {"cursor": {}}, {"cursor": {"eventLineOffset": None}}]
)
def test_a_previous_state_that_lacks_its_cursor_is_no_regression(previous: Json | None) -> None:
    assert flags(projected(snapshot({"cursor.eventLineOffset": 0}), previous=previous)) == set()


def test_every_contradiction_is_flagged_at_once() -> None:
    found = snapshot(
        {
            "runtime.superloopState": None,
            "health.hasPendingApproval": True,
            "run.summary": {"completion_ok": True},
        }
    )

    state = projected(found, event("tests_end"), previous={"cursor": {"eventLineOffset": 10}})

    assert flags(state) == {"activeMismatch", "approvalCompletionConflict", "cursorRegression"}


# What is accepted and what is refused.


def test_envelopes_of_the_first_revision_are_projected() -> None:
    found, last = snapshot(), event()
    for envelope in (found, last):
        del envelope["sequence"], envelope["traceId"]
    del found["runtime"]["heartbeat"], found["artifacts"]["heartbeat"]

    assert projected(found, last)["transition"]["confidence"] == "high"


def test_a_snapshot_with_the_seventh_gate_is_projected() -> None:
    gates = {**documents.SNAPSHOT["health"]["gates"], "lifecycle": "ok"}

    assert projected(snapshot({"health.gates": gates}))["projection"]["gates"]["lifecycle"] == "ok"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schemaVersion", "v2"),
        ("envelopeType", "loop_run_event"),
        ("envelopeType", "snapshot"),
        ("run.status", "sleeping"),
        ("cursor.eventLineOffset", -1),
        ("further", 1),
    ],
)
def test_a_snapshot_that_is_none_is_refused_and_the_place_named(path: str, value: Any) -> None:
    with pytest.raises(InputInvalid, match="the snapshot is no valid loop_run_snapshot") as refused:
        project(LOOP, snapshot({path: value}), [], None)

    assert path.split(".", maxsplit=1)[0] in refused.value.message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schemaVersion", "v2"),
        ("envelopeType", "loop_run_snapshot"),
        ("event.name", ""),
        ("event.name", None),
        ("event.timestamp", ""),
        ("event.raw", None),
    ],
)
def test_an_event_that_is_none_is_refused_and_its_number_named(path: str, value: Any) -> None:
    with pytest.raises(InputInvalid, match="event 2 is no valid loop_run_event"):
        project(LOOP, snapshot(), [event(), event(changes={path: value})], None)


def test_an_event_without_a_name_is_refused_even_when_it_is_not_the_last() -> None:
    nameless = event()
    del nameless["event"]["name"]

    with pytest.raises(InputInvalid, match="event 1 is no valid loop_run_event"):
        project(LOOP, snapshot(), [nameless, event()], None)


def test_a_snapshot_of_another_loop_is_refused() -> None:
    with pytest.raises(InputInvalid, match="the snapshot is of loop another, not of loop"):
        project(LOOP, snapshot({"source.loopId": "another"}), [], None)


def test_an_event_of_another_loop_is_refused() -> None:
    with pytest.raises(InputInvalid, match="event 2 is of loop another, not of loop"):
        project(LOOP, snapshot(), [event(), event(changes={"source.loopId": "another"})], None)
