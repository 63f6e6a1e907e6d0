"""Our validator (jsonschema-rs) against python's jsonschema: same verdicts, same paths; and the schemas are sound."""

from __future__ import annotations

import copy
import functools
import json
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from conformance.control_documents import CONTROL_DOCUMENTS
from conformance.documents import DOCUMENTS, GOLDEN, GOLDEN_CASES, golden_envelopes
from sprite_agent.contract import validation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jsonschema import ValidationError

    Json = dict[str, Any]
    Path = tuple[str | int, ...]

SCHEMAS = validation.schemas()
DOCUMENT_KINDS = sorted(SCHEMAS.keys() - {"common"})
NULL = {"type": "null"}

ERROR: Json = {
    "ok": False,
    "error": {
        "code": "control_busy",
        "reason": "CONTROL_BUSY",
        "status": "UNAVAILABLE",
        "message": "another command runs in this repo",
        "phase": "execute",
        "retryable": True,
        "retryAfterMs": 500,
        "executed": False,
        "attempts": 3,
        "errorId": "e1",
        "traceId": None,
        "details": {"key": "key-1"},
    },
}
STATUS: Json = {
    "schemaVersion": "v1",
    "updatedAt": "2026-02-23T05:30:13Z",
    "pid": 4711,
    "startedAt": "2026-02-23T05:00:00Z",
    "targets": [
        {
            "name": "shop",
            "loopId": "checkout",
            "transport": "sprite_service",
            "address": "unix:/run/sprite-1.sock",
            "rung": "poll",
            "reach": "connected",
            "lifecycle": "running",
            "health": "degraded",
            "reasonCodes": ["ingest_stale"],
            "runId": "run",
            "iteration": 2,
            "lastEventAt": "2026-02-23T05:20:00Z",
            "lastEventName": "role_end",
            "hasPendingApproval": True,
            "cursorLine": 7,
            "behindLines": 2,
            "frozen": "the agent's journal went back",
            "error": {"reason": "STREAM_LIMIT", "message": "no stream is free"},
            "retries": 1,
            "reconnects": 3,
            "updatedAt": "2026-02-23T05:30:12Z",
        }
    ],
}
HEARTBEAT: Json = {
    "schemaVersion": "v1",
    "updatedAt": "2026-02-23T05:30:13Z",
    "traceId": "trace",
    "loopId": "demo",
    "transport": "local",
    "status": "degraded",
    "heartbeatAt": "2026-02-23T05:28:00Z",
    "lagSeconds": 133,
    "pid": 4711,
    "stage": "planner",
    "thresholds": {"degradedSeconds": 120, "criticalSeconds": 300},
}
SEQUENCE: Json = {
    "status": "ordering_drift_detected",
    "reasonCode": "ordering_drift_detected",
    "driftActive": True,
    "violations": ["event_sequence_regression"],
    "lastSnapshotSequence": 5,
    "lastEventSequence": None,
    "updatedAt": "2026-02-23T05:30:13Z",
}
HEALTH: Json = {
    "schemaVersion": "v1",
    "updatedAt": "2026-02-23T05:30:13Z",
    "traceId": "trace",
    "status": "degraded",
    "reasonCodes": ["ingest_stale"],
    "reasons": [
        {
            "code": "ingest_stale",
            "severity": "degraded",
            "metric": "ingestLagSeconds",
            "observed": 301,
            "threshold": 300,
        }
    ],
    "metrics": {
        "ingestLagSeconds": 301,
        "heartbeatLagSeconds": None,
        "transportFailureStreak": 0,
        "lastControlStatus": "confirmed",
        "sequenceStatus": "ok",
        "lifecycleState": "running",
    },
    "thresholds": {
        "profile": "balanced",
        "degradedIngestLagSeconds": 300,
        "criticalIngestLagSeconds": 900,
        "degradedTransportFailureStreak": 2,
        "criticalTransportFailureStreak": 4,
        "degradedHeartbeatLagSeconds": 120,
        "criticalHeartbeatLagSeconds": 300,
    },
    "transport": {"mode": "local", "ingestStatus": "success", "failureCode": None, "lastFailureCode": None},
    "evidence": {"lastEventAt": "2026-02-23T05:25:12Z", "lastHeartbeatAt": None, "sequenceUpdatedAt": None},
}

WRONG: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    -(2**63) - 1,
    2**31,
    2**63 - 1,
    2**63,
    10**40,
    2.0,
    -0.0,
    2.5,
    2.0**63,
    "",
    "novelty",
    "v1",
    "\x00",
    "text with a\nline break",
    "x" * 300,
    "🎉" * 2001,
    [],
    ["text"],
    [1, None],
    {},
    {"novelty": 1},
)
"""Put in the place of each value: of another type, out of range, or just right."""

TIMES = (
    "2026-02-23T05:30:13z",
    "2026-02-23t05:30:13Z",
    "2026-02-23T05:30:13.123456789012Z",
    "2026-02-23T05:30:13+23:59",
    "2026-02-23T05:30:13-00:00",
    "2024-02-29T00:00:00Z",
    "2000-02-29T00:00:00Z",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59Z",
    "2026-02-29T00:00:00Z",
    "1900-02-29T00:00:00Z",
    "2026-04-31T00:00:00Z",
    "2026-00-01T00:00:00Z",
    "2026-13-01T00:00:00Z",
    "2026-01-00T00:00:00Z",
    "2026-01-32T00:00:00Z",
    "2026-01-01T24:00:00Z",
    "2026-01-01T00:60:00Z",
    "2026-01-01T00:00:61Z",
    "2026-01-01T12:00:60Z",
    "2026-01-01T00:00:00+24:00",
    "2026-01-01T00:00:00+01:60",
    "2026-01-01T00:00:00+0100",
    "2026-01-01T00:00:00+01",
    "2026-01-01T00:00:00",
    "2026-01-01T00:00:00.Z",
    "2026-01-01T00:00:00,5Z",
    "2026-01-01T00:00Z",
    "2026-01-01 00:00:00Z",
    "2026-01-01",
    "2026-1-1T0:0:0Z",
    "26-01-01T00:00:00Z",
    "12026-01-01T00:00:00Z",
    "٢٠٢٦-01-01T00:00:00Z",
    " 2026-01-01T00:00:00Z",
    "2026-01-01T00:00:00Z ",
    "1771824606",
    "now",
    "@TIME@",
)
"""Put in the place of each time: the first nine are RFC 3339."""


# The same verdict.


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_validators_agree_on_a_golden_case(case: str) -> None:
    for kind, envelope in golden_envelopes(case):
        assert verdicts(kind, envelope) == (set(), set())
    for name, kind in (("cursor.json", "manager_cursor"), ("state.json", "manager_state")):
        file = GOLDEN / case / "expected" / name
        if file.exists():
            ours, theirs = verdicts(kind, json.loads(file.read_text()))
            assert ours == theirs


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("loop_run_snapshot", 2000),
        ("loop_run_event", 700),
        ("control_request", 400),
        ("control_result", 700),
        ("manager_cursor", 200),
        ("manager_state", 700),
        ("manager_health", 700),
        ("manager_outbox", 300),
        ("manager_intent", 600),
        ("manager_control", 300),
        ("manager_control_invocation", 700),
        ("manager_heartbeat", 150),
        ("manager_sequence", 100),
        ("error", 300),
    ],
)
def test_the_validators_agree_on_every_mutation(kind: str, least: int) -> None:
    compared = refused = 0
    for what, mutant in mutations(kind, full_document(kind)):
        ours, theirs = verdicts(kind, mutant)
        assert ours == theirs, what
        compared += 1
        refused += bool(ours)
    assert compared >= least
    assert refused >= least / 2


def test_the_mutations_are_made_of_documents_of_every_kind() -> None:
    for kind in DOCUMENT_KINDS:
        assert verdicts(kind, full_document(kind)) == (set(), set())


@pytest.mark.parametrize("text", TIMES)
def test_both_validators_assert_the_format_of_a_time(text: str) -> None:
    wrong = set() if text in TIMES[:9] else {"emittedAt"}

    for kind in ("loop_run_snapshot", "loop_run_event"):
        assert verdicts(kind, {**DOCUMENTS[kind], "emittedAt": text}) == (wrong, wrong)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("2016-12-31T23:59:60Z", id="a leap second, which RFC 3339 has"),
        pytest.param("0000-01-01T00:00:00Z", id="the year 0, which RFC 3339 has"),
        pytest.param("-001-01-01T00:00:00Z", id="a year with a sign, which RFC 3339 has not"),
        pytest.param("+001-01-01T00:00:00Z", id="likewise"),
    ],
)
def test_where_the_validators_are_known_to_differ_ours_accepts(text: str) -> None:
    # Whoever reads such a time with datetime must expect a ValueError.
    assert verdicts("loop_run_event", {**DOCUMENTS["loop_run_event"], "emittedAt": text}) == (set(), {"emittedAt"})


def verdicts(kind: str, document: Any) -> tuple[set[str], set[str]]:
    """The paths at which `document` breaks schema `kind`: as we say, and as python's jsonschema says."""
    ours = {path for path, _ in validation.violations(kind, document)}
    theirs = {
        error.json_path.removeprefix("$").removeprefix(".")
        for found in _python(kind).iter_errors(document)
        for error in _below_null(found)
    }
    return ours, theirs


def _below_null(error: ValidationError) -> Iterator[ValidationError]:
    """What is wrong with a value that might be null, besides that it is not null."""
    if error.validator != "anyOf":
        yield error
        return
    for inner in error.context:
        if inner.schema != NULL:
            yield from _below_null(inner)


@functools.cache
def _python(kind: str) -> Draft202012Validator:
    resources = [(schema["$id"], Resource.from_contents(schema)) for schema in SCHEMAS.values()]
    registry: Registry[Any] = Registry().with_resources(resources)
    return Draft202012Validator(SCHEMAS[kind], registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER)


def full_document(kind: str) -> Json:
    """A document of `kind` with about every key."""
    known = {
        **DOCUMENTS,
        **CONTROL_DOCUMENTS,
        "error": ERROR,
        "manager_health": HEALTH,
        "manager_heartbeat": HEARTBEAT,
        "manager_sequence": SEQUENCE,
        "manager_status": STATUS,
    }
    if kind in known:
        return known[kind]
    name = {"manager_cursor": "cursor.json", "manager_state": "state.json"}[kind]
    golden = (GOLDEN / "real-approved-complete" / "expected" / name).read_text()
    document: Json = json.loads(golden.replace("@TIME@", "2026-02-23T05:30:13Z"))
    return document


def mutations(kind: str, document: Json) -> Iterator[tuple[str, Any]]:
    """(what was changed, the document so changed), one change at a time, at every depth."""
    for path, value in _values(document):
        where = f"{kind} {path}"
        if path and isinstance(path[-1], str):
            yield f"{where} dropped", _changed(document, path, drop=True)
        for wrong in WRONG:
            yield f"{where} is {wrong!r}", _changed(document, path, wrong)
        if isinstance(value, dict):
            for extra in (None, 1, "text"):
                yield f"{where} has one key more: {extra}", _changed(document, path, {**value, "novelty": extra})
        if isinstance(value, str):
            yield f"{where} in capitals", _changed(document, path, value.upper())
            yield f"{where} and more", _changed(document, path, f"{value}x")
            if value.startswith("2026-"):
                for time in TIMES:
                    yield f"{where} is {time}", _changed(document, path, time)


def _values(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    yield path, value
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from _values(item, (*path, key))


def _changed(document: Json, path: Path, value: Any = None, *, drop: bool = False) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    owner: Any = changed
    for step in path[:-1]:
        owner = owner[step]
    if drop:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return changed


# Sound schemas.


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_file_is_a_valid_schema(kind: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[kind])
    jsonschema_rs.meta.validate(SCHEMAS[kind])
    assert SCHEMAS[kind]["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMAS[kind]["$id"] == f"urn:opsmgr:schema:v1:{kind}"


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_alternative_in_a_schema_is_a_value_or_null_in_this_order(kind: str) -> None:
    # The validator names what is wrong by the first alternative.
    for path, node in _values(SCHEMAS[kind]):
        assert path[-1:] not in {("oneOf",), ("allOf",), ("not",), ("if",)}
        if path[-1:] == ("anyOf",):
            value, null = node
            assert null == NULL != value


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_describes_itself(kind: str) -> None:
    assert undescribed(kind) == []


def undescribed(kind: str) -> list[str]:
    """The properties and definitions of a schema that have no description, neither of their own nor by reference."""
    return [
        ".".join(str(step) for step in path)
        for path, node in _values(SCHEMAS[kind])
        if len(path) > 1 and path[-2] in {"properties", "$defs"} and not _described(node, SCHEMAS[kind])
    ]


def _described(node: Json, home: Json) -> bool:
    if node.get("description"):
        return True
    if "$ref" in node:
        address, _, pointer = node["$ref"].partition("#")
        home = next(schema for schema in SCHEMAS.values() if schema["$id"] == address) if address else home
        target = functools.reduce(lambda inner, step: inner[step], pointer.split("/")[1:], home)
        return _described(target, home)
    return any(_described(option, home) for option in node.get("anyOf", ()))
