"""Looks for an intent's effect from outside, in snapshots over either transport."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from opsmgr.intents.at_hand import last_event
from sprite_agent.contract.confirmation import build_record, enough, evidence_from, find_effect

if TYPE_CHECKING:
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.envelopes import ConfirmationRecord, ControlEffect, Intent


async def confirm(
    transport: Transport,
    loop_id: str,
    intent: Intent,
    *,
    timeout: float,  # noqa: ASYNC109  # how long to look, not a failure
    interval: float,
    required: ControlEffect = "completed",
    trace_id: str | None = None,
) -> ConfirmationRecord:
    """Looks at fresh snapshots until the effect shows or `timeout` seconds are over.

    There is nothing to tell when the intent was run, so what already shows counts.

    Raises:
        OpsError: the loop can't be read.
    """
    until = time.monotonic() + timeout
    attempts = 0
    while True:
        attempts += 1
        snapshot = (await transport.snapshot(loop_id, trace_id=trace_id)).envelope
        # Which decision it was, only the event itself says.
        decided = snapshot["health"]["lastEventName"] == "approval_decision"
        last = await last_event(transport, snapshot) if decided else None
        now = evidence_from(snapshot, None if last is None else last["event"]["raw"])
        finding = find_effect(intent, now, None)
        confirmed = enough(finding, required)
        if confirmed or time.monotonic() >= until:
            return build_record(
                intent, finding, confirmed=confirmed, now=now, attempts=attempts, timeout_seconds=timeout
            )
        await asyncio.sleep(min(interval, max(0.0, until - time.monotonic())))
