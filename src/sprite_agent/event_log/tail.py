"""The end of a log, looked at once for all who follow it: each record is read, parsed and checked for the first only.

A window of what has come last is kept (`window`), from which each follower takes at its own
pace. Whoever is too slow for it, or meets anything out of the ordinary (a malformed record, a
log that is gone or another one), reads for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import TYPE_CHECKING

from sprite_agent.contract import clock
from sprite_agent.contract.events import EventBuilder
from sprite_agent.event_log.index import READ_AGAIN_AT_ONCE
from sprite_agent.event_log.log import Arrived
from sprite_agent.event_log.pieces import goes_on
from sprite_agent.event_log.waiting import tell, waited
from sprite_agent.event_log.window import Window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.contract.envelopes import Source
    from sprite_agent.event_log.folder_watch import Changes, FolderWatch
    from sprite_agent.event_log.index import LogView
    from sprite_agent.event_log.log import EventLog, LogStamp
    from sprite_agent.event_log.pieces import Steps
    from sprite_agent.event_log.window import News
    from sprite_agent.event_log.workers import Workers

POLL = 1.0
"""Seconds until a change is found of which the system has not told: network and overlay file systems may not."""
_POLLED_AT_ONCE = 64
"""Logs; it takes a fraction of a millisecond."""
QUIET_PAUSE = 0.002
"""Seconds from one look at a busy log to the next: at once when it was quiet, never one message per append."""
UNSURE_PAUSE = 0.02
"""Seconds between looks at a log that was not yet read again since it last changed; each reads a piece of it again."""
SETTLED_PAUSE = 1.0
"""Seconds until the times of a file tell whether it was changed since; a small log is read again with each look."""


class Tails:
    """The tails of a repo's logs, each for as long as somebody follows it. Belongs to one event loop."""

    def __init__(self, repo: str, folders: FolderWatch, workers: Workers) -> None:
        self._repo = repo
        self._folders = folders
        self._workers = workers
        self._tails: dict[EventLog, Tail] = {}
        self._polling: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def follow(self, log: EventLog, seen: LogView) -> Iterator[Tail]:
        """The tail of a log, which somebody looks at inside the block; `seen`: what they have seen of it."""
        tail = self._tails.get(log)
        if tail is None:
            source: Source = {"repoPath": self._repo, "loopId": log.loop_id}
            tail = self._tails[log] = Tail(log, source, self._folders.follow(log.open_folder), self._workers, seen)
            self._polling = self._polling or asyncio.create_task(self._poll())
        tail.followers += 1
        try:
            yield tail
        finally:
            tail.followers -= 1
            if not tail.followers:
                del self._tails[log]
                tail.close()
                if self._polling is not None and not self._tails:
                    self._polling.cancel()
                    self._polling = None

    def wake_all(self) -> None:
        """Has every follower look whether it is to end."""
        for tail in self._tails.values():
            tail.wake()

    async def _poll(self) -> None:
        """Has each tail find out now and then what it has not heard of; some at a time, for all there is one timer."""
        while True:
            tails = list(self._tails.values())
            shares = max(1, math.ceil(len(tails) / _POLLED_AT_ONCE))
            for number in range(shares):
                await asyncio.sleep(POLL / shares)
                for tail in tails[number::shares]:
                    tail.poll()


class Tail:
    """See the module. Lives as long as somebody follows; a task of its own looks at the log."""

    def __init__(self, log: EventLog, source: Source, changes: Changes, workers: Workers, seen: LogView) -> None:
        self.followers = 0
        self.view: LogView | None = None
        """What the log was like at the last look; None: none yet, or it failed."""
        self.turn = 0
        """Rises with each look, and whenever everybody is woken."""
        self._log = log
        self._source = source
        self._changes = changes
        self._workers = workers
        self._window = Window()
        self._reread_at = -math.inf
        self._arrived: Arrived | None = None
        """What the look that is under way has found."""
        self._is_kept = False
        """Whether the log keeps what comes, for this."""
        self._has_moved = False
        """Whether the folder may be another one since it was looked for last."""
        self._stamp: LogStamp | None = None
        """What the file looked like before the last look."""
        self._looked_at = -math.inf
        """When the last look began."""
        self._is_all = True
        """Whether it has found all that there was."""
        self._waiting: set[asyncio.Future[None]] = set()
        self._wanted = asyncio.Event()
        self._go_on_from(seen)
        self._task = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Looks no more."""
        self._task.cancel()
        self._changes.close()
        self._log.keep_newest(None)
        self._window = Window()  # a cancelled task keeps this tail until cycles are looked for, which is seldom

    def wake(self) -> None:
        """Has every follower look at the tail."""
        self.turn += 1
        for woken in self._waiting:
            tell(woken)
        self._waiting.clear()
        self._wanted.clear()

    def poll(self) -> None:
        """Finds out whether the log has changed."""
        if self._log.stamp() != self._stamp:
            self._changes.notice()

    async def wait(self, turn: int, timeout: float) -> None:  # noqa: ASYNC109  # a follower's own beat, not a failure
        """Returns when there has been another turn than this, after `timeout` seconds at the latest."""
        if self.turn != turn or timeout <= 0:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(woken)
        self._wanted.set()
        try:
            await waited(woken, timeout)
        finally:
            self._waiting.discard(woken)

    def number_of(self, view: LogView, offset: int) -> int | None:
        """The number of the portion that begins at an offset of the log as `view` saw it; None: there is none."""
        if self.view is None or self.view.identity != view.identity:
            return None
        return self._window.number_at(offset)

    def news(self, number: int) -> News | None:
        """What there is from the portion of that number on; None: it is gone, or can't be sent as it is."""
        return None if self.view is None else self._window.news(number)

    def _go_on_from(self, seen: LogView) -> None:
        """Spares the first look, where it would find what the first follower has just seen."""
        self._stamp = self._log.stamp()
        if self._stamp is not None and self._log.is_quick(self._stamp):
            self._keep()
            if self._log.is_at(seen, self._stamp):
                self._publish(Arrived(seen, [], is_all=True))

    async def _watch(self) -> None:
        if self.view is None:
            await self._look()
        while True:
            await self._wanted.wait()  # as long as all are behind, they read for themselves
            if self._is_all:
                await self._wait()
            await self._look()

    async def _wait(self) -> None:
        """Returns when another look is due: after a change, and not too soon after the last look."""
        changes = self._changes
        if changes.is_deaf:
            await self._rest()
            if self._log.stamp() != self._stamp:
                return
            changes.look_anew()
            if self._log.stamp() != self._stamp:
                return
        pause = self._pause()
        while not await changes.wait(pause):
            if pause < math.inf or self._log.stamp() != self._stamp:
                break
        await self._rest()

    async def _rest(self) -> None:
        if (rest := self._looked_at + QUIET_PAUSE - time.monotonic()) > 0:
            await asyncio.sleep(rest)

    def _pause(self) -> float:
        """Seconds until another look is due although nothing changes."""
        if self.view is None:
            return UNSURE_PAUSE
        if self.view.is_sure:
            return math.inf
        return UNSURE_PAUSE if self.view.end > READ_AGAIN_AT_ONCE else SETTLED_PAUSE

    async def _look(self) -> None:
        """Looks at what is new."""
        self._stamp, self._looked_at = self._log.stamp(), time.monotonic()
        try:
            await self._read_newest()
        except Exception:  # noqa: BLE001  # of whatever kind: whoever follows looks for themselves, and meets it too
            self.view, self._has_moved, self._is_all = None, True, True
            self.wake()

    async def _read_newest(self) -> None:
        with contextlib.closing(self._look_steps()) as look:
            is_quick = self._log.is_quick(self._stamp)
            more = goes_on(look) if is_quick else await self._workers.run(lambda: goes_on(look))
            while more:
                more = await self._workers.run(lambda: goes_on(look))
        assert self._arrived is not None  # noqa: S101  # that is what the steps have done
        arrived, self._arrived = self._arrived, None
        self._publish(arrived)
        if self._pause() == UNSURE_PAUSE and time.monotonic() - self._reread_at >= UNSURE_PAUSE:
            self._reread_at = time.monotonic()
            await self._workers.run(self._log.reread)

    def _look_steps(self) -> Steps[None]:
        if not self._is_kept:
            self._keep()
        self._arrived = yield from self._log.newest_steps()

    def _keep(self) -> None:
        """Has the log keep what comes."""
        builder = EventBuilder(source=self._source, trace_id=None, emitted_at=clock.now(), line_count=0)
        self._log.keep_newest(builder)
        self._is_kept = True

    def _publish(self, arrived: Arrived) -> None:
        """Lets followers have what has arrived."""
        view = arrived.view
        if self.view is None or view.identity != self.view.identity:
            if self.view is not None or self._has_moved:
                self._changes.look_anew()
            self._window.begin_anew(view.token.position.offset)
        else:
            for portion in arrived.portions:
                self._window.append(portion)
        self.view, self._is_all = view, arrived.is_all
        self._window.tell(lines=view.lines, is_all=arrived.is_all)
        self.wake()
