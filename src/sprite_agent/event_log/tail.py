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
from sprite_agent.event_log.pieces import piece_of
from sprite_agent.event_log.window import Window

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import Source
    from sprite_agent.event_log.folder_watch import FolderWatch
    from sprite_agent.event_log.index import LogView
    from sprite_agent.event_log.log import EventLog, LogStamp
    from sprite_agent.event_log.pieces import Steps
    from sprite_agent.event_log.window import News
    from sprite_agent.event_log.workers import Workers

POLL = 1.0
"""Seconds until a change is found of which the system has not told: network and overlay file systems may not."""
_POLLS_ALONE = 10
"""As many times as often where it tells of none."""
_POLLED_AT_ONCE = 64
"""Logs; it takes a fraction of a millisecond."""
QUIET_PAUSE = 0.002
"""Seconds from one look at a busy log to the next: at once when it was quiet, never one message per append."""
UNSURE_PAUSE = 0.02
"""Seconds between looks at a log that was not yet read again since it last changed; each reads a piece of it again."""
_RARELY = 10
"""As many times as long between them while it is written without pause: all there is time for is to keep up."""
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

    def follow(self, log: EventLog, seen: LogView) -> Tail:
        """The tail of a log, for somebody who looks at it until they `leave`; `seen`: what they have seen of it."""
        tail = self._tails.get(log)
        if tail is None:
            source: Source = {"repoPath": self._repo, "loopId": log.loop_id}
            tail = self._tails[log] = Tail(log, source, self._folders, self._workers, seen)
            self._polling = self._polling or asyncio.create_task(self._poll())
        tail.followers += 1
        return tail

    def leave(self, log: EventLog) -> None:
        """One less looks at the tail of a log; it ends with the last."""
        tail = self._tails[log]
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
            alone = [tail for tail in tails if not tail.is_told]
            shares = max(_POLLS_ALONE if alone else 1, math.ceil(len(tails) / _POLLED_AT_ONCE))
            for number in range(shares):
                await asyncio.sleep(POLL / shares)
                for tail in (*alone, *tails[number::shares]):
                    tail.poll()


class Tail:
    """See the module. Lives as long as somebody follows.

    Most looks take a tenth of a millisecond: they are made on the spot when there is word of a change. Only what may
    take long is done by a task, in another thread.
    """

    def __init__(self, log: EventLog, source: Source, folders: FolderWatch, workers: Workers, seen: LogView) -> None:
        self.followers = 0
        self.view: LogView | None = None
        """What the log was like at the last look; None: none yet, or it failed."""
        self.turn = 0
        """Rises with each look, and whenever everybody is woken."""
        self._log = log
        self._source = source
        self._workers = workers
        self._window = Window()
        self._waiting: dict[asyncio.Future[None], float] = {}
        """Who waits for another turn, and until when."""
        self._is_closed = False
        """What still runs in a thread then asks for it under the log's lock."""
        self._is_kept = False
        """Whether the log keeps what comes, for this."""
        self._has_moved = False
        """Whether the folder may be another one since it was looked for last."""
        self._stamp: LogStamp | None = None
        """What the file looked like before the last look."""
        self._looked_at = -math.inf
        """When the last look began."""
        self._reread_at = -math.inf
        self._is_all = True
        """Whether it has found all that there was."""
        self._task: asyncio.Task[None] | None = None
        """What takes long of a look."""
        self._timer: asyncio.TimerHandle | None = None
        """Until another look may be due, or somebody has waited long enough."""
        self._changes = folders.follow(log.open_folder, self._hear)
        self._go_on_from(seen)

    @property
    def is_told(self) -> bool:
        """Whether the system tells of changes."""
        return self._changes.are_told

    def close(self) -> None:
        """Looks no more."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._changes.close()
        self._log.keep_newest(None)
        self._window = Window()  # what is cancelled keeps this tail until cycles are looked for, which is seldom

    def wake(self) -> None:
        """Has every follower look at the tail."""
        self.turn += 1
        for woken in self._waiting:
            _tell(woken)
        self._waiting.clear()

    def poll(self) -> None:
        """Finds out whether the log has changed; one that may have, as far as its times tell, is looked at as well."""
        is_settled = self.view is None or self.view.is_sure or self._looked_at + SETTLED_PAUSE > time.monotonic()
        if not is_settled or self._log.stamp() != self._stamp:
            self._changes.notice()

    async def wait(self, turn: int, timeout: float) -> None:  # noqa: ASYNC109  # a follower's own beat, not a failure
        """Returns when there has been another turn than this, after `timeout` seconds at the latest."""
        if self.turn != turn or timeout <= 0:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        until = self._waiting[woken] = time.monotonic() + timeout
        self._plan(until)
        try:
            await woken
        finally:
            self._waiting.pop(woken, None)

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

    def _is_wanted(self) -> bool:
        """Whether a look is of use: somebody waits (who is behind reads for themselves), and none is under way."""
        return bool(self._waiting) and self._task is None

    def _due(self) -> float:
        """When the next look is: after a change, and not too soon after the last look."""
        if not self._is_all:
            return -math.inf
        if self._changes.are_there:
            return self._looked_at + QUIET_PAUSE
        if self.view is None or self._is_large_and_unsure():
            return self._looked_at + UNSURE_PAUSE
        return math.inf

    def _hear(self) -> None:
        """There is a change."""
        if self._is_wanted():
            if self._due() <= time.monotonic():
                self._look()
            else:
                self._plan()

    def _plan(self, until: float = math.inf) -> None:
        """Sees to it that there is a look when one is due, and an end to waiting at `until`."""
        due = min(until, self._due()) if self._is_wanted() else until
        if due == math.inf:
            return
        if self._timer is not None:
            if self._timer.when() <= due:
                return  # it plans anew; most who wait are woken by an event, and need no timer of their own
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        now = time.monotonic()
        for woken in [woken for woken, until in self._waiting.items() if until <= now]:
            _tell(woken)
            del self._waiting[woken]
        if self._is_wanted() and self._due() <= now and not (self._changes.is_deaf and self._hears_again()):
            self._look()
        self._plan(min(self._waiting.values(), default=math.inf))

    def _hears_again(self) -> bool:
        """Listens for changes after a burst, if it is over."""
        if self._is_all and self._log.stamp() == self._stamp:
            self._changes.look_anew()
            self._changes.are_there = self._log.stamp() != self._stamp
        return not self._changes.are_there

    def _look(self) -> None:
        """Looks at what is new."""
        self._changes.are_there = self._changes.is_deaf
        self._stamp, self._looked_at = self._log.stamp(), time.monotonic()
        try:
            look = self._log.newest_steps(self._stamp, lambda: self._is_closed)
            arrived = self._piece_of(look) if self._log.is_quick(self._stamp) else None
            if arrived is not None:
                self._publish(arrived)
        except Exception:  # noqa: BLE001  # as in _work()
            self._fail()
            return
        if arrived is None:
            self._task = asyncio.create_task(self._work(look))
        elif self._is_to_be_reread():
            self._task = asyncio.create_task(self._work(None))

    async def _work(self, look: Steps[Arrived] | None) -> None:
        """What takes long: the rest of a look, and reading a piece of the log again."""
        try:
            if look is not None:
                with contextlib.closing(look):
                    while (arrived := await self._workers.run(lambda: self._piece_of(look))) is None:
                        pass
                self._publish(arrived)
            if self._is_to_be_reread():
                self._reread_at = time.monotonic()
                await self._workers.run(self._log.reread)
        except Exception:  # noqa: BLE001  # of whatever kind: whoever follows looks for themselves, and meets it too
            self._fail()
        self._task = None
        self._plan()

    def _piece_of(self, look: Steps[Arrived]) -> Arrived | None:
        if not self._is_kept:
            self._keep()
        return piece_of(look)

    def _keep(self) -> None:
        """Has the log keep what comes."""
        builder = EventBuilder(source=self._source, trace_id=None, emitted_at=clock.now(), line_count=0)
        self._log.keep_newest(builder, lambda: self._is_closed)
        self._is_kept = True

    def _is_to_be_reread(self) -> bool:
        pause = UNSURE_PAUSE * (_RARELY if self._changes.is_deaf else 1)
        return self._is_large_and_unsure() and time.monotonic() - self._reread_at >= pause

    def _is_large_and_unsure(self) -> bool:
        """Whether it was not read again since it last changed, and is too large to be with each look."""
        return self.view is not None and not self.view.is_sure and self.view.end > READ_AGAIN_AT_ONCE

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

    def _fail(self) -> None:
        self.view, self._has_moved, self._is_all = None, True, True
        self.wake()


def _tell(woken: asyncio.Future[None]) -> None:
    if not woken.done():  # cancelled, it may be
        woken.set_result(None)
