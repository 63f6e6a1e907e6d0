"""The schemas, the protos and the TypedDicts say the same of the four documents; and the gate that says so can fail."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict

import pytest
from google.protobuf import duration_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from conformance import drift
from sprite_agent.contract import envelopes, validation
from sprite_agent.v1 import control_pb2, envelopes_pb2, service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.descriptor import Descriptor
    from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto

    Json = dict[str, Any]

MESSAGES: dict[str, Descriptor] = {
    "loop_run_snapshot": envelopes_pb2.SnapshotEnvelope.DESCRIPTOR,
    "loop_run_event": envelopes_pb2.EventEnvelope.DESCRIPTOR,
    "control_request": service_pb2.ExecuteControlRequest.DESCRIPTOR,
    "control_result": control_pb2.ControlResult.DESCRIPTOR,
}
SHAPES: dict[str, type[Any]] = {
    "loop_run_snapshot": envelopes.SnapshotEnvelope,
    "loop_run_event": envelopes.EventEnvelope,
    "control_request": envelopes.ControlRequest,
    "control_result": envelopes.ControlResult,
}
SCHEMAS = validation.schemas()
WRAPPERS = {"NullableString", "JsonObject"}


# Today's files.


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_mirrors_its_schema(kind: str) -> None:
    assert drift.differences(kind, SCHEMAS[kind], SCHEMAS, MESSAGES[kind]) == []


@pytest.mark.parametrize("kind", SHAPES)
def test_a_typed_dict_has_the_keys_and_types_of_its_schema(kind: str) -> None:
    assert drift.shape_differences(kind, SCHEMAS[kind], SCHEMAS, SHAPES[kind]) == []


def test_every_message_and_enum_of_the_mirror_is_part_of_a_document() -> None:
    reached = {place.message for place in _places()} | {place.enum for place in _places()} | WRAPPERS
    files = (envelopes_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR)
    declared = {name for file in files for name in (*file.message_types_by_name, *file.enum_types_by_name)}

    assert declared - reached == set()


# The gate sees a changed schema: each change is made at every place of every document where it can be made.


def remove_it(owner: Json, name: str) -> bool:
    del owner["properties"][name]
    return True


def rename_it(owner: Json, name: str) -> bool:
    owner["properties"][f"{name}Renamed"] = owner["properties"].pop(name)
    return True


def drop_required(owner: Json, name: str) -> bool:
    if name not in owner.get("required", ()):
        return False
    owner["required"].remove(name)
    return True


def require_it(owner: Json, name: str) -> bool:
    if name in owner.get("required", ()):
        return False
    owner["required"] = [*owner.get("required", ()), name]
    return True


def make_it_nullable(owner: Json, name: str) -> bool:
    if _allows_null(owner["properties"][name]):
        return False
    owner["properties"][name] = {"anyOf": [owner["properties"][name], {"type": "null"}]}
    return True


def forbid_null(owner: Json, name: str) -> bool:
    below = owner["properties"][name]
    if not _allows_null(below):
        return False
    if "anyOf" in below:
        owner["properties"][name] = below["anyOf"][0]
    else:
        below["type"] = below["type"][0]
    return True


def unbound_it(owner: Json, name: str) -> bool:
    below = owner["properties"][name]
    return below.get("type") in ("integer", ["integer", "null"]) and below.pop("maximum") is not None


def add_a_word(owner: Json, name: str) -> bool:
    return _change_words(owner, name, lambda words: [*words, "novelty"])


def remove_a_word(owner: Json, name: str) -> bool:
    return _change_words(owner, name, lambda words: words[1:])


def rename_a_word(owner: Json, name: str) -> bool:
    return _change_words(owner, name, lambda words: [*words[:-1], f"{words[-1]}_renamed"])


def change_a_const(owner: Json, name: str) -> bool:
    below = owner["properties"][name]
    return "const" in below and bool(below.update(const="novelty") or True)


def open_it(owner: Json, name: str) -> bool:
    below = _object_in(owner["properties"][name])
    return below is not None and below.pop("additionalProperties") is not None


def _change_words(owner: Json, name: str, change: Callable[[list[str]], list[str]]) -> bool:
    below = owner["properties"][name]
    for option in (below, *below.get("anyOf", ())):
        if "enum" in option:
            option["enum"] = change(option["enum"])
            return True
    return False


def _to(new: Json) -> Callable[[Json, str], bool]:
    def retype_it(owner: Json, name: str) -> bool:
        below = owner["properties"][name]
        plain = next(option for option in below.get("anyOf", (below,)) if option != {"type": "null"})
        if plain.get("type") in (new["type"], [new["type"], "null"]) and ("properties" in plain) == (
            "properties" in new
        ):
            return False
        owner["properties"][name] = {"anyOf": [new, {"type": "null"}]} if _allows_null(below) else new
        return True

    return retype_it


@pytest.mark.parametrize(
    "change",
    [
        remove_it,
        rename_it,
        drop_required,
        require_it,
        make_it_nullable,
        forbid_null,
        unbound_it,
        add_a_word,
        remove_a_word,
        rename_a_word,
        change_a_const,
        pytest.param(_to({"type": "string"}), id="make_it_a_string"),
        pytest.param(_to({"type": "integer", "minimum": 0, "maximum": 1}), id="make_it_an_integer"),
        pytest.param(_to({"type": "number"}), id="make_it_a_number"),
        pytest.param(_to({"type": "boolean"}), id="make_it_a_boolean"),
        pytest.param(_to({"type": "array", "items": {"type": "string"}}), id="make_it_an_array"),
        pytest.param(_to({"type": "array", "items": {"type": "integer"}}), id="make_it_an_array_of_integers"),
        pytest.param(_to({"type": "object"}), id="make_it_an_open_object"),
        pytest.param(
            _to({"type": "object", "additionalProperties": False, "properties": {}}), id="make_it_a_closed_object"
        ),
    ],
)
def test_a_changed_property_is_caught_wherever_it_stands(change: Callable[[Json, str], bool]) -> None:
    changed = 0
    for kind, schema in _inlined_schemas().items():
        for path in _paths(schema):
            mutant = copy.deepcopy(schema)
            if change(*_owner(mutant, path)):
                changed += 1
                assert _named(kind, path, _lines(kind, mutant)), f"nothing saw the change of {path} in {kind}"
    assert changed


def test_an_added_property_is_caught_wherever_it_stands() -> None:
    for kind, schema in _inlined_schemas().items():
        for path in ["", *_paths(schema)]:
            mutant = copy.deepcopy(schema)
            owner = _object_in(mutant if not path else _property(mutant, path))
            if owner is not None:
                owner["properties"]["novelty"] = {"type": "string"}
                added = f"{path}.novelty".lstrip(".")
                assert f"{kind}: {added}: in the schema, not in the proto" in _lines(kind, mutant)


def test_an_object_that_is_no_longer_closed_is_caught() -> None:
    for kind, schema in _inlined_schemas().items():
        for path in _paths(schema):
            mutant = copy.deepcopy(schema)
            if open_it(*_owner(mutant, path)):
                assert _named(kind, f"{path}.*", _lines(kind, mutant)), f"nothing saw {path} of {kind} opened"
        open_document = {**schema, "additionalProperties": True}
        assert f"{kind}: *: in the schema, not in the proto" in _lines(kind, open_document)


def test_a_shared_definition_that_changes_is_caught_at_each_place_that_refers_to_it() -> None:
    schemas = copy.deepcopy(SCHEMAS)
    schemas["common"]["$defs"]["artifactRef"]["properties"]["sha256"]["type"] = "string"

    lines = drift.differences("loop_run_snapshot", SCHEMAS["loop_run_snapshot"], schemas, MESSAGES["loop_run_snapshot"])

    artifacts = ("activeRun", "approval", "events", "heartbeat", "runSummary", "state")
    wrong = "the schema needs string, the proto has optional string"
    assert lines == [f"loop_run_snapshot: artifacts.{name}.sha256: {wrong}" for name in artifacts]


def test_a_required_key_that_is_not_described_is_caught() -> None:
    schema = copy.deepcopy(SCHEMAS["loop_run_event"])
    schema["properties"]["run"]["required"].append("stage")

    assert "loop_run_event: run.stage: in the schema, not in the proto" in _lines("loop_run_event", schema)


def test_a_keyword_the_gate_does_not_know_is_a_difference_and_not_passed_over() -> None:
    schema = copy.deepcopy(SCHEMAS["loop_run_event"])
    schema["properties"]["traceId"]["oneOf"] = [{"type": "string"}, {"type": "integer"}]

    assert _named("loop_run_event", "traceId", _lines("loop_run_event", schema))


def test_further_gates_that_are_no_strings_are_caught() -> None:
    schemas = copy.deepcopy(SCHEMAS)
    schemas["common"]["$defs"]["gates"]["additionalProperties"] = {"type": "integer"}

    lines = drift.differences("loop_run_snapshot", SCHEMAS["loop_run_snapshot"], schemas, MESSAGES["loop_run_snapshot"])

    assert lines == [
        "loop_run_snapshot: health.gates.*: the schema needs what has no form there, the proto has map<string, string>"
    ]


# The gate sees a changed TypedDict.


class RunThatDrifted(TypedDict):
    """The run of an event, wrong in each of its keys."""

    runId: str | None
    iteration: NotRequired[int]
    stage: Literal["test", "review"]


def test_a_changed_typed_dict_is_caught() -> None:
    run = {"$id": "urn:run", **SCHEMAS["loop_run_event"]["properties"]["run"]}

    assert drift.shape_differences("run", run, SCHEMAS, RunThatDrifted) == [
        "run: iteration: the schema needs required int, the TypedDict has optional int",
        "run: runId: the schema needs required str, the TypedDict has required str or null",
        "run: stage: in the TypedDict, not in the schema",
    ]


# The gate sees a changed proto.


def delete_field(message: DescriptorProto, field: FieldDescriptorProto) -> bool:
    _drop_optional(message, field)
    message.field.remove(field)
    return True


def rename_field(message: DescriptorProto, field: FieldDescriptorProto) -> bool:
    optional = field.proto3_optional
    _drop_optional(message, field)
    field.name += "_renamed"
    field.ClearField("json_name")
    if optional:
        _make_optional(message, field)
    return True


def retype_field(message: DescriptorProto, field: FieldDescriptorProto) -> bool:
    kinds = FieldDescriptorProto
    field.type = {
        kinds.TYPE_STRING: kinds.TYPE_BYTES,
        kinds.TYPE_INT64: kinds.TYPE_INT32,
        kinds.TYPE_INT32: kinds.TYPE_UINT32,
        kinds.TYPE_DOUBLE: kinds.TYPE_FLOAT,
        kinds.TYPE_BOOL: kinds.TYPE_INT64,
    }.get(field.type, kinds.TYPE_STRING)
    field.ClearField("type_name")
    return True


def flip_optional(message: DescriptorProto, field: FieldDescriptorProto) -> bool:
    if field.type == FieldDescriptorProto.TYPE_MESSAGE or field.label == FieldDescriptorProto.LABEL_REPEATED:
        return False
    if field.proto3_optional:
        _drop_optional(message, field)
    else:
        _make_optional(message, field)
    return True


def flip_repeated(message: DescriptorProto, field: FieldDescriptorProto) -> bool:
    if field.type_name.endswith("Entry"):
        return False
    _drop_optional(message, field)
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    field.label = FieldDescriptorProto.LABEL_OPTIONAL if repeated else FieldDescriptorProto.LABEL_REPEATED
    return True


def put_it_in_a_oneof(message: DescriptorProto, field: FieldDescriptorProto) -> bool:
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return False
    _drop_optional(message, field)
    # After the oneofs of the file, before those that stand for `optional`.
    for other in message.field:
        if other.HasField("oneof_index"):
            other.oneof_index += 1
    names = ["choice", *(oneof.name for oneof in message.oneof_decl)]
    del message.oneof_decl[:]
    for name in names:
        message.oneof_decl.add(name=name)
    field.oneof_index = 0
    return True


@pytest.mark.parametrize(
    "change", [delete_field, rename_field, retype_field, flip_optional, flip_repeated, put_it_in_a_oneof]
)
def test_a_changed_field_is_caught_wherever_its_message_is_used(
    change: Callable[[DescriptorProto, FieldDescriptorProto], bool],
) -> None:
    changed = 0
    for message, field in sorted({(place.message, place.field) for place in _places()}):
        files = _files()
        if change(_message(files, message), _field(_message(files, message), field)):
            changed += 1
            found = _proto_lines(files)
            for place in _places():
                if (place.message, place.field) == (message, field):
                    named = _named(place.kind, place.path, found[place.kind])
                    assert named, f"nothing saw the change of {message}.{field} at {place.path}"
    assert changed


def test_an_added_field_is_caught_wherever_its_message_is_used() -> None:
    for message in sorted({place.message for place in _places()}):
        files = _files()
        _message(files, message).field.add(
            name="novel_field",
            number=1000,
            type=FieldDescriptorProto.TYPE_STRING,
            label=FieldDescriptorProto.LABEL_OPTIONAL,
        )
        found = _proto_lines(files)
        for place in _places():
            if place.message == message:
                added = f"{place.path.rpartition('.')[0]}.novelField".lstrip(".")
                assert f"{place.kind}: {added}: in the proto, not in the schema" in found[place.kind]


def add_a_value(enum: EnumDescriptorProto) -> None:
    enum.value.add(name=f"{enum.value[0].name.removesuffix('UNSPECIFIED')}NOVELTY", number=1000)


def delete_a_value(enum: EnumDescriptorProto) -> None:
    del enum.value[-1]


def rename_a_value(enum: EnumDescriptorProto) -> None:
    enum.value[-1].name += "_RENAMED"


def drop_a_prefix(enum: EnumDescriptorProto) -> None:
    enum.value[-1].name = f"BARE_{enum.value[-1].name.rpartition('_')[2]}"


def give_zero_a_meaning(enum: EnumDescriptorProto) -> None:
    enum.value[0].name = enum.value[0].name.replace("UNSPECIFIED", "NOVELTY")


@pytest.mark.parametrize("change", [add_a_value, delete_a_value, rename_a_value, drop_a_prefix, give_zero_a_meaning])
def test_a_changed_enum_is_caught_wherever_it_is_used(change: Callable[[EnumDescriptorProto], None]) -> None:
    for name in sorted({place.enum for place in _places()} - {""}):
        files = _files()
        change(next(enum for file in files for enum in file.enum_type if enum.name == name))
        found = _proto_lines(files)
        for place in _places():
            if place.enum == name:
                assert _named(place.kind, place.path, found[place.kind]), f"nothing saw the change of {name}"


@pytest.mark.parametrize(
    ("wrapper", "place"),
    [("NullableString", "loop_run_event: traceId: "), ("JsonObject", "loop_run_event: event.raw: ")],
)
def test_a_wrapper_that_can_no_longer_be_empty_is_caught(wrapper: str, place: str) -> None:
    files = _files()
    message = _message(files, wrapper)
    _drop_optional(message, message.field[0])

    assert any(line.startswith(place) for line in _proto_lines(files)["loop_run_event"])


def test_further_gates_under_another_name_or_of_another_type_are_caught() -> None:
    for change in ("name", "type"):
        files = _files()
        gates = _message(files, "Gates")
        if change == "name":
            field = _field(gates, "additional")
            field.name, field.type_name = "more", ".sprite_agent.v1.Gates.MoreEntry"
            field.ClearField("json_name")
            gates.nested_type[0].name = "MoreEntry"
        else:
            gates.nested_type[0].field[1].type = FieldDescriptorProto.TYPE_INT64

        assert _named("loop_run_snapshot", "health.gates.*", _proto_lines(files)["loop_run_snapshot"])


def test_a_proto_built_anew_and_a_schema_without_references_say_what_they_said_before() -> None:
    today = {kind: drift.differences(kind, SCHEMAS[kind], SCHEMAS, MESSAGES[kind]) for kind in MESSAGES}
    inlined = _inlined_schemas()

    assert _proto_lines(_files()) == today
    assert {kind: drift.differences(kind, inlined[kind], {}, MESSAGES[kind]) for kind in MESSAGES} == today


# What the tests above are made of.


def _lines(kind: str, schema: Json) -> list[str]:
    """What the gate says of the proto and of the TypedDict.

    The proto alone is not enough: there, a message that is absent and one that is null look the same.
    """
    return [
        *drift.differences(kind, schema, SCHEMAS, MESSAGES[kind]),
        *drift.shape_differences(kind, schema, SCHEMAS, SHAPES[kind]),
    ]


def _named(kind: str, path: str, lines: list[str]) -> bool:
    return any(line.startswith(f"{kind}: {path}: ") for line in lines)


def _inlined_schemas() -> dict[str, Json]:
    return {kind: {**_inlined(SCHEMAS[kind], SCHEMAS[kind]), "$id": SCHEMAS[kind]["$id"]} for kind in MESSAGES}


def _inlined(node: Any, home: Json) -> Any:
    """A deep copy of `node` with its references replaced by what they refer to, so that one place can be changed."""
    if isinstance(node, list):
        return [_inlined(item, home) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        address, _, pointer = node["$ref"].partition("#/$defs/")
        home = next(schema for schema in SCHEMAS.values() if schema["$id"] == address) if address else home
        return _inlined(home["$defs"][pointer], home)
    return {key: _inlined(item, home) for key, item in node.items() if key != "$defs"}


def _object_in(node: Json) -> Json | None:
    """The object with named properties that `node` allows, if it does."""
    options: list[Json] = [node, *node.get("anyOf", ())]
    return next((option for option in options if "properties" in option), None)


def _paths(schema: Json, above: str = "") -> Iterator[str]:
    for name, below in schema["properties"].items():
        yield f"{above}{name}"
        inner = _object_in(below)
        if inner is not None:
            yield from _paths(inner, f"{above}{name}.")


def _owner(schema: Json, path: str) -> tuple[Json, str]:
    """The object that has the property at `path`, and the property's name."""
    above, _, name = path.rpartition(".")
    owner = _object_in(_property(schema, above)) if above else schema
    assert owner is not None
    return owner, name


def _property(schema: Json, path: str) -> Json:
    owner, name = _owner(schema, path)
    below: Json = owner["properties"][name]
    return below


def _allows_null(node: Json) -> bool:
    return {"type": "null"} in node.get("anyOf", ()) or "null" in node.get("type", ())


class Place(NamedTuple):
    """Where a field of today's protos stands in the documents."""

    kind: str
    path: str
    message: str
    field: str
    enum: str
    """Name of the field's enum, if it has one."""


def _places() -> list[Place]:
    return [place for kind, message in MESSAGES.items() for place in _places_below(kind, message, "")]


def _places_below(kind: str, message: Descriptor, above: str) -> Iterator[Place]:
    for field in message.fields:
        inner = field.message_type
        is_map = inner is not None and inner.GetOptions().map_entry
        path = f"{above}{'*' if is_map else field.json_name}"
        yield Place(kind, path, message.name, field.name, field.enum_type.name if field.enum_type is not None else "")
        if inner is not None and not is_map and inner.name not in WRAPPERS:
            yield from _places_below(kind, inner, f"{path}.")


def _files() -> list[FileDescriptorProto]:
    """Copies of today's protos, each after those it imports."""
    files = []
    for descriptor in (
        duration_pb2.DESCRIPTOR,
        envelopes_pb2.DESCRIPTOR,
        control_pb2.DESCRIPTOR,
        service_pb2.DESCRIPTOR,
    ):
        files.append(FileDescriptorProto())
        descriptor.CopyToProto(files[-1])
    return files


def _message(files: list[FileDescriptorProto], name: str) -> DescriptorProto:
    return next(message for file in files for message in file.message_type if message.name == name)


def _field(message: DescriptorProto, name: str) -> FieldDescriptorProto:
    return next(field for field in message.field if field.name == name)


def _proto_lines(files: list[FileDescriptorProto]) -> dict[str, list[str]]:
    pool = DescriptorPool()
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return {
        kind: drift.differences(kind, SCHEMAS[kind], SCHEMAS, pool.FindMessageTypeByName(message.full_name))
        for kind, message in MESSAGES.items()
    }


def _drop_optional(message: DescriptorProto, field: FieldDescriptorProto) -> None:
    """What protoc writes when the word `optional` is deleted: the oneof that stands for it goes too."""
    if not field.proto3_optional:
        return
    gone = field.oneof_index
    field.ClearField("proto3_optional")
    field.ClearField("oneof_index")
    del message.oneof_decl[gone]
    for other in message.field:
        if other.HasField("oneof_index") and other.oneof_index > gone:
            other.oneof_index -= 1


def _make_optional(message: DescriptorProto, field: FieldDescriptorProto) -> None:
    field.proto3_optional = True
    field.oneof_index = len(message.oneof_decl)
    message.oneof_decl.add(name=f"_{field.name}")
