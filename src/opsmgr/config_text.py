"""The tables of a TOML text, read key by key: what is wrong is noted with its file, line and key."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]#]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"""\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[A-Za-z0-9_-]+))\s*[.=]""")
_STRING_OR_COMMENT = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*""", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ConfigMistake:
    """One thing that is wrong."""

    path: Path
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.key}: {self.message}"


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a config. What is wrong with a key is added to `mistakes`, and its value is None."""

    file: Path
    source: str
    place: tuple[str | int, ...]
    """Keys and positions that lead to it, from the top."""
    document: Any
    mistakes: list[ConfigMistake]
    below: Table | None = field(default=None)
    """Where keys are looked up that this one does not have."""

    def over(self, defaults: Table) -> Table:
        """This table, with others' keys where it has none."""
        return Table(self.file, self.source, self.place, self.document, self.mistakes, defaults)

    def blame(self, key: str, message: str) -> None:
        """Notes what is wrong with a key."""
        at = self._holder(key) or self
        label = ".".join(str(part) for part in (*at.place, key))
        self.mistakes.append(ConfigMistake(self.file, _line_of(self.source, at.place, key), label, message))

    def missing(self, key: str, what: str) -> str:
        """Notes that a key has to be there."""
        self.blame(key, f"is missing: {what}")
        return key

    def refuse_others(self, *known: str, secrets: tuple[str, ...] = ()) -> None:
        """Notes every key that is not one of `known`."""
        for key in self.document:
            if key in secrets:
                self.blame(key, "secrets do not belong in a config: put it into a file of its own, see token_file")
            elif key not in known:
                like = difflib.get_close_matches(key, known, 1)
                advice = f"did you mean {like[0]}?" if like else f"there are {', '.join(sorted(known))}"
                self.blame(key, f"is not known; {advice}")

    def value(self, key: str) -> Any:
        """What a key holds; None where it is not there."""
        holder = self._holder(key)
        return None if holder is None else holder.document[key]

    def table(self, key: str) -> Table:
        """The table of a key; an empty one where there is none."""
        holder = self._holder(key) or self
        found = holder.document.get(key, {})
        if not isinstance(found, dict):
            self.blame(key, f"is {_shown(found)}, not a table")
            found = {}
        return Table(self.file, self.source, (*holder.place, key), found, self.mistakes)

    def tables(self, key: str) -> list[Table]:
        """The tables of a key, as [[key]] makes them."""
        found = self.document.get(key, [])
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            self.blame(key, f"is no list of tables; each begins with [[{key}]]")
            found = []
        return [
            Table(self.file, self.source, (*self.place, key, number), each, self.mistakes)
            for number, each in enumerate(found, 1)
        ]

    def text(self, key: str) -> str | None:
        """A text that is not empty."""
        value = self.value(key)
        if value is None or (_is_text(value) and value):
            return value
        self._refuse(key, value, "a text")
        return None

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self.value(key)
        if value is None or (isinstance(value, list) and all(map(_is_text, value))):
            return value or []
        self._refuse(key, value, "a list of texts")
        return []

    def path(self, key: str, *, prefix: str = "") -> Path | None:
        """A path, which may stand behind a prefix, made absolute."""
        value = self.text(key)
        try:
            if value is None:
                return None
            return self.file.parent.absolute() / Path(value.removeprefix(prefix)).expanduser()
        except RuntimeError:  # ~ of a user who is not there
            self._refuse(key, value, "a path whose ~ is a user's home")
            return None

    def choice(self, key: str, choices: tuple[str, ...]) -> str | None:
        """One of a few texts."""
        value = self.value(key)
        if value is None or (isinstance(value, str) and value in choices):
            return value
        self._refuse(key, value, " or ".join(repr(each) for each in choices))
        return None

    def whole(self, key: str, *, least: int) -> int | None:
        """A whole number."""
        value = self.value(key)
        if value is None or (type(value) is int and value >= least):
            return value
        self._refuse(key, value, f"a whole number from {least} on")
        return None

    def seconds(self, key: str) -> float | None:
        """A number of seconds."""
        value = self.value(key)
        if value is None:
            return None
        if type(value) in {int, float} and 0 < value <= sys.float_info.max:
            return float(value)
        self._refuse(key, value, "a number of seconds above 0")
        return None

    def _refuse(self, key: str, value: Any, wanted: str) -> None:
        self.blame(key, f"is {_shown(value)}, not {wanted}")

    def _holder(self, key: str) -> Table | None:
        if key in self.document:
            return self
        return self.below if self.below is not None and key in self.below.document else None


def _is_text(value: Any) -> bool:
    """Whether it is one that can be a path, or a word of a command."""
    return isinstance(value, str) and "\0" not in value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"  # noqa: PLR2004  # enough to know it by


@functools.lru_cache(maxsize=64)  # what is wrong in [defaults] is met with each target
def _line_of(text: str, place: tuple[str | int, ...], key: str) -> int:
    """The line that a key of a table stands on; that of its table, or the first, where it can't be told.

    tomllib does not say. Keys within inline tables count as being on the line of the table.
    """
    names = tuple(part for part in place if isinstance(part, str))
    number = next((part for part in place if isinstance(part, int)), None)
    best, seen = 1, 0
    here: tuple[str, ...] = ()
    for line, content in _statements(text):
        if header := _HEADER.fullmatch(content):
            here = tuple(part.strip().strip("\"'") for part in header[2].split("."))
            seen += header[1] == "[[" and here == names[:1]
            if _is_in(here, names) and number in {None, seen}:
                best = line
                if (*names, key) == here:
                    return line
        elif (found := _KEY.match(content)) and (number in {None, seen}):
            full = (*here, found["bare"] or found["double"] or found["single"] or "")
            if full == (*names, key):
                return line
            if len(full) > len(here) and full == names[: len(full)]:
                best = line
    return best


@functools.lru_cache(maxsize=1)
def _statements(text: str) -> list[tuple[int, str]]:
    """The lines that begin a key or a table, numbered from 1: none within a long string or a list."""
    # Strings lose all but their newlines: what is left of brackets is the TOML's own.
    bare = _STRING_OR_COMMENT.sub(lambda found: "\n".join(" " * len(part) for part in found[0].split("\n")), text)
    inside: set[int] = set()
    first, seen = 1, 0
    for found in _STRING_OR_COMMENT.finditer(text):
        first, seen = first + text.count("\n", seen, found.start()), found.start()
        inside.update(range(first + 1, first + 1 + found[0].count("\n")))
    depth, statements = 0, []
    for line, (content, shape) in enumerate(zip(text.split("\n"), bare.split("\n"), strict=True), 1):
        if depth == 0 and line not in inside:
            statements.append((line, content))
        depth += sum(char in "[{" for char in shape) - sum(char in "]}" for char in shape)
    return statements


def _is_in(here: tuple[str, ...], names: tuple[str, ...]) -> bool:
    return bool(here) and (names[: len(here)] == here or here[: len(names)] == names)
