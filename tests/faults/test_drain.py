"""T26: an agent is told to stop while a control runs and many streams are open; nothing is lost and it ends in time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING, cast

import pytest

from opsmgr.errors import NoAnswer
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import Draining
from support.driving import decision
from support.figures import found, scaled
from support.following import Follower
from support.history import EventHistory
from support.repos import LOOP, event, line
from support.runtime import SKIPS, executions, turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import AgentProgram

    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
STREAMS = 16
AT_ONCE = 60.0
"""Seconds a stop may take; what systemd waits for."""
ONE_TRY = RetryPolicy(attempts=1)


async def execute(address: str, request: ControlRequest) -> ControlResult | None:
    """The answer of an agent; None: none came, or it was told that it stops."""
    transport = SpriteServiceTransport(address, token=TOKEN, policy=ONE_TRY)
    try:
        return await transport.execute(request)
    except (NoAnswer, Draining):
        return None
    finally:
        await transport.close()


async def stop_under_load(
    program: AgentProgram, histories: list[EventHistory], positions: list[str | None], request: ControlRequest
) -> tuple[ControlResult | None, float]:
    """Stops an agent that has these streams and this control; the control's answer, and how long the stop took.

    Every stream goes on where it was, has to end with OK, and leaves its place in `positions`.
    """
    transports = [SpriteServiceTransport(program.address(), token=TOKEN, policy=ONE_TRY) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        followers = [
            await stack.enter_async_context(
                Follower(transports[number % 2].events(EventQuery(loop_id=LOOP, follow=True, resume_token=position)))
            )
            for number, position in enumerate(positions)
        ]
        await asyncio.gather(*[follower.next() for follower in followers])
        asked = asyncio.ensure_future(execute(program.address(), request))
        await asyncio.sleep(random.uniform(0, 0.3))  # noqa: S311  # before the command starts, or while it runs
        began = time.monotonic()
        program.process.terminate()

        for number, follower in enumerate(followers):
            for batch in await follower.to_end():
                histories[number].saw(batch)
                positions[number] = batch.resume_token
        answer = await asked
        assert await asyncio.to_thread(program.exit_code) == 0
        took = time.monotonic() - began
    for transport in transports:
        await transport.close()
    return answer, took


@pytest.mark.timeout(scaled(240, 3600))
async def test_an_agent_that_is_stopped_under_load_loses_nothing(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles
) -> None:
    rounds = scaled(5, 50)
    repo.append(line(event("approval_requested")))
    turn(repo, sleep_before=0.3)
    slowest, answered = 0.0, 0
    positions: list[str | None] = [None] * STREAMS
    with contextlib.ExitStack() as stack:
        histories = [stack.enter_context(EventHistory(repo.log)) for _ in range(STREAMS)]
        for number in range(rounds):
            repo.ask_approval(iteration=number)
            repo.append(*[line(event(n=number, part=part)) for part in range(50)])
            request = cast("ControlRequest", decision(confirmation=SKIPS))

            program = start_agent("--listen", "127.0.0.1:0")
            answer, took = await stop_under_load(program, histories, positions, request)
            slowest, answered = max(slowest, took), answered + (answer is not None)

            restarted = start_agent("--listen", "127.0.0.1:0")
            again = await execute(restarted.address(), request)
            restarted.process.terminate()
            assert await asyncio.to_thread(restarted.exit_code) == 0
            assert again is not None
            assert again["exitCode"] == 0
            assert answer is None or again == {**answer, "replayed": True}
            assert len(executions(repo)) == number + 1
        # What was written after the streams had ended is all that they have not seen.
        last = start_agent("--listen", "127.0.0.1:0")
        transport = SpriteServiceTransport(last.address(), token=TOKEN, policy=ONE_TRY)
        for history, position in zip(histories, positions, strict=True):
            async with Follower(transport.events(EventQuery(loop_id=LOOP, resume_token=position))) as rest:
                for batch in await rest.to_end():
                    history.saw(batch)
            assert history.at_end()
        await transport.close()

    assert slowest < AT_ONCE
    reached = (
        f"{rounds} stops with a control and {STREAMS} streams: {answered} answered, {rounds - answered} found again"
    )
    found("T26", f"{reached}, {STREAMS * rounds} streams ended with a cursor, exit within {slowest:.1f} s")
