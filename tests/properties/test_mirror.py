"""The law of the mirror, through bytes: from_message(to_message(d)) == d, and open objects keep their text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import drift
from properties import strategies
from sprite_agent.contract import control_mirror, json_text, mirror, validation
from sprite_agent.contract.json_text import OpenObject
from support.figures import found

if TYPE_CHECKING:
    from collections.abc import Callable

Json = dict[str, Any]

MIRRORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "loop_run_snapshot": (mirror.snapshot_to_message, mirror.snapshot_from_message),
    "loop_run_event": (mirror.event_to_message, mirror.event_from_message),
    "control_request": (control_mirror.request_to_message, control_mirror.request_from_message),
    "control_result": (control_mirror.result_to_message, control_mirror.result_from_message),
}


def carried(kind: str, document: Json) -> Json:
    """`document` as it arrives on the other side of the wire."""
    to_message, from_message = MIRRORS[kind]
    message = to_message(document)
    arrived: Json = from_message(type(message).FromString(message.SerializeToString()))
    return arrived


def assert_the_law(kind: str, document: Json) -> None:
    validation.validate(kind, document)
    before = _spelled(document)

    arrived = carried(kind, document)

    assert arrived == document
    assert _spelled(arrived) == before
    validation.validate(kind, arrived)


def _spelled(document: Json) -> str:
    """Tells apart what == does not: 1, 1.0 and true; 0.0 and -0.0."""
    return json.dumps(document, sort_keys=True)


@given(strategies.snapshot)
def test_a_snapshot_comes_back_as_it_was(document: Json) -> None:
    assert_the_law("loop_run_snapshot", document)


@given(strategies.event)
def test_an_event_comes_back_as_it_was(document: Json) -> None:
    assert_the_law("loop_run_event", document)


@given(strategies.control_request)
def test_a_control_request_comes_back_as_it_was(document: Json) -> None:
    assert_the_law("control_request", document)


@given(strategies.control_result)
def test_a_control_result_comes_back_as_it_was(document: Json) -> None:
    assert_the_law("control_result", document)


DOCUMENTS = {
    "loop_run_snapshot": strategies.snapshot,
    "loop_run_event": strategies.event,
    "control_request": strategies.control_request,
    "control_result": strategies.control_result,
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_message_comes_back_as_it_was_from_being_a_document(kind: str) -> None:
    """The law the other way round, and T24's count of both."""
    to_message, from_message = MIRRORS[kind]
    tried = 0

    @given(DOCUMENTS[kind])
    def law(document: Json) -> None:
        nonlocal tried
        tried += 1
        sent = to_message(document).SerializeToString(deterministic=True)
        arrived = type(to_message(document)).FromString(sent)
        assert to_message(from_message(arrived)).SerializeToString(deterministic=True) == sent

    law()
    found("T24", f"{kind}: {tried} documents, there and back, and as many messages")


OPEN_FIELDS = {
    "loop_run_snapshot": (
        "run.summary",
        "runtime.superloopState",
        "runtime.activeRun",
        "runtime.approval",
        "runtime.heartbeat",
    ),
    "loop_run_event": ("event.payload", "event.raw"),
}


def test_the_open_fields_are_all_that_the_schemas_have() -> None:
    schemas = validation.schemas()
    for kind in schemas:
        if kind in MIRRORS:
            found = {
                path for path, member in drift.members(schemas[kind], schemas).items() if member.type == "open object"
            }
            assert found == set(OPEN_FIELDS.get(kind, ()))


@pytest.mark.parametrize("kind", OPEN_FIELDS)
@given(data=st.data())
def test_the_text_of_an_open_object_arrives_byte_for_byte(kind: str, data: st.DataObject) -> None:
    texts = {path: data.draw(strategies.object_text, label=path) for path in OPEN_FIELDS[kind]}
    document = _minimal(kind)
    for path, text in texts.items():
        part, name = path.split(".")
        document[part][name] = json_text.parse_object(text)

    arrived = carried(kind, document)

    for path, text in texts.items():
        part, name = path.split(".")
        value = arrived[part][name]
        assert isinstance(value, OpenObject)
        assert value.text == text
        assert _spelled(value) == _spelled(json.loads(text))
    validation.validate(kind, arrived)


@given(strategies.object_text)
def test_an_open_object_is_written_in_one_line_and_means_the_same(text: str) -> None:
    line = json_text.encode({"raw": json_text.parse_object(text)})

    assert b"\n" not in line
    assert b"\r" not in line
    assert _spelled(json_text.parse(line)) == _spelled({"raw": json.loads(text)})


def _minimal(kind: str) -> Json:
    missing = {"path": "p", "exists": False, "sizeBytes": 0, "lineCount": 0, "sha256": None, "mtimeEpoch": None}
    envelope = {
        "schemaVersion": "v1",
        "envelopeType": kind,
        "emittedAt": "2026-02-23T05:30:13Z",
        "source": {"repoPath": "/repo", "loopId": "loop"},
        "cursor": {"eventLineOffset": 1, "eventLineCount": 1},
        "run": {"runId": "run", "iteration": 1},
    }
    if kind == "loop_run_event":
        event = dict.fromkeys(("role", "status", "message", "payload"))
        return {**envelope, "event": {"timestamp": "now", "name": "loop_start", **event, "raw": {}}}
    return {
        **envelope,
        "run": {"runId": "run", "iteration": 1, "status": "running", "summary": None},
        "runtime": dict.fromkeys(("superloopState", "activeRun", "approval")),
        "artifacts": dict.fromkeys(("events", "runSummary", "state", "activeRun", "approval"), missing),
        "health": {
            "eventCount": 1,
            **dict.fromkeys(("lastEventAt", "lastEventName", "lastSummaryAt", "gates", "stuck")),
            "hasPendingApproval": False,
        },
    }
