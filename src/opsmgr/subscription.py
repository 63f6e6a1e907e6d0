"""A subscription that survives its streams: reconnects, resumes where it stands, delivers every event once."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from opsmgr.transport.retry import Retries, RetryPolicy
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from opsmgr.transport.base import Transport
    from sprite_agent.contract.streaming import EventBatch, EventQuery


async def subscribe(
    transport: Transport,
    query: EventQuery,
    *,
    policy: RetryPolicy | None = None,
    on_retry: Callable[[OpsError, float], None] | None = None,
) -> AsyncGenerator[EventBatch]:
    """The batches of `query`, over as many streams as it takes.

    A stream that ends early (no answer, a draining agent, its maximum age) is followed by
    one that resumes from the last batch received. The budget for that begins anew with
    every batch. A position that the log no longer has is not retried: what to do then is
    the caller's to decide.

    Args:
        transport: how to reach the loop.
        query: what to ask for.
        policy: how often to try again; default: that of single requests.
        on_retry: told of each failed try, and the seconds until the next.

    Raises:
        OpsError: refused, or no answer within the policy.
    """
    retries = Retries(policy=policy or RetryPolicy(), attempts=transport.attempts)
    policy = retries.policy
    wanted, received, caught_up, fruitless = query.max_events, 0, False, 0
    token = query.resume_token
    while True:
        before = received
        try:
            async with contextlib.aclosing(transport.events(query)) as batches:
                async for batch in batches:
                    retries.progress()
                    received += len(batch.events)
                    caught_up = batch.caught_up
                    token = batch.resume_token
                    given = [batch]
                    del batch  # not kept while its reader has it
                    yield given.pop()
        except OpsError as error:
            if 0 < wanted <= received:
                return
            wait = retries.wait_after(error)
            if on_retry is not None:
                on_retry(error, wait)
            await asyncio.sleep(wait)
        else:
            if 0 < wanted <= received or (caught_up and not query.follow):
                return
            fruitless = fruitless + 1 if received == before else 0
            if fruitless:
                await asyncio.sleep(policy.backoff(fruitless, None))
        query = replace(query, resume_token=token, max_events=wanted and wanted - received)
