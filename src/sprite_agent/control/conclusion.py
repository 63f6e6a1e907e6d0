"""What came of a command that has ended: the result with the effect that was looked for as asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprite_agent.contract.confirmation import look_for_effect
from sprite_agent.contract.requests import DEFAULT_TIMEOUT
from sprite_agent.control.evidence import Witness, baseline_from
from sprite_agent.control.results import looked_result, skipped_result, unlooked_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprite_agent.contract.envelopes import ControlConfirmation, ControlRequest, ControlResult
    from sprite_agent.control.journal_rows import Entry
    from sprite_agent.event_log.log import EventLog
    from sprite_agent.snapshot import LoopReading

SETTLE = 1.0
"""Seconds for which a cancel must go on to show: the runtime may write its state once more."""


def conclude(
    entry: Entry, *, read_loop: Callable[[str], LoopReading], log_of: Callable[[str], EventLog], waited: float = 0.0
) -> ControlResult:
    """The final result of a row whose command has ended; nothing is recorded.

    Args:
        entry: the row, executed.
        read_loop: reads a loop's artifacts afresh.
        log_of: the event log of a loop.
        waited: seconds of the time to look that are over.
    """
    request, result = entry.origin.request, entry.result
    unlooked = conclude_unlooked(request, result)
    if unlooked is not None:
        return unlooked
    asked = _asked(request)
    patience = asked.get("timeoutSeconds", DEFAULT_TIMEOUT) if result["exitCode"] == 0 else 0.0
    baseline = baseline_from(entry.origin.baseline)
    loop_id = request["loopId"]
    with Witness(lambda: read_loop(loop_id), lambda: log_of(loop_id), baseline) as witness:
        look = look_for_effect(
            request["intent"],
            witness.look,
            baseline=baseline.evidence,
            required=asked.get("requiredEffect", "completed"),
            timeout=min(patience, max(0.0, patience - waited)),
            mark=entry.mark,
            settle=SETTLE if request["intent"] == "cancel" else 0.0,
        )
    return looked_result(result, look, baseline.evidence, entry.mark)


def conclude_unlooked(request: ControlRequest, result: ControlResult) -> ControlResult | None:
    """The final result of a command that has ended, where nobody is to look for its effect."""
    if _asked(request)["mode"] == "skip" and result["exitCode"] == 0:
        return skipped_result(result)
    return unlooked_result(result)


def _asked(request: ControlRequest) -> ControlConfirmation:
    wait: ControlConfirmation = {"mode": "wait"}
    return request.get("confirmation", wait)
