"""Which texts are JSON to us, what they mean, and how values are written."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from sprite_agent.contract import json_text
from sprite_agent.contract.json_text import DOCUMENT_DEPTH, MAX_DEPTH, OpenObject
from sprite_agent.errors import ContractError


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"NaN", id="NaN"),
        pytest.param(b'{"a":NaN}', id="NaN in an object"),
        pytest.param(b"[Infinity]", id="Infinity"),
        pytest.param(b"[-Infinity]", id="-Infinity"),
        pytest.param(b"1e400", id="beyond a double"),
        pytest.param(b"-1e400", id="beyond a negative double"),
        pytest.param(b"[1" + b"0" * 400 + b".0]", id="beyond a double without exponent"),
        pytest.param(b"1" * 5000, id="5,000 digits"),
        pytest.param(b"[-" + b"1" * 5000 + b"]", id="5,000 negative digits"),
        pytest.param(rb'"\ud800"', id="lone high surrogate, escaped"),
        pytest.param(rb'"\udc00"', id="lone low surrogate, escaped"),
        pytest.param(rb'"\ud800 and more text"', id="lone high surrogate before text"),
        pytest.param(rb'"\ud800\u0041"', id="high surrogate before another escape"),
        pytest.param(rb'"\udc00\ud800"', id="surrogates in the wrong order"),
        pytest.param(rb'{"\ud800":1}', id="lone surrogate in a key, escaped"),
        pytest.param(b'"\xed\xa0\x80"', id="lone surrogate as bytes"),
        pytest.param(b'"\xed\xa0\xbd\xed\xb8\x80"', id="surrogate pair as bytes"),
        pytest.param(b'{"\xed\xa0\x80":1}', id="lone surrogate in a key as bytes"),
        pytest.param('"\ud800"', id="lone surrogate in a str"),
        pytest.param(b'"\xff"', id="invalid UTF-8 in a value"),
        pytest.param(b'{"a":1,"\xff":2}', id="invalid UTF-8 in a key"),
        pytest.param(b'{"\xc3\x28":1}', id="broken sequence in a key"),
        pytest.param(b'"\xc0\xaf"', id="overlong sequence"),
        pytest.param(b'"\xf4\x90\x80\x80"', id="beyond U+10FFFF"),
        pytest.param(b'"\xe2\x82"', id="sequence cut off"),
        pytest.param(b"\xff", id="invalid UTF-8 outside"),
        pytest.param(b"\xef\xbb\xbf{}", id="byte order mark"),
        pytest.param("\ufeff{}", id="byte order mark in a str"),
        pytest.param('{"a":1}'.encode("utf-16"), id="UTF-16"),
        *(pytest.param(b'"%c"' % code, id=f"control character {code:#04x} in a string") for code in range(0x20)),
        pytest.param(b"{}\x00", id="NUL after it"),
        pytest.param(b"\x0c{}", id="form feed before it"),
        pytest.param("\u00a0{}", id="no-break space before it"),
        pytest.param(b"{} {}", id="a second value"),
        pytest.param(b"{}x", id="text after it"),
        pytest.param(b"{}}", id="a bracket too many"),
        pytest.param(b"[{]}", id="brackets crossed"),
        pytest.param(b"", id="nothing"),
        pytest.param(b" \n", id="white space"),
        pytest.param(b"{", id="unclosed object"),
        pytest.param(b'{"a":1', id="object cut off"),
        pytest.param(b'{"a":"b', id="string cut off"),
        pytest.param(b"tru", id="word cut off"),
        pytest.param(b"[1,]", id="trailing comma"),
        pytest.param(b'{"a":1,}', id="trailing comma in an object"),
        pytest.param(b"{a:1}", id="bare key"),
        pytest.param(b"{1:1}", id="number as key"),
        pytest.param(b"{'a':1}", id="single quotes"),
        pytest.param(b"01", id="leading zero"),
        pytest.param(b"-01", id="leading zero after a sign"),
        pytest.param(b"+1", id="plus sign"),
        pytest.param(b".5", id="no digit before the point"),
        pytest.param(b"1.", id="no digit after the point"),
        pytest.param(b"1e", id="no exponent"),
        pytest.param(b"0x10", id="hexadecimal"),
        pytest.param(b"1_000", id="underscore"),
        pytest.param(b"True", id="True"),
        pytest.param(b"None", id="None"),
        pytest.param(b"undefined", id="undefined"),
        pytest.param(b"{}//", id="comment"),
        pytest.param(rb'"\x41"', id="unknown escape"),
        pytest.param(rb'"\u00"', id="escape cut off"),
        pytest.param(rb'"\u00GG"', id="escape that is no hex"),
    ],
)
def test_what_is_not_json_is_refused(text: bytes | str) -> None:
    with pytest.raises(ContractError):
        json_text.parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"9007199254740993", 9007199254740993),
        (b"18446744073709551616", 2**64),
        (b"-9223372036854775809", -(2**63) - 1),
        (b"1234567890123456789012345678901234567890", 1234567890123456789012345678901234567890),
        (b"-1234567890123456789012345678901234567890", -1234567890123456789012345678901234567890),
        (b"-0", 0),
        (b"1.0", 1.0),
        (b"1e0", 1.0),
        (b"1E+2", 100.0),
        (b"-0.0", -0.0),
        (b"0.1", 0.1),
        (b"5e-324", 5e-324),
        (b"1e-400", 0.0),
        (b"1.7976931348623157e308", 1.7976931348623157e308),
        (b'{"a":1,"a":2,"b":3}', {"a": 2, "b": 3}),
        (rb'{"a":1,"\u0061":2}', {"a": 2}),
        (rb'"\ud83d\ude00\u0000\u00e9\/\"\\\b\f\n\r\t"', '😀\x00é/"\\\b\f\n\r\t'),
        ('"😀 \u2028 \x7f \ufeff"'.encode(), "😀 \u2028 \x7f \ufeff"),
        (b'\t\r\n {"":[ ]}\n ', {"": []}),
        ('{"é":null}', {"é": None}),
        (b"null", None),
        (b"[true,false]", [True, False]),
    ],
)
def test_json_means_what_it_says(text: bytes | str, value: Any) -> None:
    # repr tells 1 from 1.0 and true, and 0.0 from -0.0.
    assert repr(json_text.parse(text)) == repr(value)


def nested(depth: int, inner: str = "") -> str:
    """Lists and objects in turn, `depth` deep."""
    opening = ['{"a":' if level % 2 else "[" for level in range(depth)]
    closing = ["}" if level % 2 else "]" for level in reversed(range(depth))]
    return "".join([*opening, inner or ("0" if depth % 2 == 0 else ""), *closing])


@pytest.mark.parametrize("inner", ["1", '"[[[{{{"', r'"\"[[[["', r'"\\"', '"]]]]"', '"}"'])
def test_a_text_may_be_256_levels_deep_and_no_deeper(inner: str) -> None:
    assert json_text.parse(nested(256, inner)) == json.loads(nested(256, inner))

    with pytest.raises(ContractError, match="deeper than 256"):
        json_text.parse(nested(257, inner))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps(["[" * 1000]), id="opened in a string"),
        pytest.param(json.dumps({"{[" * 1000: 1}), id="opened in a key"),
        pytest.param(json.dumps(['"' + "[{" * 1000]), id="after an escaped quote"),
        pytest.param(json.dumps(["\\", "[{" * 1000, "\\"]), id="after a string that ends in a backslash"),
        pytest.param(json.dumps(["\\" * 501, "[" * 1000]), id="after many backslashes"),
        pytest.param(json.dumps(['\\"[' * 1000]), id="between escaped quotes"),
        pytest.param(json.dumps([[]] * 1000), id="side by side"),
        pytest.param(json.dumps(["]" * 300, *[[]] * 300, "[" * 300]), id="closed in a string"),
    ],
)
def test_brackets_in_strings_and_side_by_side_are_no_depth(text: str) -> None:
    assert json_text.parse(text) == json.loads(text)


def test_brackets_in_strings_do_not_hide_the_depth() -> None:
    with pytest.raises(ContractError, match="deeper than 256"):
        json_text.parse("[" * 200 + '"' + "]" * 200 + '",' + nested(57) + "]" * 200)
    with pytest.raises(ContractError, match="deeper than 256"):
        json_text.parse(r"[" * 200 + r'"\"]]]]]]\\",' + nested(57) + "]" * 200)


def test_a_text_far_too_deep_is_refused_and_not_a_recursion_error() -> None:
    for text in ("[" * 500_000, "[" * 500_000 + "]" * 500_000, '{"a":' * 200_000):
        with pytest.raises(ContractError):
            json_text.parse(text)


def test_a_hostile_text_is_refused_within_a_second() -> None:
    # A mebibyte, as long as a record may be: a string that is never closed, of nothing but escaped quotes.
    text = b"[" * 257 + b'"' + b'\\"' * 2**19
    start = time.perf_counter()

    with pytest.raises(ContractError):
        json_text.parse(text)

    assert time.perf_counter() - start < 1


def test_the_refusal_names_what_was_found() -> None:
    with pytest.raises(ContractError, match="an object is needed, this is a JSON array"):
        json_text.parse_object(b"[]")
    with pytest.raises(ContractError, match="an object is needed, this is a JSON null"):
        json_text.parse_object("null")
    with pytest.raises(ContractError, match="an object is needed, this is a JSON boolean"):
        json_text.parse_object("true")
    with pytest.raises(ContractError, match="not valid UTF-8"):
        json_text.parse(b'{"\xff":1}')
    with pytest.raises(ContractError, match="out of range"):
        json_text.parse(b"1e400")


@pytest.mark.parametrize("text", ["[]", "3", "1.5", '"{}"', "true", "null", "[{}]"])
def test_what_is_no_object_is_refused_where_an_object_is_needed(text: str) -> None:
    with pytest.raises(ContractError, match="an object is needed"):
        json_text.parse_object(text)


@pytest.mark.parametrize(
    "text", ["{}", ' {"a" : 1.0,\n\t"b":1E+2, "a":18446744073709551616}\r\n', r'{"\u0041":"\/ü😀"}']
)
def test_an_open_object_keeps_its_text_and_is_a_dict(text: str) -> None:
    for given in (text, text.encode()):
        value = json_text.parse_object(given)

        assert isinstance(value, OpenObject)
        assert value.text == text
        assert value == json.loads(text)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**53 + 1,
        2**64,
        -(2**63) - 1,
        10**40,
        pytest.param(10**4300 - 1, id="4,300 digits"),
        pytest.param(1 - 10**4299, id="4,299 negative digits"),
        -(10**40),
        0.1,
        -0.0,
        1e300,
        5e-324,
        "",
        '\x00\n"\\/\x7f\u2028é日本👩‍🚀',
        [],
        {},
        {"a": [1, {"b": None}], "": "", "é": 1.0},
    ],
)
def test_what_is_written_reads_as_it_was(value: Any) -> None:
    written = json_text.encode(value)

    assert repr(json_text.parse(written)) == repr(value)
    assert json.loads(written) == value
    assert b"\n" not in written


def test_an_open_object_is_written_as_its_text_in_one_line() -> None:
    text = '{\n  "one": 1.0,\r\n\t"text": "a\\nb"\n}'
    envelope = {"payload": None, "raw": json_text.parse_object(text), "more": [json_text.parse_object("{ }")]}

    written = json_text.encode(envelope)

    assert written == rb'{"payload":null,"raw":{   "one": 1.0,  	"text": "a\nb" },"more":[{ }]}'
    assert json_text.parse(written) == envelope


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (math.nan, ""),
        ({"run": {"score": math.inf}}, "run.score"),
        ({"a": [0, {"b": -math.inf}]}, "a[1].b"),
        ({"a": ["ok", "\ud800"]}, "a[1]"),
        ({"a": {"b": "text \udfff"}}, "a.b"),
        ({"a": {"\ud800": 1}}, "a"),
        ({"a": {1: 2}}, "a"),
        ({None: 2}, ""),
        ({"a": (math.nan,)}, "a"),
        ({"a": (1, 2)}, "a"),
        ({"a": [b"bytes"]}, "a[0]"),
        ({"a": {"b": object()}}, "a.b"),
        pytest.param({"run": {"iteration": 10**4300}}, "run.iteration", id="4,301 digits"),
        pytest.param({"run": {"iteration": -(10**4299)}}, "run.iteration", id="4,300 negative digits"),
    ],
)
def test_what_json_has_no_form_for_is_refused_with_its_path(value: Any, path: str) -> None:
    with pytest.raises(ContractError) as caught:
        json_text.encode(value)

    assert caught.value.path == path
    assert str(caught.value).startswith(path)


def test_a_document_may_be_272_levels_deep_and_no_deeper() -> None:
    deepest: Any = json.loads(nested(DOCUMENT_DEPTH))
    assert json_text.parse(json_text.encode(deepest), max_depth=DOCUMENT_DEPTH) == deepest

    for depth in (DOCUMENT_DEPTH + 1, 5000):
        deeper: Any = 1
        for _ in range(depth):
            deeper = [deeper]
        with pytest.raises(ContractError, match="deeper than 272"):
            json_text.encode(deeper)


def test_an_envelope_around_an_object_as_deep_as_may_be_can_be_read_back() -> None:
    deepest = json_text.parse_object('{"a":' + nested(MAX_DEPTH - 1) + "}")
    envelope = {"event": {"raw": deepest}}
    evidence = {"evidence": {"lastEventEnvelope": envelope}}

    for document in (envelope, evidence):
        assert json_text.parse(json_text.encode(document), max_depth=DOCUMENT_DEPTH) == document


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        (b'{"event":"x","data":{"a" : 1.0, "b":[ ]},"z":1}', b'{"a" : 1.0, "b":[ ]}'),
        (b'{\n "data": [1, 2] ,"event":"x"}', b"[1, 2]"),
        (b'{"data":"a\\"}"}', b'"a\\"}"'),
        (b'{"data":1e2}', b"1e2"),
        (b'{"data":null}', b"null"),
        (b'{"data":1,"data":{"b":2}}', b'{"b":2}'),
        (b'{"other":{"data":1}}', b""),
        (b"{}", b""),
    ],
)
def test_a_member_is_read_as_its_text(text: bytes, raw: bytes) -> None:
    json_text.parse_object(text)

    assert bytes(json_text.member_decoder("data").decode(text).data) == raw
