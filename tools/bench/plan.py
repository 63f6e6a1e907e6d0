"""What a run of the bench is to do, and where: every benchmark is handed one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tools.bench.logs import LogStore
    from tools.bench.reference import Adapters

_T = TypeVar("_T")


class Size(StrEnum):
    """How much a run does."""

    QUICK = "quick"
    """Only to see that everything works: the figures say nothing."""
    GATE = "gate"
    """What CI can wait for: enough for what has a margin, too little for a verdict."""
    FULL = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized(Generic[_T]):
    """One amount, for each size of a run."""

    full: _T
    quick: _T
    gate: _T | None = None
    """None: no gate hangs on it, so that it is as small as in a quick run."""

    def at(self, size: Size) -> _T:
        """The amount for a run of this size."""
        if size is Size.FULL:
            return self.full
        return self.quick if size is Size.QUICK or self.gate is None else self.gate


ROUNDS = Sized(full=7, gate=5, quick=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run."""

    seed: int
    """Of logs, orders and gaps: a run with the same one does the same in the same order."""
    size: Size
    folder: Path
    """For everything that is written; gone after the run."""
    logs: LogStore
    say: Callable[[str], None]
    """Tells whoever waits what is going on."""
    adapters: Adapters | None = None
    """What `reference` compares with, if there is any."""

    @property
    def rounds(self) -> int:
        """How many times each arm is taken."""
        return self.sized(ROUNDS)

    def sized(self, amount: Sized[_T]) -> _T:
        """The amount for this run."""
        return amount.at(self.size)
