"""Readers of whole logs, through the project's own transport, and the count of what they missed. Runs in workers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.bench.processes import Server


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What of the lines that should have come once did not, or came again."""

    lost: int = 0
    doubled: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(lost=self.lost + other.lost, doubled=self.doubled + other.doubled)


def tally(numbers: Sequence[int], first: int, last: int) -> Tally:
    """Compares the line numbers that came with those that there are."""
    came = set(numbers)
    return Tally(
        lost=last - first + 1 - len(came.intersection(range(first, last + 1))), doubled=len(numbers) - len(came)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """One log, read to its end."""

    seconds: float
    tally: Tally


async def replay(server: Server, loop: str, lines: int) -> Replayed:
    """Reads a whole log, validated."""
    numbers: list[int] = []
    began = time.perf_counter()
    transport = SpriteServiceTransport(server.address, token=server.token)
    async for batch in transport.events(EventQuery(loop_id=loop)):
        numbers += [event["cursor"]["eventLineOffset"] for event in batch.events]
    await transport.close()
    seconds = time.perf_counter() - began
    return Replayed(seconds=seconds, tally=tally(numbers, 1, lines))


_stalled: list[object] = []
"""Streams of this process that are open and not read."""


async def stall(server: Server, loop: str) -> None:
    """Opens a stream, takes one batch and no more."""
    transport = SpriteServiceTransport(server.address, token=server.token)
    batches = transport.events(EventQuery(loop_id=loop))
    await anext(batches)
    _stalled.extend((transport, batches))
