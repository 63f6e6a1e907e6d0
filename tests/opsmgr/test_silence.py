"""A call that is silent for too long is cancelled; whoever wants the reader to end gets that all the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from opsmgr.transport.silence import Silence

if TYPE_CHECKING:
    from collections.abc import Callable


class Call:
    """A call that brings nothing; like the real one it ends the wait for it when it is cancelled."""

    def __init__(self, also: Callable[[], object] = lambda: None) -> None:
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._also = also

    async def read(self) -> None:
        """Waits for ever."""
        await self._news

    def cancel(self) -> None:
        """Ends waiting."""
        self._news.cancel()
        self._also()


async def wait_in_vain(call: Call) -> None:
    silence = Silence(call, 0.05)
    try:
        with silence:
            await call.read()
    finally:
        silence.close()


async def test_a_silent_call_is_cancelled_and_told_of() -> None:
    with pytest.raises(TimeoutError):
        await wait_in_vain(Call())


async def test_a_reader_that_is_to_end_in_the_same_moment_ends() -> None:
    reading = asyncio.ensure_future(asyncio.sleep(0))

    def end() -> None:
        reading.cancel()

    reading = asyncio.ensure_future(wait_in_vain(Call(end)))
    await asyncio.wait({reading})

    assert reading.cancelled()
