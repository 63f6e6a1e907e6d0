"""The drift gate: where a JSON Schema and its protobuf mirror, or its TypedDict, say different things of one document.

Each side is flattened to paths (run.summary, artifacts.state.path; health.gates.* for keys not named) with the form
that stands there; then the two are compared. The rule for presence is the one at the top of envelopes.proto.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from google.protobuf.descriptor_pb2 import FieldDescriptorProto

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

Json = dict[str, Any]

_NOTES = {"title", "description", "$comment", "$id", "$schema", "$defs"}
"""Keywords that allow and forbid nothing."""
_LIMITS = {"minLength", "maxLength", "pattern", "format", "minimum", "maximum"}
"""Keywords that narrow a value and leave its form alone; only an integer's bounds count here."""
_INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
_FORMS = {
    "string": "string",
    "const": "string",
    "number": "double",
    "boolean": "bool",
    "open object": "JsonObject",
    "further strings": "map<string, string>",
}
_WRAPPERS = {"NullableString": {"value": "optional string"}, "JsonObject": {"json": "optional string"}}
_PYTHON_NAMES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "strings": "list[str]",
    "open object": "dict[str, Any]",
    "object": "TypedDict",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """What a schema says of one value in a document."""

    type: str
    """A JSON type; or const, enum, strings (an array), open object, further strings; or what can't be mirrored."""
    required: bool
    nullable: bool
    values: tuple[str, ...] = ()
    """Of a const or enum."""
    bounds: tuple[float, float] = (float("-inf"), float("inf"))
    """Of an integer, both inclusive."""


def differences(kind: str, schema: Json, registry_of_schemas: Mapping[str, Json], descriptor: Descriptor) -> list[str]:
    """A line for each path where `schema` and the message disagree; none: the message mirrors the schema."""
    needed = {path: _mirrored_by(member) for path, member in members(schema, registry_of_schemas).items()}
    return _compared(kind, needed, dict(_fields(descriptor)), "proto")


def shape_differences(kind: str, schema: Json, registry_of_schemas: Mapping[str, Json], shape: type[Any]) -> list[str]:
    """A line for each path where `schema` and the TypedDict disagree.

    This sees what the wire has one form for: a message may be unset because it is absent or because it is null.
    """
    told = members(schema, registry_of_schemas)
    needed = {}
    for path, member in told.items():
        if f"{path}.*" in told:
            needed[path] = (_presence("dict[str, str]", member.required, member.nullable),)
        elif f"{path.rpartition('.')[0]}.*" not in told:
            needed[path] = (_presence(_python_form(member), member.required, member.nullable),)
    return _compared(kind, needed, dict(_keys(shape)), "TypedDict")


def members(schema: Json, registry_of_schemas: Mapping[str, Json]) -> dict[str, Member]:
    """Every value of a document by its path, as `schema` has it; references are followed."""
    by_id = {document["$id"]: document for document in (*registry_of_schemas.values(), schema)}
    return dict(_below("", schema, schema, by_id))


def _compared(kind: str, needed: Mapping[str, tuple[str, ...]], found: Mapping[str, str], side: str) -> list[str]:
    lines = []
    for path in sorted(needed.keys() | found.keys()):
        if path not in found:
            lines.append(f"{kind}: {path}: in the schema, not in the {side}")
        elif path not in needed:
            lines.append(f"{kind}: {path}: in the {side}, not in the schema")
        elif found[path] not in needed[path]:
            wanted = " or ".join(needed[path]) or "what has no form there"
            lines.append(f"{kind}: {path}: the schema needs {wanted}, the {side} has {found[path]}")
    return lines


# The schema.


def _below(path: str, node: Json, home: Json, by_id: Mapping[str, Json]) -> Iterator[tuple[str, Member]]:
    prefix = f"{path}." if path else ""
    for name, below in node.get("properties", {}).items():
        inner, its_home, nullable = _followed(below, home, by_id)
        member = _read(inner, required=name in node.get("required", ()), nullable=nullable)
        yield f"{prefix}{name}", member
        if member.type == "object":
            yield from _below(f"{prefix}{name}", inner, its_home, by_id)
    for name in set(node.get("required", ())) - node.get("properties", {}).keys():
        yield f"{prefix}{name}", Member(type="required, and not described", required=True, nullable=False)
    further = node.get("additionalProperties", True)
    if further is not False:
        strings = further is not True and set(further) - _NOTES == {"type"} and further["type"] == "string"
        member_type = "further strings" if strings else f"further keys of {further}"
        yield f"{prefix}*", Member(type=member_type, required=True, nullable=False)


def _followed(node: Json, home: Json, by_id: Mapping[str, Json]) -> tuple[Json, Json, bool]:
    """What `node` allows besides null, the schema document that stands in, and whether null is allowed."""
    nullable = False
    while set(node) - _NOTES in ({"$ref"}, {"anyOf"}):
        if "$ref" in node:
            address, _, pointer = node["$ref"].partition("#")
            home = by_id[address] if address else home
            node = home
            for step in pointer.split("/")[1:]:
                node = node[step]
        else:
            others = [option for option in node["anyOf"] if option != {"type": "null"}]
            nullable = nullable or len(others) < len(node["anyOf"])
            if len(others) != 1:
                break
            node = others[0]
    return node, home, nullable


def _read(node: Json, *, required: bool, nullable: bool) -> Member:
    keywords = set(node) - _NOTES - _LIMITS
    if keywords in ({"enum"}, {"const"}):
        values = node.get("enum") or [node["const"]]
        words = [value for value in values if isinstance(value, str)]
        if all(value is None or isinstance(value, str) for value in values):
            return Member(
                type=keywords.pop(), required=required, nullable=nullable or None in values, values=tuple(sorted(words))
            )
    types = node.get("type", ())
    types = [types] if isinstance(types, str) else list(types)
    nullable = nullable or "null" in types
    member_type = str({key: node[key] for key in sorted(keywords)})
    match [name for name in types if name != "null"]:
        case ["string" | "integer" | "number" | "boolean" as scalar] if keywords == {"type"}:
            member_type = scalar
        case ["array"] if keywords == {"type", "items"} and node["items"] == {"type": "string"}:
            member_type = "strings"
        case ["object"] if keywords == {"type"}:
            member_type = "open object"
        case ["object"] if keywords <= {"type", "properties", "required", "additionalProperties"}:
            member_type = "object"
    bounds = (node.get("minimum", float("-inf")), node.get("maximum", float("inf")))
    return Member(type=member_type, required=required, nullable=nullable, bounds=bounds)


# The proto.


def _mirrored_by(member: Member) -> tuple[str, ...]:
    """The forms of field that may mirror `member`; none where the rule for presence has none."""
    plain = member.required and not member.nullable
    either = member.required or not member.nullable
    low, high = member.bounds
    match member.type:
        case "object":
            return ("message",) if either else ()
        case "enum":
            form = f"enum of {', '.join(member.values)}"
            # Never `optional`: the zero value stands for unset.
            return (form,) if either else ()
        case "strings":
            return ("repeated string",) if plain else ()
        case "integer":
            forms = [name for name, (least, most) in _INTEGERS.items() if least <= low and high <= most]
        case scalar:
            forms = [_FORMS[scalar]] if scalar in _FORMS else []
    if plain or member.type in {"open object", "further strings"}:
        return tuple(forms)
    if either:
        return tuple(f"optional {form}" for form in forms)
    return ("NullableString",) if forms == ["string"] else ()


def _fields(descriptor: Descriptor, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in descriptor.fields:
        form = _field_form(field)
        named = "*" if form.startswith("map<") and field.name == "additional" else field.json_name
        yield f"{prefix}{named}", form
        if form == "message" and field.message_type is not None:
            yield from _fields(field.message_type, f"{prefix}{field.json_name}.")


def _field_form(field: FieldDescriptor) -> str:
    form = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()  # type: ignore[arg-type]  # its stub has int
    if field.enum_type is not None:
        form = f"enum of {', '.join(_words(field.enum_type))}"
    if (inner := field.message_type) is not None:
        if inner.GetOptions().map_entry:
            key, value = (_field_form(inner.fields_by_name[name]) for name in ("key", "value"))
            return f"map<{key}, {value}>"
        if inner.name in _WRAPPERS:
            content = dict(_fields(inner))
            form = inner.name if content == _WRAPPERS[inner.name] else f"{inner.name} of {content}"
    if field.is_repeated:
        return f"repeated {form}"
    oneof = field.containing_oneof
    if oneof is not None and oneof.name != f"_{field.name}":
        return f"{form} in oneof {oneof.name}"
    return f"optional {form}" if field.has_presence and field.message_type is None else form


def _words(enum: EnumDescriptor) -> list[str]:
    """The contract's words for an enum's values; the zero value, where it is unspecified, stands for unset."""
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
    return sorted(
        value.name.removeprefix(prefix).lower()
        for value in enum.values
        if (value.number, value.name) != (0, f"{prefix}UNSPECIFIED")
    )


# The TypedDicts.


def _python_form(member: Member) -> str:
    if member.type in {"const", "enum"}:
        return f"one of {', '.join(member.values)}"
    return _PYTHON_NAMES.get(member.type, member.type)


def _keys(shape: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    # Not by __optional_keys__: it is empty where annotations are strings, because NotRequired is not seen in them.
    for name, told in get_type_hints(shape, include_extras=True).items():
        required = get_origin(told) is not NotRequired
        hint = told if required else get_args(told)[0]
        options = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
        others = [option for option in options if option is not NoneType]
        form = " | ".join(_hint_form(option) for option in others)
        yield f"{prefix}{name}", _presence(form, required, len(others) < len(options))
        if len(others) == 1 and is_typeddict(others[0]):
            yield from _keys(others[0], f"{prefix}{name}.")


def _hint_form(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(sorted(get_args(hint)))}"
    if is_typeddict(hint):
        return "TypedDict"
    return str(hint).replace("typing.", "") if get_args(hint) else str(hint.__name__)


def _presence(form: str, required: bool, nullable: bool) -> str:  # noqa: FBT001  # the two facts it writes down
    return f"{'required' if required else 'optional'} {form}{' or null' if nullable else ''}"
