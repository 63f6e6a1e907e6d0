"""What a run of the bench is to do, and where: every benchmark is handed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tools.bench.logs import LogStore
    from tools.bench.reference import Adapters

ROUNDS = 7
QUICK_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run."""

    seed: int
    """Of logs, orders and gaps: a run with the same one does the same in the same order."""
    quick: bool
    """Only to see that everything works: the figures say nothing."""
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
        return QUICK_ROUNDS if self.quick else ROUNDS

    def sized(self, full: int, quick: int) -> int:
        """The size for this run."""
        return quick if self.quick else full
