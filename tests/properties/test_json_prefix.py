"""The verdict on an object in the making agrees with a parser, whatever the lines."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from properties import strategies
from sprite_agent.event_log.json_prefix import ObjectPrefix, Verdict

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
TOKEN = re.compile(rf'{STRING.pattern}|[{{}}\[\]:,]|[^"{{}}\[\]:,\s]+')
GOES_ON = ("", "1", ":1", '"k":1')
"""After any proper prefix one of these, and then the closing brackets, make an object."""

spaces = st.text(" \t\r\n", max_size=3)
tokens = st.sampled_from(
    ["{", "}", "[", "]", ":", ",", '"a"', '"}"', '"\\"\\n"', "0", "1", "-", ".5", "e3", "true", "null", " ", "\t", "x"]
)
some_lines = st.lists(st.lists(tokens, max_size=6).map("".join), min_size=1, max_size=5)
likely_lines = st.lists(
    st.sampled_from(['{"a":', "{", "}", "[", "]", "1", '"b"', ":", ",", '"c":', "1,", "{},", ""]),
    min_size=1,
    max_size=12,
)

some_strings = st.tuples(st.sampled_from([b"", b","]), st.binary(max_size=6)).map(
    lambda parts: parts[0] + b'"' + parts[1].replace(b"\n", b"").replace(b'"', b"") + b'"'
)


def verdicts(lines: list[bytes]) -> list[Verdict]:
    """The verdict after each line, up to the first that is not OPEN."""
    prefix = ObjectPrefix()
    found = []
    for line in lines:
        found.append(prefix.feed(line))
        if found[-1] is not Verdict.OPEN:
            break
    return found


def is_object(text: str) -> bool:
    """Whether a strict parser takes `text` for an object."""
    try:
        return isinstance(json.loads(text, parse_constant=_refused), dict)
    except ValueError:
        return False


def _refused(constant: str) -> Any:
    raise ValueError(constant)


def judged(text: str) -> Verdict:
    """The verdict by trial: whether `text` is an object, or some ending makes it one."""
    if is_object(text):
        return Verdict.CLOSED
    structure = STRING.sub("", text)
    closers = ""
    for bracket in re.findall(r"[{}\[\]]", structure):
        closers = closers[1:] if bracket in "}]" else {"{": "}", "[": "]"}[bracket] + closers
    endings = ("{}",) if not text.strip() else tuple(middle + closers for middle in GOES_ON)
    # What goes on is given a line of its own: no token goes over a line's end.
    return Verdict.OPEN if any(is_object(f"{text}{ending}") for ending in endings) else Verdict.BROKEN


@given(
    document=strategies.open_object,
    indent=st.integers(0, 9) | st.sampled_from(["\t", " \t"]),
    ascii_only=st.booleans(),
)
def test_every_proper_line_prefix_of_a_pretty_printed_object_is_open_and_the_whole_is_closed(
    *, document: dict[str, Any], indent: int | str, ascii_only: bool
) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)

    found = verdicts([line.encode() + b"\n" for line in text.split("\n")])

    assert found == [Verdict.OPEN] * text.count("\n") + [Verdict.CLOSED]


@given(st.data(), strategies.open_object)
def test_a_prefix_of_an_object_is_never_broken_wherever_its_lines_end(
    data: st.DataObject, document: dict[str, Any]
) -> None:
    parts = TOKEN.findall(json.dumps(document))
    text = "".join(data.draw(spaces) + part for part in parts)

    found = verdicts([line.encode() + b"\n" for line in text.split("\n")])

    assert found == [Verdict.OPEN] * text.count("\n") + [Verdict.CLOSED]


@given(some_lines | likely_lines)
def test_the_verdict_is_the_one_that_trying_every_ending_gives(lines: list[str]) -> None:
    found = verdicts([line.encode() + b"\n" for line in lines])

    expected = [judged("".join(f"{line}\n" for line in lines[: count + 1])) for count in range(len(found))]
    assert found == expected


@given(st.lists(some_strings | st.binary(max_size=4).map(lambda line: line.replace(b"\n", b"")), max_size=6))
def test_whatever_the_bytes_what_is_closed_keeps_the_grammar(parts: list[bytes]) -> None:
    lines = [b'{"a": [\n', *[part + b"\n" for part in parts], b"]}\n"]
    found = verdicts(lines)

    if found[-1] is Verdict.CLOSED:
        # What is inside strings is the parser's to judge.
        text = b"".join(lines[: len(found)]).decode("latin-1")
        assert is_object(STRING.sub('""', text))
