"""How much a fault test does, and what it found: figures that the run prints at its end."""

from __future__ import annotations

import os

SOAK_VARIABLE = "SOAK"
"""Set by `make soak`: the nightly figures instead of those of each push."""

_found: list[str] = []


def scaled(push: int, nightly: int) -> int:
    """The figure of this run."""
    return nightly if os.environ.get(SOAK_VARIABLE) else push


def found(row: str, text: str) -> None:
    """Notes what a row of the test matrix has reached, as in ("T3", "64 callers x 20 rounds: 20 executions")."""
    _found.append(f"{row}: {text}")


def all_found() -> list[str]:
    """Every note so far, in the order of the matrix."""
    return sorted(_found, key=lambda note: (int("".join(filter(str.isdigit, note.partition(":")[0])) or 0), note))
