"""The checker of histories finds the defects it is there for, on a workload that it passes without them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from support.driving import EXIT_CODE, Controlled, Driver, decision
from support.figures import found
from support.mutants import MUTANTS
from support.runtime import turn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORK = {
    "undisturbed": "",
    "recorded": "agent.recorded",
    "released": "agent.released",
    "finished": "agent.finished",
    "both": "agent.released,executor.running",
    "at once": "",
}
"""Where processes are killed meanwhile; of the last the key is asked for by several callers at once."""
CALLERS = 8
FOUND_BY = {
    "run_interrupted_rows_again": "was run 2 times",
    "commit_the_row_after_the_command": "no row was committed for what was run",
    "let_everybody_fly": "was run|ran nothing|was taken for another one",
    "ignore_results": "and that was lost",
    "ignore_marks": "was run 2 times",
    "deny_what_ran": "it was said that these attempts ran nothing",
    "answer_another_request": "was asked for",
}
"""What the checker says of each mutant, as a pattern."""


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver() as driver:
        yield driver


def faults(place: Path, driver: Driver, mutant: str | None) -> Iterator[str]:
    """What the checker finds, in one piece of work after the other."""
    for name, kills in WORK.items():
        (place / name).mkdir()
        controlled = Controlled(place / name, driver, mutant=mutant)
        turn(controlled.loop, exit_code=EXIT_CODE, skip_effect=True)  # else what was run once is not needed again
        document = decision()
        if name == "at once":
            controlled.ask(*[document] * CALLERS)
        for _ in range(3):
            controlled.ask(document, failpoints=kills)
        controlled.ask({**document, "intent": "reject"})
        try:
            controlled.check(lost=name == "both")
        except AssertionError as error:
            yield str(error)


def test_without_a_mutation_there_is_nothing_to_find(driver: Driver, tmp_path: Path) -> None:
    assert list(faults(tmp_path, driver, None)) == []


def test_every_mutant_has_something_that_finds_it() -> None:
    assert FOUND_BY.keys() == MUTANTS.keys()
    found("mutants", f"{len(MUTANTS)} of the engine, each found by the checker of histories")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checker_finds_a_mutant(driver: Driver, tmp_path: Path, mutant: str) -> None:
    """A mutant that races may miss its chance on a busy machine, so each gets several."""
    for attempt in range(5):
        place = tmp_path / str(attempt)
        place.mkdir()
        if any(re.search(FOUND_BY[mutant], fault) for fault in faults(place, driver, mutant)):
            return
    pytest.fail(f"nothing was found of {mutant}")
