"""Follows a loop for as long as it takes: through lost connections, restarted agents and replaced logs."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING

from opsmgr.cursors import Position
from opsmgr.subscription import subscribe
from opsmgr.transport.retry import RetryPolicy
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import HistoryRewritten, LogReplaced, LogTruncated

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from opsmgr.transport.base import Transport
    from sprite_agent.contract.streaming import EventBatch
    from sprite_agent.errors import OpsError

PATIENT = RetryPolicy(attempts=sys.maxsize, budget=math.inf)
"""Tries until told to stop, at most every ten seconds."""


async def follow(
    transport: Transport,
    loop_id: str,
    *,
    start: Position | None,
    tell: Callable[[str], None],
    max_events: int = 0,
    trace_id: str | None = None,
    begun: Callable[[Position], None] = lambda _: None,
) -> AsyncGenerator[EventBatch]:
    """The batches of a loop's events, each event once, until `max_events` (0: for ever).

    Malformed records are passed over and reported in the batches.

    Args:
        transport: how to reach the loop.
        loop_id: the loop.
        start: where to begin; None: with what happens from now on.
        tell: told, in a sentence for people, of lost connections and replaced logs.
        max_events: end after so many.
        trace_id: passed on.
        begun: told of the position to begin at that `start` does not say: now, and the first line of another log.

    Raises:
        Refused: the agent says no.
    """

    def on_retry(error: OpsError, wait: float) -> None:
        tell(f"{error.message}; trying again in {wait:.1f} s")

    if start is None:
        now = await transport.snapshot(loop_id, trace_id=trace_id)
        cursor, token = now.envelope["cursor"], now.resume_token
        start = Position(line=cursor["eventLineOffset"], line_count=cursor["eventLineCount"], resume_token=token)
        begun(start)
    received = 0
    while True:
        query = EventQuery(
            loop_id=loop_id,
            after_line=start.line,
            resume_token=start.resume_token,
            max_events=max_events and max_events - received,
            follow=True,
            skip_malformed=True,
            trace_id=trace_id,
        )
        try:
            async with contextlib.aclosing(subscribe(transport, query, policy=PATIENT, on_retry=on_retry)) as batches:
                async for batch in batches:
                    received += len(batch.events)
                    yield batch
        except (LogReplaced, LogTruncated, HistoryRewritten) as error:
            tell(f"{error.message}: going on with its first line")
            start = Position()
            begun(start)
        else:
            return
