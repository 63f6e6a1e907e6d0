"""T7: the journal against a model, with an engine that is killed at any moment; and mutants that the model finds."""

# ruff: noqa: SLF001  # a mutant changes what nobody else may touch

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from sprite_agent.control import journal_rows
from sprite_agent.control.journal import Journal
from support.figures import found, scaled
from support.journal_model import JournalMachine

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.control.journal_rows import Entry

STEPS = 30
FEW = 200
"""Examples within which a mutant must be found."""


def tried(examples: int) -> settings:
    """How hard the model is tried; the same each time."""
    return settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a failure here is for a program, which needs no smaller example
    )


@pytest.mark.timeout(scaled(240, 7200))
def test_whatever_happens_the_journal_agrees_with_the_model() -> None:
    examples = scaled(400, 20_000)

    run_state_machine_as_test(JournalMachine, settings=tried(examples))

    found("T7", f"{examples:,} runs of {STEPS} steps: at most once, answers stay, the audit only grows")


SETTLE, CLAIM, RECORD = JournalMachine._settle, Journal.claim, Journal.record


def release_what_was_started(machine: JournalMachine, entry: Entry) -> Entry | None:
    """Recovery takes every command without a result for one that was never run."""
    if entry.execution_id not in machine._ended:
        machine._started.discard(entry.execution_id)
    return SETTLE(machine, entry)


def free_what_is_claimed(journal: Journal, entry: Entry, owner: str) -> Entry | None:
    """Whoever takes over a row frees its key."""
    claimed = CLAIM(journal, entry, owner)
    with journal._transaction() as tables:
        journal_rows.write(tables, replace(entry, state="released"))
    return claimed


def record_over_what_is_done(journal: Journal, entry: Entry, result: ControlResult) -> Entry:
    """A row's result can be changed for ever."""
    recorded = replace(entry, state=result["state"], result=result)
    with journal._transaction() as tables:
        journal._write(tables, recorded, "done")
    return recorded


def commit_nothing(journal: Journal, entry: Entry, result: ControlResult) -> Entry:
    """A result is said to be recorded, and is not."""
    return replace(entry, state=result["state"], result=result)


def write_without_an_audit(journal: Journal, entry: Entry, result: ControlResult) -> Entry:
    """A result is recorded, and an audit entry taken out."""
    recorded = RECORD(journal, entry, result)
    with journal._transaction() as tables:
        tables.execute("DELETE FROM audit WHERE sequence = (SELECT max(sequence) FROM audit)")
    return recorded


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [
        (JournalMachine, "_settle", release_what_was_started),
        (Journal, "claim", free_what_is_claimed),
        (Journal, "record", record_over_what_is_done),
        (Journal, "record", commit_nothing),
        (Journal, "record", write_without_an_audit),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_model_finds_a_mutant(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, mutant: Any) -> None:
    monkeypatch.setattr(owner, name, mutant)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(JournalMachine, settings=tried(FEW))
