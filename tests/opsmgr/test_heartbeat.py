"""heartbeat.json says what the runtime's heartbeat says, and how old it is; never more."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from conformance import documents
from opsmgr.passes.heartbeat import heartbeat_at, heartbeat_document
from opsmgr.passes.thresholds import BALANCED
from sprite_agent.contract.validation import validate

Json = dict[str, Any]
NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


def seen(heartbeat: Json | None) -> Json:
    """The document for a snapshot with this heartbeat; it is valid."""
    document = heartbeat_document(snapshot(heartbeat), BALANCED, transport="local", now=NOW, trace_id="trace-1")
    validate("manager_heartbeat", document)
    return document


def snapshot(heartbeat: Json | None) -> Any:
    return {**documents.SNAPSHOT, "runtime": {**documents.SNAPSHOT["runtime"], "heartbeat": heartbeat}}


def before(seconds: int) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize(
    ("seconds", "status"), [(0, "fresh"), (119, "fresh"), (120, "degraded"), (299, "degraded"), (300, "critical")]
)
def test_its_status_begins_exactly_at_the_thresholds(seconds: int, status: str) -> None:
    document = seen({"timestamp": before(seconds), "pid": 7, "stage": "planner"})

    assert (document["status"], document["lagSeconds"]) == (status, seconds)
    assert (document["pid"], document["stage"], document["traceId"]) == (7, "planner", "trace-1")
    assert document["thresholds"] == {"degradedSeconds": 120, "criticalSeconds": 300}


def test_the_timestamp_beats_the_time_of_the_update_which_stands_in_for_it() -> None:
    assert seen({"updatedAt": before(50)})["lagSeconds"] == 50
    assert seen({"timestamp": before(5), "updatedAt": before(50)})["lagSeconds"] == 5


@pytest.mark.parametrize("heartbeat", [None, {}, {"pid": 7}, {"timestamp": 12}, {"timestamp": "yesterday"}])
def test_one_without_a_time_is_missing(heartbeat: Json | None) -> None:
    document = seen(heartbeat)

    assert (document["status"], document["lagSeconds"]) == ("missing", None)


@pytest.mark.parametrize(
    "heartbeat", [{"pid": "7", "stage": 3}, {"pid": True}, {"pid": -1}, {"pid": 2**63}, {"pid": 1.5}]
)
def test_members_of_other_types_are_left_out(heartbeat: Json) -> None:
    document = seen({"timestamp": before(1), **heartbeat})

    assert (document["pid"], document["stage"]) == (None, None)


def test_a_snapshot_of_the_first_revision_has_none() -> None:
    runtime = {name: value for name, value in documents.SNAPSHOT["runtime"].items() if name != "heartbeat"}
    first: Any = {**documents.SNAPSHOT, "runtime": runtime}

    assert heartbeat_at(first) is None
    assert heartbeat_at(None) is None
