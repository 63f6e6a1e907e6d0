"""Long work in short pieces: a generator that yields where it may be left for a while, and returns its result.

Sandbox code writes what the agent reads, so nearly any piece of reading can be made long. Whoever
runs it in pieces can give others a turn in between, look at a clock, or give up.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")
_R = TypeVar("_R")

Steps: TypeAlias = Generator[None, None, _T]

PIECE = 0.005
"""Seconds after which others get a turn."""


class Pace:
    """Tells when a piece has lasted long enough."""

    def __init__(self, seconds: float = PIECE) -> None:
        self._until = time.monotonic() + seconds

    def over(self) -> bool:
        """Whether it has."""
        return time.monotonic() >= self._until


def goes_on(steps: Generator[object, None, object]) -> bool:
    """Does a piece of work; whether there is more."""
    try:
        next(steps)
    except StopIteration:
        return False
    return True


def piece_of(steps: Generator[object, None, _R]) -> _R | None:
    """Does a piece of work whose result is never None: that, or None where there is more."""
    try:
        next(steps)
    except StopIteration as done:
        result: _R = done.value
        return result
    return None


def finished(steps: Generator[object, None, _R], between: Callable[[], None] | None = None) -> _R:
    """The result of work that is done in one go; `between` is called after each piece, and may raise."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: _R = done.value
            return result
        if between is not None:
            between()
