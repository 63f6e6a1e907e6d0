"""The single values of the mirror: nullable text, open objects, enums, and errors that name a path."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sprite_agent.contract import json_text
from sprite_agent.contract.json_text import OpenObject
from sprite_agent.contract.validation import violations
from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.message import Message

    from sprite_agent.v1 import envelopes_pb2

_P = ParamSpec("_P")
_M = TypeVar("_M", bound="Message")


class Enumeration:
    """One enum's names in the contract and its numbers on the wire; 0 is unset."""

    def __init__(self, descriptor: EnumDescriptor) -> None:
        prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
        self.names = {
            number: value.name.removeprefix(prefix).lower()
            for number, value in descriptor.values_by_number.items()
            if number
        }
        self._numbers = {name: number for number, name in self.names.items()}

    def number(self, name: str | None, path: str) -> int:
        """The number of `name`; 0 for None."""
        if name is None:
            return 0
        if name not in self._numbers:
            raise ContractError(f"{name!r} is none of {', '.join(self._numbers)}", path=path)
        return self._numbers[name]

    def name(self, number: int, path: str, *, nullable: bool = False) -> str | None:
        """The name of `number`; None for 0 where `nullable`."""
        if number == 0 and nullable:
            return None
        if number not in self.names:
            raise ContractError("unset" if number == 0 else f"enum value {number} is unknown here", path=path)
        return self.names[number]


def set_nullable(message: envelopes_pb2.NullableString, value: str | None) -> None:
    """Writes a value that may be absent (not called), null or text."""
    if value is None:
        message.SetInParent()
    else:
        message.value = value


def nullable_from(message: envelopes_pb2.NullableString) -> str | None:
    """Reads a wrapper that is there."""
    return message.value if message.HasField("value") else None


def set_nullable_object(message: envelopes_pb2.JsonObject, value: dict[str, Any] | None, path: str) -> None:
    """Writes an open object that may be absent (not called), null or an object."""
    if value is None:
        message.SetInParent()
    else:
        message.json = text_of(value, path)


def nullable_object_from(message: envelopes_pb2.JsonObject, path: str) -> OpenObject | None:
    """Reads an open object's wrapper that is there."""
    return object_from(message, path) if message.HasField("json") else None


def text_of(value: dict[str, Any], path: str) -> str:
    """The JSON text of an open object: its own where it has one."""
    if isinstance(value, OpenObject):
        return value.text
    try:
        text = json_text.encode(value).decode()
        json_text.parse(text)  # the other side must accept it too
    except ContractError as error:
        raise _below(path, error) from error
    return text


def object_from(message: envelopes_pb2.JsonObject, path: str) -> OpenObject:
    """Reads an open object that must not be null."""
    try:
        return json_text.parse_object(message.json)
    except ContractError as error:
        raise _below(path, error) from error


def required(message: Message, *fields: str, path: str = "") -> None:
    """Raises ContractError when one of the message fields is unset."""
    for field in fields:
        if not message.HasField(field):
            raise ContractError("unset", path=f"{path}{message.DESCRIPTOR.fields_by_name[field].json_name}")


def refused_with_path(kind: str) -> Callable[[Callable[_P, _M]], Callable[_P, _M]]:
    """Turns what protobuf refuses in a document of `kind` into a ContractError that names the path.

    The search for the path starts only when something was refused, so the good case pays nothing.
    """

    def decorate(to_message: Callable[_P, _M]) -> Callable[_P, _M]:
        @functools.wraps(to_message)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _M:
            try:
                return to_message(*args, **kwargs)
            except (TypeError, ValueError, KeyError, OverflowError) as error:
                refused = error
            # JSON knows no difference between 3 and 3.0; an integer field does.
            document: Any = _with_whole_numbers(args[0])
            try:
                return to_message(document, *args[1:], **kwargs)  # type: ignore[arg-type]  # ParamSpec can't name args[0]
            except (TypeError, ValueError, KeyError, OverflowError):
                raise _explained(kind, document, refused) from refused

        return checked

    return decorate


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, OpenObject):
        return value
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    return value


def _explained(kind: str, document: Any, error: Exception) -> ContractError:
    for path, message in violations(kind, document):
        return ContractError(message, path=path)
    try:
        json_text.encode(document)
    except ContractError as unwritable:
        return unwritable
    return ContractError(str(error))


def _below(path: str, error: ContractError) -> ContractError:
    inner = error.path
    message = error.message.removeprefix(f"{inner}: ") if inner else error.message
    return ContractError(message, path=path + (inner if inner.startswith("[") else f".{inner}" if inner else ""))
