"""Bytes that are nearly a message: one after changes, or fields as no program of ours writes them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

from properties import strategies

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from hypothesis.strategies import SearchStrategy

_TELLING = [
    b"\x00",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xff\xff\xff\x0f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"{[",
    b"\n",
    b"\0" * 8,
    b"\xff" * 9,
]


def _flip(content: bytearray, chance: Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _put(content: bytearray, chance: Random) -> None:
    content[chance.randrange(len(content))] = chance.randrange(256)


def _insert(content: bytearray, chance: Random) -> None:
    at = chance.randrange(len(content) + 1)
    content[at:at] = chance.choice(_TELLING)


def _overwrite(content: bytearray, chance: Random) -> None:
    at, piece = chance.randrange(len(content)), chance.choice(_TELLING)
    content[at : at + len(piece)] = piece


def _remove(content: bytearray, chance: Random) -> None:
    at = chance.randrange(len(content))
    del content[at : at + chance.randint(1, 8)]


def _cut(content: bytearray, chance: Random) -> None:
    del content[chance.randrange(len(content)) :]


def _double(content: bytearray, chance: Random) -> None:
    at = chance.randrange(len(content))
    content += content[at : at + chance.randint(1, 64)]


_WAYS: list[Callable[[bytearray, Random], None]] = [_flip, _put, _insert, _overwrite, _remove, _cut, _double]


def mutated(content: bytes, chance: Random) -> bytes:
    """`content` after one to four changes."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        if not changed:
            break
        chance.choice(_WAYS)(changed, chance)
    return bytes(changed)


# Fields: any wire type, any number, any nesting.

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_TEXTUAL = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE}

_extremes = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1])
_numbers = _extremes | st.integers(0, 2**64 - 1)
_texts = (
    st.binary(max_size=12)
    | strategies.text.map(str.encode)
    | strategies.object_text.map(str.encode)
    | st.sampled_from([b"\xed\xa0\x80", b"\xff", b"{" * 300, b"[" * 300, b'{"a":1e999}', b'{"a":NaN}', b'"\\ud800"'])
)


def varint(number: int) -> bytes:
    """A number as the wire has it."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])


def field(number: int, wire_type: int, value: bytes) -> bytes:
    """One field; only its length is added."""
    return varint(number << 3 | wire_type) + (varint(len(value)) if wire_type == LENGTH else b"") + value


def of_wire_type(number: int, wire_type: int, inner: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    """Fields of a wire type."""
    if wire_type == VARINT:
        return _numbers.map(lambda value: field(number, VARINT, varint(value)))
    if wire_type == LENGTH:
        return inner.map(lambda value: field(number, LENGTH, value))
    layout = "<Q" if wire_type == FIXED64 else "<I"
    return _numbers.map(
        lambda value: field(number, wire_type, struct.pack(layout, value % 256 ** struct.calcsize(layout)))
    )


def fields_of(descriptor: Any, depth: int = 3) -> SearchStrategy[bytes]:
    """Messages made of the fields of a message's descriptor and a few that it has not."""
    kinds: list[SearchStrategy[bytes]] = [
        of_wire_type(999, wire_type, _texts) for wire_type in (VARINT, FIXED64, LENGTH, FIXED32)
    ]
    for known in descriptor.fields:
        inner = _texts
        if known.message_type is not None and depth:
            inner |= fields_of(known.message_type, depth - 1)
        right = LENGTH if known.type in _TEXTUAL else FIXED64 if known.type == FieldDescriptor.TYPE_DOUBLE else VARINT
        kinds += [of_wire_type(known.number, right, inner)] * 3
        kinds.append(of_wire_type(known.number, VARINT if right == LENGTH else LENGTH, inner))
    return st.lists(st.one_of(kinds), max_size=12).map(b"".join)
