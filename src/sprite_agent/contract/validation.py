"""Decides whether a document keeps the contract: the JSON Schemas, compiled once, formats asserted."""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING, Any

import jsonschema_rs

from sprite_agent.contract import json_text
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_PREFIX = "urn:opsmgr:schema:v1:"


def validate(kind: str, document: Any) -> None:
    """Returns if `document` is what schema/<kind>.schema.json says.

    The document must be made of JSON values, as parsing and the mirror give them; `violations`
    finds fault with others too.

    Raises:
        ContractError: it is not; the path says where, the message what was expected.
    """
    if is_valid(kind, document):
        return
    for path, message in violations(kind, document):
        raise ContractError(message, path=path)


def is_valid(kind: str, document: Any) -> bool:
    """Whether `document` is what schema/<kind>.schema.json says."""
    try:
        return _validator(kind).is_valid(document)
    except ValueError:
        return False  # a value that is no JSON value: violations() says where


def violations(kind: str, document: Any) -> list[tuple[str, str]]:
    """Every (path, message) by which `document` breaks schema `kind`; empty when it keeps it."""
    refused: ValueError | None = None
    try:
        found = [
            (_dotted(error.instance_path), _shortened(error.message))
            for outer in _validator(kind).iter_errors(document)
            for error in _innermost(outer)
        ]
        if found:
            return found
    except ValueError as error:
        refused = error
    # What the schema has no rule for (a lone surrogate) or can't look at (a huge number) is no JSON value.
    try:
        json_text.encode(document)
    except ContractError as error:
        return [(error.path, error.message.removeprefix(f"{error.path}: "))]
    return [("", _shortened(str(refused)))] if refused else []


@functools.cache
def schemas() -> dict[str, dict[str, Any]]:
    """Every schema by kind (its file's name before .schema.json)."""
    folder = resources.files("sprite_agent") / "schema"
    suffix = ".schema.json"
    return {
        file.name.removesuffix(suffix): json_text.parse(file.read_bytes())
        for file in folder.iterdir()
        if file.name.endswith(suffix)
    }


@functools.cache
def _validator(kind: str) -> jsonschema_rs.Draft202012Validator:
    return _compiled(schemas()[kind])


def members_check(kind: str, places: Mapping[str, str], required: Sequence[str]) -> Callable[[Any], bool]:
    """What tells of a list of objects whether a document of `kind` may have what each has in members of these names.

    `places`: by name the property of the document, as a path in its schema. The objects must be made of JSON values, as
    parsing gives them. To be made once: it takes a millisecond.
    """
    members = {name: {"$ref": f"{_PREFIX}{kind}#/properties/{place}"} for name, place in places.items()}
    return _compiled({"items": {"properties": members, "required": list(required)}}).is_valid


def _compiled(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    registry = jsonschema_rs.Registry([(f"{_PREFIX}{name}", found) for name, found in schemas().items()])
    return jsonschema_rs.Draft202012Validator(schema, registry=registry, validate_formats=True)


def _innermost(error: jsonschema_rs.ValidationError) -> list[jsonschema_rs.ValidationError]:
    """Our alternatives are all "this or null": what is wrong with a value is what "this" says."""
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.AnyOf):
        return [inner for found in error.kind.context[0] for inner in _innermost(found)]
    return [error]


def _dotted(path: list[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shortened(message: str, limit: int = 300) -> str:
    return message if len(message) <= limit else f"{message[:limit]} … ({len(message)} characters)"
