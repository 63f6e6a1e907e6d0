"""An event's envelope is checked in two parts, and accepted exactly where the schema accepts the whole of it."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from sprite_agent.contract import json_text
from sprite_agent.contract.events import NEEDED, PLAIN, EventBuilder, UsualRecord, usual_lines
from sprite_agent.contract.validation import schemas, validate
from sprite_agent.errors import ContractError

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "7", "1.5", "1e400", "\x00", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = ("timestamp", "event", "type", "loop_id", "run_id", "iteration", "role", "status", "message", "data", "more")
GOOD = {"timestamp": "2026-01-01T00:00:00Z", "event": "role_start", "run_id": "r", "iteration": 1, "data": {"n": 1}}
RECORDS = st.builds(
    lambda keep, changes: {**{name: GOOD[name] for name in keep}, **changes},
    st.sets(st.sampled_from(sorted(GOOD))),
    st.dictionaries(st.sampled_from(MEMBERS), ANYTHING, max_size=2),
)


def builder(*, whole: bool) -> EventBuilder:
    """One that checks in parts, or leaves each envelope to the whole schema."""
    made = EventBuilder(
        source={"repoPath": "/repo", "loopId": "demo"}, trace_id="t", emitted_at="2026-01-01T00:00:00Z", line_count=9
    )
    if whole:
        made._are_plain = lambda _: False  # noqa: SLF001  # what the fast way stands for
    return made


def outcome(made: EventBuilder, texts: list[str], line: int) -> Any:
    """The envelopes, or what is wrong and where."""
    try:
        return made.build([json_text.object_in(text) for text in texts], [text.encode() for text in texts], line)
    except ContractError as error:
        return error.path, error.message


def refusal(made: EventBuilder, texts: list[str], line: int) -> tuple[str, str] | None:
    """What is wrong and where, as far as is checked; None: nothing."""
    try:
        made.check([json_text.object_in(text) for text in texts], line)
    except ContractError as error:
        return error.path, error.message
    return None


@example([GOOD, GOOD], -1)
@example([GOOD, GOOD], 2**63 - 1)
@given(records=st.lists(RECORDS, min_size=1, max_size=4), line=st.integers(-2, 9) | st.integers(2**63 - 5, 2**63 + 1))
def test_what_is_checked_in_parts_is_what_the_whole_schema_says(records: list[dict[str, Any]], line: int) -> None:
    texts = [json_text.encode(record).decode() for record in records]

    found = outcome(builder(whole=False), texts, line)

    assert found == outcome(builder(whole=True), texts, line)
    if isinstance(found, list):
        for envelope in found:
            validate("loop_run_event", envelope)
        assert [envelope["event"]["raw"].text for envelope in found] == texts
        assert [envelope["cursor"]["eventLineOffset"] for envelope in found] == list(range(line, line + len(texts)))


@given(records=st.lists(RECORDS, min_size=1, max_size=4))
def test_records_are_checked_as_they_are_built(records: list[dict[str, Any]]) -> None:
    texts = [json_text.encode(record).decode() for record in records]

    refused = refusal(builder(whole=False), texts, 1)

    assert refused == refusal(builder(whole=True), texts, 1)
    found = outcome(builder(whole=False), texts, 1)
    assert found == refused if refused else isinstance(found, list)


TEXTS = st.builds(
    lambda record, more, at: record[: at % len(record)] + more + record[at % len(record) :],
    RECORDS.map(json_text.encode),
    st.sampled_from([b"", b" ", b"\n", b"x", b"\xff", b"\\ud800", b'"', b"{}", b'"event":"e",', b'"data":{"n":1e999},'])
    | st.binary(max_size=3),
    st.integers(0, 300),
)


@given(lines=st.lists(RECORDS.map(json_text.encode) | TEXTS, max_size=4))
@example([b'{"timestamp":"t","event":"e","data":' + b'{"a":' * 255 + b"{}" + b"}" * 255 + b"}"])
@example([b'{"timestamp":"t","event":"e","data":' + b'{"a":' * 254 + b"{}" + b"}" * 254 + b"}"])
@example([b'{"timestamp":"t","event":"e","data":{"n":' + b"9" * 5000 + b"}}"])
@example([b'{"timestamp":"t","event":"e","more":{"n":1e999}}'])
@example([b'{"timestamp":"t","event":"e","event":"f","data":{},"data":null}'])
def test_lines_that_are_taken_for_events_are_events(lines: list[bytes]) -> None:
    taken = lines[: usual_lines(lines)]

    values = [json_text.object_in(text) for text in taken]
    if taken:
        assert outcome(builder(whole=True), [text.decode() for text in taken], 1)[0]["envelopeType"] == "loop_run_event"
        builder(whole=False).check(values, 1)


def test_usual_lines_are_taken_for_events_without_another_look() -> None:
    usual = json_text.encode({**GOOD, "loop_id": "demo", "role": "tester", "status": "ok", "message": None})

    assert usual_lines([usual, usual + b"\n", b"{}", usual]) == 2


def test_the_members_of_a_usual_record_are_as_the_schema_has_them_in_an_envelope() -> None:
    """A rule that the schema gets and the record has not would be left out by the agent."""
    (shape,) = msgspec.json.schema(UsualRecord)["$defs"].values()

    assert shape["required"] == list(NEEDED)
    assert not shape["additionalProperties"]
    assert {name: rule(member) for name, member in shape["properties"].items() if name != "loop_id"} == {
        name: rule(property_at(place)) for name, place in PLAIN.items()
    }


def property_at(place: str) -> Any:
    """A property of an event's envelope, by its path in the schema."""
    found: Any = schemas()["loop_run_event"]["properties"]
    for step in place.split("/"):
        found = found[step]
    return found


def rule(node: Any) -> Any:
    """What a schema demands of a value, the same however it is written."""
    if "$ref" in node:
        return rule(schemas()["common"]["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return sorted((rule(inner) for inner in node["anyOf"]), key=repr)
    if isinstance(node["type"], list):
        return sorted(({"type": kind} for kind in node["type"]), key=repr)
    return {key: value for key, value in node.items() if key not in {"description", "default"}}
