"""What the mirror carries, and what it refuses with the path in the document. The law itself: tests/properties."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from conformance import drift
from conformance.documents import DOCUMENTS, EVENT, GOLDEN_CASES, REQUEST, RESULT, SNAPSHOT, golden_envelopes
from sprite_agent.contract import control_mirror, json_text, mirror, validation
from sprite_agent.contract.json_text import MAX_DEPTH
from sprite_agent.contract.requests import check_request
from sprite_agent.errors import ContractError, IntentUnsupported
from sprite_agent.v1 import control_pb2, envelopes_pb2, service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

    Json = dict[str, Any]

TO_MESSAGE: dict[str, Callable[..., Any]] = {
    "loop_run_event": mirror.event_to_message,
    "loop_run_snapshot": mirror.snapshot_to_message,
    "control_request": control_mirror.request_to_message,
    "control_result": control_mirror.result_to_message,
}
FROM_MESSAGE: dict[str, Callable[..., Any]] = {
    "loop_run_event": mirror.event_from_message,
    "loop_run_snapshot": mirror.snapshot_from_message,
    "control_request": control_mirror.request_from_message,
    "control_result": control_mirror.result_from_message,
}
MEMBERS = {kind: drift.members(schema, validation.schemas()) for kind, schema in validation.schemas().items()}


def places(*types: str) -> list[tuple[str, str]]:
    """(document, path) of every value of these types (drift.Member.type)."""
    return [(kind, path) for kind in DOCUMENTS for path, member in MEMBERS[kind].items() if member.type in types]


def changed(document: Json, path: str, value: Any) -> Json:
    """A copy of `document` with `value` at `path`."""
    document = copy.deepcopy(document)
    owner, name = _owner(document, path)
    owner[name] = value
    return document


def without(document: Json, path: str) -> Json:
    """A copy of `document` without the key at `path`."""
    document = copy.deepcopy(document)
    owner, name = _owner(document, path)
    del owner[name]
    return document


def _owner(document: Json, path: str) -> tuple[Json, str]:
    *above, name = path.split(".")
    for step in above:
        document = document[step]
    return document, name


def cleared(message: Message, path: str) -> Message:
    """`message` with the field at `path`, written as in the document, unset."""
    owner, field = _field(message, path)
    owner.ClearField(field)
    return message


def _field(message: Message, path: str) -> tuple[Message, str]:
    *above, last = path.split(".")
    for step in above:
        message = getattr(message, _field_name(message, step))
    return message, _field_name(message, last)


def _field_name(message: Message, json_name: str) -> str:
    return next(field.name for field in message.DESCRIPTOR.fields if field.json_name == json_name)


def refusal(call: Callable[..., Any], *arguments: Any) -> ContractError:
    """The ContractError that `call` raises; its message begins with its path."""
    with pytest.raises(ContractError) as caught:
        call(*arguments)
    assert str(caught.value).startswith(caught.value.path)
    return caught.value


def refused_path(call: Callable[..., Any], *arguments: Any) -> str:
    return refusal(call, *arguments).path


def arrives(kind: str, message: Message) -> Any:
    """What a receiver does: unpack, then validate."""
    document = FROM_MESSAGE[kind](message)
    validation.validate(kind, document)
    return document


# Whole documents.


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_a_golden_envelope_keeps_its_schema_and_comes_back_as_it_was(case: str) -> None:
    for kind, envelope in golden_envelopes(case):
        validation.validate(kind, envelope)
        message = TO_MESSAGE[kind](envelope)
        arrived = arrives(kind, type(message).FromString(message.SerializeToString()))
        assert json.dumps(arrived, sort_keys=True) == json.dumps(envelope, sort_keys=True)


def test_the_golden_cases_hold_snapshots_and_events() -> None:
    kinds = [kind for case in GOLDEN_CASES for kind, _ in golden_envelopes(case)]

    assert kinds.count("loop_run_snapshot") > 30
    assert kinds.count("loop_run_event") > 150


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_full_documents_have_every_key_and_come_back_as_they_were(kind: str) -> None:
    there = {path for path, _ in values(DOCUMENTS[kind])}
    assert {path for path in MEMBERS[kind] if not path.endswith(".*")} <= there

    validation.validate(kind, DOCUMENTS[kind])
    assert arrives(kind, TO_MESSAGE[kind](DOCUMENTS[kind])) == DOCUMENTS[kind]


def values(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from values(item, f"{path}.{key}" if path else key)


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind in DOCUMENTS for path, member in MEMBERS[kind].items() if member.nullable],
)
def test_null_and_absent_stay_apart(kind: str, path: str) -> None:
    null = changed(DOCUMENTS[kind], path, None)
    assert arrives(kind, TO_MESSAGE[kind](null)) == null

    if not MEMBERS[kind][path].required:
        absent = without(DOCUMENTS[kind], path)
        assert arrives(kind, TO_MESSAGE[kind](absent)) == absent


def test_an_event_is_written_into_the_message_that_is_given() -> None:
    batch = service_pb2.StreamEventsResponse()

    message = mirror.event_to_message(EVENT, batch.events.add())  # type: ignore[arg-type]  # a full document

    assert message is batch.events[0]
    assert batch.events[0] == TO_MESSAGE["loop_run_event"](EVENT)


# To messages: refused, and where.


@pytest.mark.parametrize(("kind", "path"), places("integer"))
@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**40], ids=["2^63", "-2^63-1", "10^40"])
def test_an_integer_beyond_64_bit_is_refused(kind: str, path: str, value: int) -> None:
    document = changed(DOCUMENTS[kind], path, value)

    assert refused_path(TO_MESSAGE[kind], document) == path
    assert refused_path(validation.validate, kind, document) == path


@pytest.mark.parametrize(("kind", "path"), places("integer"))
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_whole_is_refused_where_an_integer_stands(kind: str, path: str, value: float) -> None:
    document = changed(DOCUMENTS[kind], path, value)

    assert refused_path(TO_MESSAGE[kind], document) == path
    assert refused_path(validation.validate, kind, document) == path


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_an_exit_code_beyond_32_bit_is_refused(value: int) -> None:
    assert refused_path(control_mirror.result_to_message, changed(RESULT, "exitCode", value)) == "exitCode"


@pytest.mark.parametrize("path", ["run.iteration", "event.payload", "event.raw"])
def test_an_integer_of_5000_digits_is_refused(path: str) -> None:
    value = 10**5000 if path == "run.iteration" else {"big": 10**5000}

    assert refused_path(mirror.event_to_message, changed(EVENT, path, value)).startswith(path)


def test_an_integer_of_5000_digits_is_refused_by_the_schema() -> None:
    document = changed(EVENT, "run.iteration", 10**5000)

    assert [path for path, _ in validation.violations("loop_run_event", document)] == ["run.iteration"]


@pytest.mark.parametrize(("kind", "path"), places("integer"))
def test_an_integer_written_as_3_0_becomes_3(kind: str, path: str) -> None:
    document = changed(DOCUMENTS[kind], path, 3.0)
    validation.validate(kind, document)

    assert TO_MESSAGE[kind](document) == TO_MESSAGE[kind](changed(document, path, 3))
    owner, name = _owner(arrives(kind, TO_MESSAGE[kind](document)), path)
    assert repr(owner[name]) == "3"


def test_a_float_in_an_open_object_stays_a_float_when_an_integer_beside_it_is_written_as_3_0() -> None:
    raw = json_text.parse_object(b'{"a": 1.0, "b": 1e2}')
    document = changed(changed(EVENT, "event.raw", raw), "run.iteration", 3.0)

    assert TO_MESSAGE["loop_run_event"](document).event.raw.json == '{"a": 1.0, "b": 1e2}'


@pytest.mark.parametrize(("kind", "path"), places("number"))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_seconds_that_are_no_number_are_refused_by_the_schema(kind: str, path: str, value: float) -> None:
    assert refused_path(validation.validate, kind, changed(DOCUMENTS[kind], path, value)) == path
    message = TO_MESSAGE[kind](DOCUMENTS[kind])
    owner, field = _field(message, path)
    setattr(owner, field, value)
    assert refused_path(arrives, kind, message) == path


def test_seconds_beyond_a_double_are_refused() -> None:
    document = changed(REQUEST, "confirmation.timeoutSeconds", 10**400)

    assert refused_path(control_mirror.request_to_message, document) == "confirmation.timeoutSeconds"


@pytest.mark.parametrize("summary", [{"score": 0.5}, {"tokens": 2**70}])
def test_a_value_that_is_right_is_not_named_in_place_of_the_one_at_fault(summary: Json) -> None:
    document = changed(changed(SNAPSHOT, "run.summary", summary), "artifacts.state.sizeBytes", 1.5)

    assert refused_path(mirror.snapshot_to_message, document) == "artifacts.state.sizeBytes"


def test_seconds_are_not_named_in_place_of_an_integer_at_fault() -> None:
    document = changed(changed(RESULT, "confirmation.timeoutSeconds", 30.5), "journal.sequence", 1.5)

    assert refused_path(control_mirror.result_to_message, document) == "journal.sequence"


@pytest.mark.parametrize(
    ("path", "value"), [("run.iteration", "x"), ("run.iteration", True), ("event.name", None), ("event.role", 1)]
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path(path: str, value: Any) -> None:
    assert refused_path(mirror.event_to_message, changed(EVENT, path, value)) == path


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_lone_surrogate_is_refused_by_the_schema(kind: str) -> None:
    # A byte on the command line or in a path that is no UTF-8 arrives as a lone surrogate.
    named = {}
    for of_kind, path in places("string", "const", "enum"):
        if of_kind == kind:
            found = validation.violations(kind, changed(DOCUMENTS[kind], path, "a\udcff"))
            named[path] = [where for where, _ in found]

    assert {path: where for path, where in named.items() if where != [path]} == {}


@pytest.mark.parametrize(("kind", "path"), places("string", "const", "enum"))
def test_a_lone_surrogate_is_refused(kind: str, path: str) -> None:
    assert refused_path(TO_MESSAGE[kind], changed(DOCUMENTS[kind], path, "a\ud800")) == path


def test_a_lone_surrogate_in_a_list_or_in_a_further_gate_or_its_name_is_refused() -> None:
    command = changed(RESULT, "command", ["superloop", "\udfff"])
    gate = changed(SNAPSHOT, "health.gates.lifecycle", "\udfff")
    name = changed(SNAPSHOT, "health.gates", {**SNAPSHOT["health"]["gates"], "\ud800": "ok"})

    assert refused_path(control_mirror.result_to_message, command) == "command[1]"
    assert refused_path(mirror.snapshot_to_message, gate) == "health.gates.lifecycle"
    assert refused_path(mirror.snapshot_to_message, name) == "health.gates"


@pytest.mark.parametrize(("kind", "path"), places("open object"))
@pytest.mark.parametrize(
    ("value", "below"),
    [
        ({"a": [{"b": math.nan}]}, ".a[0].b"),
        ({"a": math.inf}, ".a"),
        ({"a": [1, -math.inf]}, ".a[1]"),
        ({"a": {"b": "\ud800"}}, ".a.b"),
        ({"a": {"\udfff": 1}}, ".a"),
        ({"\ud83d": 1}, ""),
        ({"a": {1: 2}}, ".a"),
        ({"a": (1,)}, ".a"),
        ({"a": b"bytes"}, ".a"),
    ],
)
def test_what_json_has_no_form_for_is_refused_inside_an_open_object(
    kind: str, path: str, value: Json, below: str
) -> None:
    assert refused_path(TO_MESSAGE[kind], changed(DOCUMENTS[kind], path, value)) == f"{path}{below}"


@pytest.mark.parametrize(("kind", "path"), places("enum"))
def test_a_word_that_an_enum_does_not_have_is_refused(kind: str, path: str) -> None:
    for word in ("novelty", "unspecified", ""):
        assert refused_path(TO_MESSAGE[kind], changed(DOCUMENTS[kind], path, word)) == path


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_missing_key_is_named_and_the_path_is_that_of_the_object_it_is_missing_from(kind: str) -> None:
    for path in required_paths(kind):
        owner, _, key = path.rpartition(".")
        document = without(DOCUMENTS[kind], path)
        for error in (refusal(TO_MESSAGE[kind], document), refusal(validation.validate, kind, document)):
            assert error.path == owner
            assert f'"{key}" is a required property' in error.message


def test_a_missing_key_is_named_however_deep_an_open_object_beside_it_is() -> None:
    document = without(changed(EVENT, "event.raw", json_text.parse_object(deep_text(MAX_DEPTH))), "cursor")

    for error in (
        refusal(validation.validate, "loop_run_event", document),
        refusal(mirror.event_to_message, document),
    ):
        assert error.path == ""


def required_paths(kind: str) -> list[str]:
    return [path for path, member in MEMBERS[kind].items() if member.required and not path.endswith(".*")]


@pytest.mark.parametrize(("kind", "path"), places("open object"))
def test_an_open_object_may_be_as_deep_as_a_text_and_no_deeper(kind: str, path: str) -> None:
    deepest = changed(DOCUMENTS[kind], path, json.loads(deep_text(MAX_DEPTH)))
    validation.validate(kind, deepest)
    assert arrives(kind, TO_MESSAGE[kind](deepest)) == deepest

    for depth in (MAX_DEPTH + 1, 5000):
        deeper = copy.deepcopy(DOCUMENTS[kind])
        owner, name = _owner(deeper, path)
        owner[name] = {}
        for _ in range(depth - 1):
            owner[name] = {"a": owner[name]}
        assert refused_path(TO_MESSAGE[kind], deeper).startswith(path)


def deep_text(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


# From messages: refused, and where.


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (kind, path)
        for kind, path in places("object", "open object", "enum")
        if MEMBERS[kind][path].required and not MEMBERS[kind][path].nullable
    ],
)
def test_a_required_part_that_is_unset_is_refused(kind: str, path: str) -> None:
    message = cleared(TO_MESSAGE[kind](DOCUMENTS[kind]), path)

    assert refused_path(arrives, kind, message) == path


@pytest.mark.parametrize(
    ("kind", "path"), [place for place in places("enum") if place != ("control_request", "intent")]
)
def test_an_enum_number_unknown_here_is_refused(kind: str, path: str) -> None:
    message = TO_MESSAGE[kind](DOCUMENTS[kind])
    owner, field = _field(message, path)
    setattr(owner, field, 99)

    assert refused_path(FROM_MESSAGE[kind], message) == path


@pytest.mark.parametrize("number", [0, 7, -1])
def test_an_intent_unknown_here_becomes_its_number_as_text_and_is_refused_as_unsupported(number: int) -> None:
    message = TO_MESSAGE["control_request"](REQUEST)
    message.intent = number

    request = control_mirror.request_from_message(message)

    assert request == {**REQUEST, "intent": str(number)}
    with pytest.raises(IntentUnsupported, match=f"^intent '{number}' is not valid: cancel, approve or reject$"):
        check_request(request)


@pytest.mark.parametrize(("kind", "path"), places("open object"))
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "null",
        "[]",
        "3",
        '"{}"',
        "{} {}",
        "\ufeff{}",
        '{"a":NaN}',
        '{"a":[Infinity]}',
        '{"a":-Infinity}',
        '{"a":1e400}',
        r'{"a":"\ud800"}',
        r'{"\udc00":1}',
        '{"a":"\x00"}',
        "{'a':1}",
        f'{{"a":{"1" * 5000}}}',
        '{"a":' * 257 + "1" + "}" * 257,
    ],
    ids=lambda text: text[:16],
)
def test_a_text_that_is_no_json_object_is_refused(kind: str, path: str, text: str) -> None:
    message = TO_MESSAGE[kind](DOCUMENTS[kind])
    owner, field = _field(message, path)
    getattr(owner, field).json = text

    assert refused_path(FROM_MESSAGE[kind], message) == path


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, path in places("open object") if MEMBERS[kind][path].required]
)
def test_an_open_object_that_is_there_and_empty_is_refused_where_unset_means_null(kind: str, path: str) -> None:
    message = TO_MESSAGE[kind](DOCUMENTS[kind])
    owner, field = _field(message, path)
    getattr(owner, field).ClearField("json")

    assert refused_path(FROM_MESSAGE[kind], message) == path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("loop_run_snapshot", envelopes_pb2.SnapshotEnvelope()),
        ("loop_run_event", envelopes_pb2.EventEnvelope()),
        ("control_request", service_pb2.ExecuteControlRequest()),
        ("control_result", control_pb2.ControlResult()),
    ],
)
def test_an_empty_message_is_refused(kind: str, message: Message) -> None:
    with pytest.raises(ContractError):
        arrives(kind, message)


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, path in places("integer") if MEMBERS[kind][path].bounds[0] == 0]
)
def test_a_number_on_the_wire_that_the_schema_refuses_is_refused(kind: str, path: str) -> None:
    message = TO_MESSAGE[kind](changed(DOCUMENTS[kind], path, -1))

    assert refused_path(arrives, kind, message) == path


def test_a_further_gate_with_the_name_of_a_fixed_one_is_refused() -> None:
    for name in ("tests", "approval"):
        message = mirror.snapshot_to_message(SNAPSHOT)  # type: ignore[arg-type]  # a full document
        message.health.gates.additional[name] = "forged"

        assert refused_path(mirror.snapshot_from_message, message) == f"health.gates.{name}"
