"""The line of a mistake is the one that its key stands on, whatever else the text holds."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from opsmgr.config_text import Table

if TYPE_CHECKING:
    from opsmgr.config_text import ConfigMistake


def told_line(text: str, *place: str | int, key: str = "name") -> int:
    """The line that a mistake at a key of a table is told with."""
    mistakes: list[ConfigMistake] = []
    Table(Path("x.toml"), text, place, tomllib.loads(text), mistakes).blame(key, "is wrong")
    return mistakes[0].line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = '''\n[t]\nname = 1\n'''\n[t]\nname = 2", 6),
        ('a = """\n\\"""\n[t]\nname = 1"""\n[t]\nname = 2', 6),
        ("a = \"'''\"\n[t]\nname = 2\nb = \"'''\"", 3),
        ("# '''\n[t]\n# \"\"\"\nname = 2", 4),
        ('[t]\na = """x"""""\nname = 2', 3),
        ('[t]\na = [\n  ["u"],\n  ["v"]\n]\nname = 2', 6),
        ('[t]\na = [ # [\n"name = 1",\n]\nname = 2', 5),
        ("[t]\na = '[['\nname = 2", 3),
        ("[u]\nname = 1\n[t.name]\nx = 1\n[v]\nname = 1", 3),
        ("[t]\nname.x = 2", 2),
        ('[t]\n"name" = 2', 2),
        ("[t]\r\n\r\nname = 2\r\n", 3),
        ("[t]\na = '\u2028\x85'\nname = 2", 3),
        ("[u]\n\n[t]\nother = 1", 3),
        ("[u]\na = 1\n[v]\nb = 1", 1),
    ],
    ids=[
        "long literal string",
        "escaped quotes in a long string",
        "quotes in a string",
        "quotes in a comment",
        "string that ends with quotes",
        "list of lists",
        "lookalike in a list",
        "brackets in a string",
        "table of the key",
        "dotted key",
        "quoted key",
        "other line ends",
        "line ends that TOML does not know",
        "key that is not there",
        "table that is not there",
    ],
)
def test_a_key_is_found_in_its_table(text: str, line: int) -> None:
    assert told_line(text, "t") == line


def test_a_key_is_found_in_its_table_of_a_list() -> None:
    text = "[[t]]\nname = 1\n[[t]]\nx = '''\n[[t]]\n'''\n[[t]]\nname = 1"

    assert [told_line(text, "t", number) for number in (1, 2, 3)] == [2, 3, 8]


def test_a_key_of_an_inner_table_is_found_where_that_begins() -> None:
    text = "[[t]]\ninner = { name = 1 }\n[[t]]\n[t.inner]\nname = 1"

    assert [told_line(text, "t", number, "inner") for number in (1, 2)] == [2, 5]
