"""The ordering checks name each violation of contract.md section 8, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from conformance import documents
from opsmgr.passes.projection import project
from opsmgr.passes.sequence import check_sequence
from sprite_agent.contract.validation import validate

Json = dict[str, Any]

STATE = project("loop", documents.SNAPSHOT, [], None)  # type: ignore[arg-type]  # a valid one


def snapshot(value: int | None) -> Any:
    """A snapshot with this sequence; None: without one, as in the contract's first revision."""
    return with_sequence(documents.SNAPSHOT, value)


def events(*values: int | None) -> Any:
    return [with_sequence(documents.EVENT, value) for value in values]


def with_sequence(document: Json, value: int | None) -> Json:
    kept = {name: member for name, member in document.items() if name != "sequence"}
    return kept if value is None else {**kept, "sequence": {"source": "cursor_event_line_offset", "value": value}}


def verdict(found: Any, batch: Any, previous: Json | None = None) -> Json:
    """The verdict, which always fits into a state, and whose parts agree."""
    result = check_sequence(found, batch, previous)
    validate("manager_state", {**STATE, "sequence": result})
    drifts = bool(result["violations"])
    assert result["driftActive"] is drifts
    assert result["status"] == ("ordering_drift_detected" if drifts else "ok")
    assert result["reasonCode"] == ("ordering_drift_detected" if drifts else None)
    return result


def last(snapshot_sequence: int | None, event_sequence: int | None) -> Json:
    return {"lastSnapshotSequence": snapshot_sequence, "lastEventSequence": event_sequence}


# Nothing to object to.


@pytest.mark.parametrize("previous", [None, {}, {"lastSnapshotSequence": None, "lastEventSequence": None}])
def test_a_first_poll_is_in_order_whatever_its_numbers(previous: Json | None) -> None:
    found = verdict(snapshot(9), events(4, 7, 9), previous)

    assert found["violations"] == []
    assert (found["lastSnapshotSequence"], found["lastEventSequence"]) == (9, 9)


def test_a_first_poll_of_an_empty_log_is_in_order() -> None:
    found = verdict(snapshot(0), [])

    assert found["violations"] == []
    assert (found["lastSnapshotSequence"], found["lastEventSequence"]) == (0, None)


def test_what_goes_on_where_the_last_poll_stopped_is_in_order() -> None:
    assert verdict(snapshot(12), events(10, 12), last(9, 9))["violations"] == []


def test_lines_without_an_event_leave_gaps_that_are_in_order() -> None:
    assert verdict(snapshot(40), events(20, 35), last(9, 9))["violations"] == []


def test_a_poll_without_anything_new_is_in_order_and_keeps_the_last_event() -> None:
    found = verdict(snapshot(9), [], last(9, 7))

    assert found["violations"] == []
    assert (found["lastSnapshotSequence"], found["lastEventSequence"]) == (9, 7)


def test_events_may_be_behind_the_snapshot_when_a_poll_was_bounded() -> None:
    assert verdict(snapshot(9), events(3, 4), last(9, 2))["violations"] == []


# Each violation.


def test_a_snapshot_without_a_sequence_is_a_violation_and_the_last_one_is_kept() -> None:
    found = verdict(snapshot(None), events(10), last(9, 9))

    assert found["violations"] == ["snapshot_sequence_missing"]
    assert found["lastSnapshotSequence"] == 9


def test_a_snapshot_below_the_last_one_is_a_regression_and_becomes_the_last_one() -> None:
    found = verdict(snapshot(8), [], last(9, 8))

    assert found["violations"] == ["snapshot_sequence_regression"]
    assert found["lastSnapshotSequence"] == 8


def test_an_event_without_a_sequence_is_a_violation_and_the_last_one_is_kept() -> None:
    found = verdict(snapshot(12), events(None), last(9, 9))

    assert found["violations"] == ["event_sequence_missing"]
    assert found["lastEventSequence"] == 9


@pytest.mark.parametrize("values", [(10, 10), (11, 10), (10, 12, 11), (10, None, 10)])
def test_events_of_one_poll_that_do_not_rise_are_non_monotonic(values: tuple[int | None, ...]) -> None:
    assert "event_sequence_non_monotonic" in verdict(snapshot(12), events(*values), last(9, 9))["violations"]


@pytest.mark.parametrize("first", [9, 8, 1])
def test_a_first_event_that_is_not_above_the_last_polls_is_a_regression(first: int) -> None:
    found = verdict(snapshot(12), events(first, 12), last(9, 9))

    assert found["violations"] == ["event_sequence_regression"]
    assert found["lastEventSequence"] == 12


def test_only_the_first_event_is_held_against_the_last_poll() -> None:
    found = verdict(snapshot(12), events(8, 9, 10), last(9, 9))

    assert found["violations"] == ["event_sequence_regression"]


def test_an_event_without_a_sequence_does_not_hide_a_regression_after_it() -> None:
    found = verdict(snapshot(12), events(None, 8), last(9, 9))

    assert found["violations"] == ["event_sequence_missing", "event_sequence_regression"]


def test_every_violation_is_told_once() -> None:
    found = verdict(snapshot(3), events(5, 4, 3, None, None), last(9, 9))

    assert found["violations"] == [
        "snapshot_sequence_regression",
        "event_sequence_regression",
        "event_sequence_non_monotonic",
        "event_sequence_missing",
    ]


# Drift.


def test_a_drift_ends_with_the_next_poll_that_is_in_order() -> None:
    drifting = verdict(snapshot(8), [], last(9, 8))

    assert verdict(snapshot(10), events(9, 10), drifting)["driftActive"] is False


def test_a_first_revision_loop_that_never_has_sequences_drifts_on_every_poll() -> None:
    first = verdict(snapshot(None), events(None))
    second = verdict(snapshot(None), events(None), first)

    assert first["violations"] == second["violations"] == ["snapshot_sequence_missing", "event_sequence_missing"]
    assert (second["lastSnapshotSequence"], second["lastEventSequence"]) == (None, None)


@pytest.mark.parametrize("value", ["9", 9.5, True, [], {}])
def test_a_last_sequence_that_is_no_number_is_taken_as_absent(value: Any) -> None:
    previous = {"lastSnapshotSequence": value, "lastEventSequence": value}

    assert verdict(snapshot(1), events(1), previous)["violations"] == []
