"""The verdict is the worst of its reasons, and each reason begins exactly at its threshold."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from opsmgr.passes.health import FAILURES, Figures, judge
from opsmgr.passes.thresholds import BALANCED, Thresholds
from sprite_agent.contract.validation import validate

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)
WELL = Figures(
    transport="local",
    failure_code=None,
    last_failure_code=None,
    failure_streak=0,
    last_event_at=None,
    last_heartbeat_at=None,
    last_control_status=None,
    lifecycle_state="running",
    diverges=False,
    sequence=None,
)
DRIFT = {"status": "ordering_drift_detected", "updatedAt": "2026-01-02T11:00:00Z"}

Json = dict[str, Any]


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def health(thresholds: Thresholds = BALANCED, **figures: Any) -> Json:
    """The verdict on a loop that is well but for these figures; it always keeps its schema."""
    document = judge(replace(WELL, **figures), thresholds, now=NOW, trace_id="trace-1")
    validate("manager_health", document)
    assert document["reasonCodes"] == [reason["code"] for reason in document["reasons"]]
    return document


def reasons(document: Json) -> list[tuple[str, str]]:
    return [(reason["code"], reason["severity"]) for reason in document["reasons"]]


def test_a_loop_without_any_reason_is_healthy() -> None:
    document = health()

    assert document["status"] == "healthy"
    assert document["reasons"] == []
    assert document["metrics"] == {
        "ingestLagSeconds": None,
        "heartbeatLagSeconds": None,
        "transportFailureStreak": 0,
        "lastControlStatus": None,
        "sequenceStatus": None,
        "lifecycleState": "running",
    }
    assert document["transport"] == {
        "mode": "local",
        "ingestStatus": "success",
        "failureCode": None,
        "lastFailureCode": None,
    }
    assert document["evidence"] == {"lastEventAt": None, "lastHeartbeatAt": None, "sequenceUpdatedAt": None}
    assert document["traceId"] == "trace-1"


@pytest.mark.parametrize("state", ["complete", "idle", None])
def test_a_loop_in_a_state_that_can_not_be_stale_is_not_and_its_figures_are_told(state: str | None) -> None:
    stale: Json = {"last_event_at": ago(5000), "last_heartbeat_at": ago(5000), "lifecycle_state": state}
    while_running = replace(BALANCED, stale_when=("running", "awaiting_approval"))

    document = health(while_running, **stale)

    assert document["status"] == "healthy"
    assert document["metrics"]["ingestLagSeconds"] == document["metrics"]["heartbeatLagSeconds"] == 5000
    assert reasons(health(while_running, **{**stale, "lifecycle_state": "running"})) == [
        ("ingest_stale", "critical"),
        ("runtime_heartbeat_stale", "critical"),
    ]
    assert len(reasons(health(**stale))) == 2


def test_the_times_that_were_judged_are_the_evidence() -> None:
    document = health(last_event_at=ago(5), last_heartbeat_at=ago(7), sequence=DRIFT)

    assert document["evidence"] == {
        "lastEventAt": "2026-01-02T11:59:55Z",
        "lastHeartbeatAt": "2026-01-02T11:59:53Z",
        "sequenceUpdatedAt": "2026-01-02T11:00:00Z",
    }


# Figures with two thresholds.

LIMITS = Thresholds(
    profile="mine",
    ingest_lag_seconds=(300, 900),
    transport_failure_streak=(2, 4),
    heartbeat_lag_seconds=(120, 240),
)


@pytest.mark.parametrize(
    ("age", "severity", "threshold"),
    [
        (0, None, None),
        (299, None, None),
        (300, "degraded", 300),
        (301, "degraded", 300),
        (899, "degraded", 300),
        (900, "critical", 900),
        (901, "critical", 900),
    ],
)
def test_the_age_of_the_last_event_is_a_reason_from_its_thresholds_on(
    age: int, severity: str | None, threshold: int | None
) -> None:
    document = health(LIMITS, last_event_at=ago(age))

    assert document["metrics"]["ingestLagSeconds"] == age
    assert document["status"] == (severity or "healthy")
    assert document["reasons"] == (
        [
            {
                "code": "ingest_stale",
                "severity": severity,
                "metric": "ingestLagSeconds",
                "observed": age,
                "threshold": threshold,
            }
        ]
        if severity
        else []
    )


@pytest.mark.parametrize(
    ("age", "severity"),
    [(0, None), (119, None), (120, "degraded"), (239, "degraded"), (240, "critical"), (10**9, "critical")],
)
def test_the_age_of_the_heartbeat_is_a_reason_from_its_thresholds_on(age: int, severity: str | None) -> None:
    document = health(LIMITS, last_heartbeat_at=ago(age))

    assert document["metrics"]["heartbeatLagSeconds"] == age
    assert reasons(document) == ([("runtime_heartbeat_stale", severity)] if severity else [])


@pytest.mark.parametrize(
    ("streak", "severity"), [(0, None), (1, None), (2, "degraded"), (3, "degraded"), (4, "critical"), (5, "critical")]
)
def test_failures_in_a_row_are_a_reason_from_their_thresholds_on(streak: int, severity: str | None) -> None:
    document = health(LIMITS, failure_streak=streak)

    assert document["metrics"]["transportFailureStreak"] == streak
    assert reasons(document) == ([("transport_unreachable", severity)] if severity else [])


def test_a_part_of_a_second_does_not_reach_a_threshold() -> None:
    assert reasons(health(LIMITS, last_event_at=ago(299.9))) == []


@pytest.mark.parametrize("written", ["2016-12-31T23:59:60Z", "2026-01-02t03:04:05z", "2026-01-02T03:04:05.5+01:00"])
def test_whatever_rfc_3339_allows_grows_old(written: str) -> None:
    assert reasons(health(LIMITS, last_event_at=written)) == [("ingest_stale", "critical")]


def test_where_both_thresholds_are_one_the_reason_is_critical_at_once() -> None:
    limits = replace(LIMITS, ingest_lag_seconds=(60, 60))

    assert reasons(health(limits, last_event_at=ago(60))) == [("ingest_stale", "critical")]


def test_the_balanced_thresholds_are_those_of_the_contract() -> None:
    assert health()["thresholds"] == {
        "profile": "balanced",
        "degradedIngestLagSeconds": 300,
        "criticalIngestLagSeconds": 900,
        "degradedTransportFailureStreak": 2,
        "criticalTransportFailureStreak": 4,
        "degradedHeartbeatLagSeconds": 120,
        "criticalHeartbeatLagSeconds": 300,
    }


def test_the_thresholds_that_were_in_force_are_told() -> None:
    assert health(LIMITS)["thresholds"]["profile"] == "mine"
    assert health(LIMITS)["thresholds"]["criticalHeartbeatLagSeconds"] == 240


# Reasons without a threshold.


def test_a_divergence_degrades() -> None:
    assert reasons(health(diverges=True)) == [("divergence_detected", "degraded")]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("ambiguous", [("control_ambiguous", "degraded")]),
        ("failed_command", [("control_failed_command", "degraded")]),
        ("confirmed", []),
        ("executed_unconfirmed", []),
        ("something else", []),
        (None, []),
    ],
)
def test_the_last_intent_degrades_when_it_failed_or_stayed_unclear(
    status: str | None, expected: list[tuple[str, str]]
) -> None:
    document = health(last_control_status=status)

    assert reasons(document) == expected
    assert document["metrics"]["lastControlStatus"] == status


def test_a_drift_of_the_order_degrades() -> None:
    document = health(sequence=DRIFT)

    assert reasons(document) == [("ordering_drift_detected", "degraded")]
    assert document["metrics"]["sequenceStatus"] == "ordering_drift_detected"


@pytest.mark.parametrize("sequence", [None, {}, {"status": "ok"}])
def test_an_order_that_is_kept_or_not_known_is_no_reason(sequence: Json | None) -> None:
    assert reasons(health(sequence=sequence)) == []


# An ingest that failed.


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("snapshot_unavailable", "transport_unreachable"),
        ("events_unavailable", "transport_unreachable"),
        ("service_request_failed", "transport_unreachable"),
        ("service_response_invalid", "invalid_transport_payload"),
        ("projection_failed", "projection_failed"),
        ("reconcile_failed", "reconcile_failed"),
    ],
)
def test_an_ingest_that_failed_has_a_reason_of_its_own_at_once(failure: str, reason: str) -> None:
    document = health(LIMITS, failure_code=failure, last_failure_code=failure, failure_streak=1)

    assert reasons(document) == [(reason, "degraded")]
    assert document["transport"] == {
        "mode": "local",
        "ingestStatus": "failed",
        "failureCode": failure,
        "lastFailureCode": failure,
    }


def test_there_is_a_reason_for_every_failure_and_no_other() -> None:
    assert set(FAILURES) == {
        "snapshot_unavailable",
        "events_unavailable",
        "service_request_failed",
        "service_response_invalid",
        "projection_failed",
        "reconcile_failed",
    }


@pytest.mark.parametrize(("streak", "severity"), [(2, "degraded"), (4, "critical")])
def test_unreachable_is_told_once_and_as_badly_as_the_streak_says(streak: int, severity: str) -> None:
    document = health(LIMITS, failure_code="snapshot_unavailable", failure_streak=streak)

    assert reasons(document) == [("transport_unreachable", severity)]


def test_a_failure_of_another_kind_is_told_beside_the_streak() -> None:
    document = health(LIMITS, failure_code="service_response_invalid", failure_streak=4)

    assert reasons(document) == [("transport_unreachable", "critical"), ("invalid_transport_payload", "degraded")]


def test_an_earlier_failure_is_told_but_is_no_reason() -> None:
    document = health(last_failure_code="events_unavailable")

    assert reasons(document) == []
    assert document["transport"]["lastFailureCode"] == "events_unavailable"
    assert document["transport"]["ingestStatus"] == "success"


# The worst wins.


def test_one_critical_reason_makes_the_verdict_critical_beside_any_number_of_degraded_ones() -> None:
    document = health(
        LIMITS,
        diverges=True,
        last_control_status="ambiguous",
        last_event_at=ago(300),
        last_heartbeat_at=ago(240),
        failure_code="reconcile_failed",
        failure_streak=2,
        sequence=DRIFT,
        transport="sprite_service",
    )

    assert document["status"] == "critical"
    assert reasons(document) == [
        ("divergence_detected", "degraded"),
        ("control_ambiguous", "degraded"),
        ("ingest_stale", "degraded"),
        ("runtime_heartbeat_stale", "critical"),
        ("transport_unreachable", "degraded"),
        ("ordering_drift_detected", "degraded"),
        ("reconcile_failed", "degraded"),
    ]


def test_degraded_reasons_alone_make_the_verdict_degraded() -> None:
    assert health(diverges=True, sequence=DRIFT)["status"] == "degraded"


# Timestamps as the runtime writes them, or anyone else.


@pytest.mark.parametrize(
    ("timestamp", "age"),
    [
        ("2026-01-02T11:59:00Z", 60),
        ("2026-01-02T11:59:00+00:00", 60),
        ("2026-01-02T12:59:00+01:00", 60),
        ("2026-01-02T06:29:00-05:30", 60),
        ("2026-01-02T11:59:00", 60),
        ("2026-01-02 11:59:00", 60),
        ("2026-01-02T11:59:00.5Z", 59),
        ("2026-01-02T11:59:00.123456789Z", 59),
        ("2026-01-02", 43200),
    ],
)
def test_a_timestamp_with_or_without_a_zone_has_an_age(timestamp: str, age: int) -> None:
    assert health(last_event_at=timestamp)["metrics"]["ingestLagSeconds"] == age


def test_the_oldest_timestamp_there_can_be_has_an_age() -> None:
    assert health(last_event_at="0001-01-01T00:00:00+23:59")["metrics"]["ingestLagSeconds"] > 63_000_000_000


@pytest.mark.parametrize(
    "timestamp",
    [
        "",
        "yesterday",
        "1767355140",
        "2026-13-01T00:00:00Z",
        "2026-01-02T25:00:00Z",
        "2026-01-02T11:59:00+99:00",
        "\x00",
        "\uff12026-01-02T11:59:00Z",
        "9" * 5000,
    ],
)
def test_a_timestamp_that_is_none_has_no_age_and_is_no_reason(timestamp: str) -> None:
    document = health(last_event_at=timestamp, last_heartbeat_at=timestamp)

    assert document["metrics"]["ingestLagSeconds"] is None
    assert document["metrics"]["heartbeatLagSeconds"] is None
    assert document["status"] == "healthy"
    assert document["evidence"]["lastEventAt"] == timestamp


@pytest.mark.parametrize("timestamp", ["2026-01-02T12:00:01Z", "2099-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59"])
def test_a_timestamp_in_the_future_is_no_seconds_old(timestamp: str) -> None:
    assert health(last_event_at=timestamp)["metrics"]["ingestLagSeconds"] == 0
