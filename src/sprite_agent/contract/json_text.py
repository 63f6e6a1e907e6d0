"""JSON as the contract needs it: integers of any size exact, nothing but JSON accepted, open objects verbatim."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from sprite_agent.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DEPTH = 256
"""Deepest nesting of an open object. A fixed limit, so that both sides of the wire refuse the same texts."""
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
DOCUMENT_DEPTH = MAX_DEPTH + 16
"""Deepest nesting of a document that has open objects in it."""

_Path: TypeAlias = tuple[str | int, ...]

_INTEGERS = range(1 - 10**4299, 10**4300)
"""Those that are read: of 4,300 characters, a sign included."""
_TYPE_NAMES = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", type(None): "null"}

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_NEITHER_BRACKET_NOR_QUOTE = bytes(byte for byte in range(256) if byte not in b'{}[]"')
_STEPS = [{"{": 1, "[": 1, "}": -1, "]": -1}.get(chr(byte), 0) for byte in range(256)]
"""How each byte changes the depth."""


class OpenObject(dict[str, Any]):
    """An object of the runtime's own, with the text it was written as. Made by `open_object`; many, on the spot.

    It compares and serializes as a dict; `encode` writes its text. Not to be changed.
    """

    # No __init__ of its own: two of these are made for every event, and it would take half of the time.
    __slots__ = ("name", "within")

    within: str | bytes
    """The text that it stands in; bytes: a line, its end included if it has one."""
    name: str | None
    """As which member of that; None: it is all of it."""

    @property
    def text(self) -> str:
        """One JSON object, byte for byte as it was read. Cut out when it is asked for: few ask."""
        text = self.within
        if self.name is not None:
            text = bytes(getattr(member_decoder(self.name).decode(text), self.name))
        return text.removesuffix(b"\n").decode() if isinstance(text, bytes) else text


def open_object(value: dict[str, Any], text: str) -> OpenObject:
    """`value` with its text."""
    made = OpenObject(value)
    made.within, made.name = text, None
    return made


def parse(text: bytes | str, *, max_depth: int = MAX_DEPTH) -> Any:
    """The value that `text` holds.

    Raises:
        ContractError: it is not JSON (NaN, Infinity, numbers beyond a double, lone
            surrogates and invalid UTF-8 are not), or is nested deeper than `max_depth`.
    """
    value, fault = attempt(text, max_depth=max_depth)
    if fault is not None:
        raise ContractError(fault)
    return value


def attempt(text: bytes | str, *, max_depth: int = MAX_DEPTH) -> tuple[Any, str | None]:
    """The value that `text` holds, or why `parse` refuses it: where most texts are refused, raising costs the most."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if is_deeper(data, max_depth):
        return None, f"nested deeper than {max_depth} levels"
    try:
        return _decode(data), None
    except UnicodeDecodeError:
        return None, "not valid UTF-8"
    except msgspec.ValidationError as error:
        return None, f"a number is out of range ({error})"
    except msgspec.DecodeError as error:
        return None, f"not JSON ({error})"


def objects_in(texts: Sequence[bytes] | Sequence[str]) -> list[dict[str, Any]]:
    """The objects that these texts hold, up to the first that holds none; `object_in` says of it what is wrong.

    Half of the time that `object_in` takes for each.
    """
    found: list[dict[str, Any]] = []
    try:
        for text in texts:
            if len(text) > 2 * MAX_DEPTH and is_deeper(text.encode() if isinstance(text, str) else text, MAX_DEPTH):
                break
            value = _decode(text)
            if type(value) is not dict:
                break
            found.append(value)
    except (UnicodeError, msgspec.DecodeError):
        pass
    return found


def object_in(text: bytes | str) -> dict[str, Any]:
    """The object that `text` holds.

    Raises:
        ContractError: as for `parse`, or it is JSON but no object.
    """
    value, fault = attempt(text)
    if fault is not None:
        raise ContractError(fault)
    if not isinstance(value, dict):
        raise ContractError(f"an object is needed, this is a JSON {_TYPE_NAMES[type(value)]}")
    return value


def parse_object(text: bytes | str) -> OpenObject:
    """The same, with its text.

    Raises:
        ContractError: as for `object_in`.
    """
    return open_object(object_in(text), text if isinstance(text, str) else text.decode())


@functools.cache
def member_decoder(name: str) -> msgspec.json.Decoder[Any]:
    """A decoder whose result's attribute `name` is the text of that member of an object, as `msgspec.Raw`.

    It looks at nothing else: only for texts that `parse` has accepted.
    """
    shape = msgspec.defstruct("Member", [(name, msgspec.Raw, msgspec.Raw(b""))])
    return msgspec.json.Decoder(shape)


def member(value: Any, name: str) -> Any:
    """A member of an object; None where there is no such member, or no object."""
    return value.get(name) if isinstance(value, dict) else None


def encode(value: Any) -> bytes:
    """Compact JSON of `value` in one line; an `OpenObject` is written as its text.

    Raises:
        ContractError: it holds what JSON has no form for (NaN, Infinity, a lone surrogate,
            a key that is no string, a type of Python's own), or is nested deeper than
            `DOCUMENT_DEPTH`; the path says where.
    """
    return _encode(_writable(value, (), DOCUMENT_DEPTH))


def indented(text: bytes) -> bytes:
    """The same JSON for people: two spaces a level. Numbers and strings keep their spelling."""
    return msgspec.json.format(text, indent=2)


def _writable(value: Any, path: _Path, depth: int) -> Any:
    """`value` with each open object replaced by its text in one line, checked on the way."""
    if isinstance(value, str):
        return value if value.isascii() else _text(value, path)
    if isinstance(value, OpenObject):
        # In JSON a line break can only be white space between tokens: inside a string it is escaped.
        return msgspec.Raw(value.text.replace("\n", " ").replace("\r", " ").encode())
    if isinstance(value, dict):
        _not_too_deep(path, depth)
        return {_text(key, path): _writable(item, (*path, key), depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        _not_too_deep(path, depth)
        return [_writable(item, (*path, index), depth - 1) for index, item in enumerate(value)]
    if isinstance(value, int) and value not in _INTEGERS:
        raise ContractError(f"an integer of {value.bit_length()} bits", path=_dotted(path))
    if isinstance(value, float) and not math.isfinite(value):
        raise ContractError(f"JSON has no form for {value}", path=_dotted(path))
    if value is not None and not isinstance(value, bool | int | float):
        raise ContractError(f"JSON has no form for a {type(value).__name__}", path=_dotted(path))
    return value


def _not_too_deep(path: _Path, depth: int) -> None:
    if depth <= 0:
        raise ContractError(f"nested deeper than {DOCUMENT_DEPTH} levels", path=_dotted(path)[:80])


def _text(value: Any, path: _Path) -> str:
    if not isinstance(value, str):
        raise ContractError(f"a key must be a string, this is {value!r}", path=_dotted(path))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ContractError(f"a lone surrogate at character {error.start}", path=_dotted(path)) from error
    return value


def _dotted(path: _Path) -> str:
    """A path as people write it: spelled out only where something is wrong there."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def is_deeper(data: bytes, depth: int) -> bool:
    """Whether the nesting goes deeper. A level takes two brackets; and two counts cost little, and mostly settle it."""
    return len(data) > 2 * depth and data.count(b"{") + data.count(b"[") > depth and _depth(data) > depth


def _depth(data: bytes) -> int:
    """How deep the nesting goes. In few steps over all of it: the text may be large, and others wait meanwhile."""
    if b"\\" in data:
        data = _ESCAPE.sub(b"", data)
    structure = b"".join(data.translate(None, _NEITHER_BRACKET_NOR_QUOTE).split(b'"')[::2])
    return max(itertools.accumulate(map(_STEPS.__getitem__, structure)), default=0)
