"""Commands run as the engine runs them, without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sprite_agent.control.executions import CommandOutcome, Executions


def carried_out(executions: Executions, execution_id: str, command: list[str], lane: int) -> CommandOutcome | None:
    """How a command ended whose row nobody needs; None: that is not known."""
    with executions.ready(execution_id, command, lane) as execution:
        return executions.run(execution)
