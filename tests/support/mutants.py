"""Agents with a defect each, which the checker of histories has to find. Each is put into the running process."""

# ruff: noqa: SLF001  # a mutant changes what nobody else may touch

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sprite_agent.control import engine as control
from sprite_agent.control.engine import ControlEngine
from sprite_agent.control.executions import Executions
from sprite_agent.control.flights import Flights
from sprite_agent.control.journal import Journal
from sprite_agent.control.results import executed_result, interrupted_result
from sprite_agent.errors import NotExecuted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.control.executions import CommandOutcome, Execution
    from sprite_agent.control.journal import NewRow
    from sprite_agent.control.journal_rows import Entry


def _put(owner: Any, name: str, mutant: Callable[..., Any]) -> None:
    assert hasattr(owner, name)
    setattr(owner, name, mutant)


def run_interrupted_rows_again() -> None:
    """Recovery frees the key of a command whose end nobody has seen."""
    settle = ControlEngine._settle

    def mutant(engine: ControlEngine, entry: Entry) -> Entry | None:
        if engine._executions.outcome(entry.execution_id) is not None:
            return settle(engine, entry)
        engine.journal.release(entry, "the mutant runs it again")
        return None

    _put(ControlEngine, "_settle", mutant)


def commit_the_row_after_the_command() -> None:
    """The journal is told of a command when it has ended."""
    begin = Journal.begin
    held_back: dict[str, NewRow] = {}

    def begin_later(journal: Journal, new: NewRow) -> Any:
        if new.result["state"] == "done":
            return begin(journal, new)
        held_back[new.execution_id] = new
        return SimpleNamespace(state="executing", execution_id=new.execution_id, result=new.result)

    def mutant(engine: ControlEngine, entry: Entry, execution: Execution, lane: int) -> Entry:
        outcome = engine._executions.run(execution)
        row = begin(engine.journal, held_back.pop(entry.execution_id))
        result = interrupted_result(row.result) if outcome is None else executed_result(row.result, outcome)
        return engine._record(row, result)

    _put(Journal, "begin", begin_later)
    _put(ControlEngine, "_run", mutant)


def let_everybody_fly() -> None:
    """Neither the calls of one process nor those of several wait for one another."""

    @contextlib.contextmanager
    def no_lane(engine: ControlEngine, timeout: float) -> Iterator[int]:
        with (engine._folder.path / "lane.lock").open("w") as lock:
            yield lock.fileno()

    @contextlib.contextmanager
    def no_wait(flights: Flights, place: tuple[str, str], deadline: float) -> Iterator[bool]:
        yield True

    _put(ControlEngine, "_lane", no_lane)
    _put(Flights, "join", no_wait)


def ignore_results() -> None:
    """What an executor has recorded is not looked at."""

    def mutant(executions: Executions, execution_id: str) -> CommandOutcome | None:
        return None

    _put(Executions, "outcome", mutant)


def ignore_marks() -> None:
    """A command without a result counts as never started."""

    def mutant(executions: Executions, execution_id: str) -> bool:
        return False

    _put(Executions, "was_started", mutant)


def deny_what_ran() -> None:
    """Says that nothing was run when the command has failed."""
    run = Executions.run

    def mutant(executions: Executions, execution: Execution) -> CommandOutcome | None:
        outcome = run(executions, execution)
        if outcome is not None and outcome.exit_code:
            raise NotExecuted("the mutant says so")
        return outcome

    _put(Executions, "run", mutant)


def answer_another_request() -> None:
    """A key is answered from its row whatever is asked with it."""

    def mutant(entry: Entry, request: Any) -> None:
        pass

    _put(control, "_refuse_another_request", mutant)


MUTANTS: dict[str, Callable[[], None]] = {
    mutate.__name__: mutate
    for mutate in (
        run_interrupted_rows_again,
        commit_the_row_after_the_command,
        let_everybody_fly,
        ignore_results,
        ignore_marks,
        deny_what_ran,
        answer_another_request,
    )
}
