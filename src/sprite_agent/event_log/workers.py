"""The thread in which the streams of one repo read: beside the event loop, piece by piece, so that none waits long."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from sprite_agent.event_log.pieces import goes_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprite_agent.event_log.pieces import Steps

_T = TypeVar("_T")

_THREADS = 1
"""They share one interpreter: a second one reads little more, and keeps everybody else waiting for it longer."""


class Workers:
    """Lives as long as its repo; close it when nothing runs in it any more."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="log")

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    async def run(self, piece: Callable[[], _T]) -> _T:
        """What a piece of work returns. Whoever is cancelled meanwhile leaves when the piece is over, not under it."""
        job = self._pool.submit(piece)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not job.cancel():
                over, loop = asyncio.Event(), asyncio.get_running_loop()
                job.add_done_callback(lambda _: loop.call_soon_threadsafe(over.set))
                while not over.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await over.wait()
            raise

    async def finish(self, steps: Steps[None]) -> None:
        """Does work to its end; others get a turn between its pieces."""
        with contextlib.closing(steps):
            while await self.run(lambda: goes_on(steps)):
                pass
