"""The end of a log, looked at once for all who follow it: each record is read, judged and checked for the first only.

A window of what has come last is kept, from which each follower takes at its own pace.
Whoever is too slow for it, or meets anything out of the ordinary (a malformed record, a
log that is gone or another one), reads for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.contract import clock
from sprite_agent.contract.events import EventBuilder
from sprite_agent.contract.streaming import EventBatch
from sprite_agent.errors import ContractError, OpsError
from sprite_agent.event_log.index import READ_AGAIN_AT_ONCE
from sprite_agent.event_log.newest import MAX_BATCH_BYTES, MAX_BATCH_EVENTS
from sprite_agent.event_log.pieces import goes_on
from sprite_agent.event_log.records import value_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.contract.envelopes import Source
    from sprite_agent.contract.streaming import RawEvent
    from sprite_agent.event_log.folder_watch import Changes, FolderWatch
    from sprite_agent.event_log.index import LogView
    from sprite_agent.event_log.log import EventLog, LogStamp
    from sprite_agent.event_log.newest import Portion
    from sprite_agent.event_log.pieces import Steps
    from sprite_agent.event_log.records import Position
    from sprite_agent.event_log.workers import Workers

QUIET_PAUSE = 0.002
"""Seconds from one look at a busy log to the next: at once when it was quiet, never one message per append."""
UNSURE_PAUSE = 0.1
"""Seconds between looks at a log that was not yet read again since it last changed."""
SETTLED_PAUSE = 1.0
"""Seconds until the times of a file tell whether it was changed since; a small log is read again with each look."""
_LITTLE = 64 * 1024
"""Bytes: reading and judging them takes a millisecond or two, whatever they hold."""
_MAX_KEPT = 4 * 1024 * 1024
"""Bytes of records in the window, about."""
_MAX_PORTIONS = 4096


class Checked(NamedTuple):
    """A portion of the log, ready to be sent."""

    start: int
    """The offset it begins at."""
    end: Position
    token: str
    """The resume token for its end."""
    events: list[RawEvent] | None
    """None: a record in it is malformed."""
    size: int
    """Bytes of its records."""


class News(NamedTuple):
    """What stands in the window from one portion on, as much of it as a batch may have."""

    next_number: int
    """Number of the portion after it; that of the first itself where there is none yet."""
    end: Position | None
    token: str
    """The resume token for its end; of no meaning where there is none yet."""
    at_end: bool
    """Whether it reaches to the end of the log."""
    batch: EventBatch | None
    """Of raw events, for all who are at the same place; None: there are none in it."""


class Tails:
    """The tails of a repo's logs, each for as long as somebody follows it. Belongs to one event loop."""

    def __init__(self, repo: str, folders: FolderWatch, workers: Workers) -> None:
        self._repo = repo
        self._folders = folders
        self._workers = workers
        self._tails: dict[EventLog, Tail] = {}

    @contextlib.contextmanager
    def follow(self, log: EventLog) -> Iterator[Tail]:
        """The tail of a log, which somebody looks at inside the block."""
        tail = self._tails.get(log)
        if tail is None:
            source: Source = {"repoPath": self._repo, "loopId": log.loop_id}
            tail = self._tails[log] = Tail(log, source, self._folders, self._workers)
        tail.followers += 1
        try:
            yield tail
        finally:
            tail.followers -= 1
            if not tail.followers:
                del self._tails[log]
                tail.close()

    def wake_all(self) -> None:
        """Has every follower look whether it is to end."""
        for tail in self._tails.values():
            tail.wake()


class Tail:
    """See the module. Lives as long as somebody follows; a task of its own looks at the log."""

    def __init__(self, log: EventLog, source: Source, folders: FolderWatch, workers: Workers) -> None:
        self.followers = 0
        self.view: LogView | None = None
        """What the log was like at the last look; None: none yet, or it failed."""
        self.turn = 0
        """Rises with each look, and whenever everybody is woken."""
        self._log = log
        self._source = source
        self._folders = folders
        self._workers = workers
        self._window: deque[Checked] = deque()
        self._first = 0
        """Number of the first portion in the window; they are counted from the tail's beginning."""
        self._places: dict[int, int] = {}
        """Numbers of the portions by the offset they begin at, that of the next one included."""
        self._kept = 0
        self._made: dict[int, News] = {}
        """Since the last turn, by the number of the first portion."""
        self._reread_at = -math.inf
        self._seen: LogView | None = None
        """What the look that is under way has found; and what of it was checked, and how many portions were not."""
        self._checked: list[Checked] = []
        self._unchecked = 0
        self._is_kept = False
        """Whether the log keeps what comes, for this."""
        self._has_moved = False
        """Whether the folder may be another one since it was looked for last."""
        self._waiting: set[asyncio.Future[None]] = set()
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Looks no more."""
        self._task.cancel()
        self._log.keep_newest(keep=False)

    def wake(self) -> None:
        """Has every follower look at the tail."""
        self.turn += 1
        self._made.clear()
        for woken in self._waiting:
            if not woken.done():
                woken.set_result(None)
        self._waiting.clear()
        self._wanted.clear()

    async def wait(self, turn: int, timeout: float) -> None:  # noqa: ASYNC109  # a follower's own beat, not a failure
        """Returns when there has been another turn than this, after `timeout` seconds at the latest."""
        if self.turn != turn or timeout <= 0:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(woken)
        self._wanted.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await woken
        finally:
            self._waiting.discard(woken)

    def number_of(self, view: LogView, offset: int) -> int | None:
        """The number of the portion that begins at an offset of the log as `view` saw it; None: there is none."""
        if self.view is None or self.view.identity != view.identity:
            return None
        return self._places.get(offset)

    def news(self, number: int) -> News | None:
        """What there is from the portion of that number on; None: it is gone, or can't be sent as it is."""
        if self.view is None or number < self._first:
            return None
        made = self._made.get(number)
        if made is None or (made.batch is not None and made.batch.emitted_at != clock.now()):
            portions = self._portions(number)
            if portions is None:
                return None
            made = self._made[number] = self._news(self.view, number, portions)
        return made

    def _portions(self, number: int) -> list[Checked] | None:
        found: list[Checked] = []
        events, size = 0, 0
        for portion in itertools.islice(self._window, number - self._first, None):
            if portion.events is None:
                return found or None
            events += len(portion.events)
            size += portion.size
            if found and (events > MAX_BATCH_EVENTS or size > MAX_BATCH_BYTES):
                break
            found.append(portion)
        return found

    def _news(self, view: LogView, number: int, portions: list[Checked]) -> News:
        following = number + len(portions)
        at_end = not self._unchecked and following == self._first + len(self._window)
        if not portions:
            return News(following, None, "", at_end, None)
        end, token = portions[-1].end, portions[-1].token
        raw_events = [event for portion in portions for event in portion.events or ()]
        batch = None
        if raw_events:
            batch = EventBatch(
                events=[],
                raw_events=raw_events,
                cursor={"eventLineOffset": raw_events[-1][0], "eventLineCount": view.lines},
                resume_token=token,
                caught_up=at_end,
                skipped=[],
                emitted_at=clock.now(),
            )
        return News(following, end, token, at_end, batch)

    async def _watch(self) -> None:
        with self._folders.follow(self._log.open_folder) as changes:
            while True:
                stamp, began = self._log.stamp(), time.monotonic()
                try:
                    await self._look(changes, is_little=self._is_little(stamp))
                except OpsError:
                    self.view, self._has_moved = None, True  # whoever follows finds out why
                    self.wake()
                await self._wanted.wait()  # as long as all are behind, they read for themselves
                pause = self._pause()
                while not await changes.wait(pause):
                    if pause < math.inf or self._log.stamp() != stamp:
                        break
                if (rest := began + QUIET_PAUSE - time.monotonic()) > 0:
                    await asyncio.sleep(rest)

    def _pause(self) -> float:
        """Seconds until another look is due although nothing changes."""
        if self.view is None:
            return UNSURE_PAUSE
        if self.view.is_sure:
            return math.inf
        return UNSURE_PAUSE if self.view.end > READ_AGAIN_AT_ONCE else SETTLED_PAUSE

    def _is_little(self, stamp: LogStamp | None) -> bool:
        """Whether so little has come, to the end of a record, that the way to another thread costs more than a look."""
        if self.view is None or stamp is None or self._log.is_busy:
            return False
        return 0 <= stamp.size - self.view.token.position.offset <= _LITTLE

    async def _look(self, changes: Changes, *, is_little: bool) -> None:
        with contextlib.closing(self._look_steps()) as look:
            more = goes_on(look) if is_little else await self._workers.run(lambda: goes_on(look))
            while more:
                self._publish(changes)
                more = await self._workers.run(lambda: goes_on(look))
        self._publish(changes)
        if self._pause() == UNSURE_PAUSE and time.monotonic() - self._reread_at >= UNSURE_PAUSE:
            self._reread_at = time.monotonic()
            await self._workers.run(self._log.reread)

    def _look_steps(self) -> Steps[None]:
        """Reads what is new, and checks it portion by portion."""
        if not self._is_kept:
            self._log.keep_newest(keep=True)
            self._is_kept = True
        self._seen = None
        view, portions = yield from self._log.newest_steps()
        self._seen = view
        if not portions:
            return
        builder = EventBuilder(source=self._source, trace_id=None, emitted_at=clock.now(), line_count=view.lines)
        for number, portion in enumerate(portions, 1):
            self._checked.append(_checked(portion, builder))
            self._unchecked = len(portions) - number
            if self._unchecked:
                yield

    def _publish(self, changes: Changes) -> None:
        """Lets followers have what was seen and checked so far."""
        if self._seen is None:
            return
        if self.view is None or self._seen.identity != self.view.identity:
            if self.view is not None or self._has_moved:
                changes.look_anew()
            self._begin_anew(self._seen.token.position.offset)
            self._unchecked = 0
        else:
            for portion in self._checked:
                self._append(portion)
        self.view = self._seen
        self._checked.clear()
        self.wake()

    def _begin_anew(self, offset: int) -> None:
        self._first += len(self._window) + 1  # no number is used twice
        self._window.clear()
        self._places = {offset: self._first}
        self._kept = 0

    def _append(self, portion: Checked) -> None:
        if portion.start not in self._places:
            self._begin_anew(portion.start)  # more has come at once than is kept
        self._window.append(portion)
        self._places[portion.end.offset] = self._first + len(self._window)
        self._kept += portion.size
        while len(self._window) > 1 and (self._kept > _MAX_KEPT or len(self._window) > _MAX_PORTIONS):
            gone = self._window.popleft()
            del self._places[gone.start]
            self._first += 1
            self._kept -= gone.size


def _checked(portion: Portion, builder: EventBuilder) -> Checked:
    start, end, token, records = portion
    size = sum(len(record.text) for record in records)
    events: list[RawEvent] = []
    try:
        for record in records:
            builder.check(value_of(record), record.last_line)
            events.append((record.last_line, record.text.decode()))
    except ContractError:
        return Checked(start, end, token, None, size)
    return Checked(start, end, token, events, size)
