"""One subscription to a loop's events. Keeps the promises of StreamEvents, whichever transport carries it."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from sprite_agent.contract import clock
from sprite_agent.contract.events import EventBuilder
from sprite_agent.contract.streaming import EventBatch
from sprite_agent.errors import EventsNotFound, LogTruncated, LoopNotFound
from sprite_agent.event_log.gathering import Gathered, gather
from sprite_agent.event_log.pieces import goes_on
from sprite_agent.event_log.records import START
from sprite_agent.event_log.resume import START_TOKEN, parse_token

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from sprite_agent.contract.streaming import EventQuery
    from sprite_agent.errors import EventMalformed
    from sprite_agent.event_log.index import LogView
    from sprite_agent.event_log.log import EventLog
    from sprite_agent.event_log.pieces import Steps
    from sprite_agent.event_log.reader import LogReader
    from sprite_agent.event_log.tail import Tail, Tails
    from sprite_agent.event_log.workers import Workers

_BEAT, _ROUNDED_FROM = 0.25, 2.0
"""Seconds: heartbeats are due at multiples of the first where they are further apart than the second, so that the agent
is woken once for many streams, not once for each."""
_LOSSES, _LOSS_PAUSE = 10, 0.025
"""How often a follower looks for a log that is gone or too short before it says so, and seconds in between."""


class StreamEnd:
    """When streams end although they could go on: at an age of their own, and all at once when asked to."""

    def __init__(self, max_age: float = math.inf) -> None:
        """`max_age` is in seconds; each stream takes a random part off, so that they do not end together."""
        self._max_age = max_age
        self.requested = False

    def age_limit(self) -> float:
        """The age, in seconds, at which a stream that starts now ends."""
        return self._max_age * random.uniform(0.9, 1.0)  # noqa: S311  # spreads load, guards nothing


def stream_events(
    log: EventLog,
    query: EventQuery,
    *,
    raw: bool,
    before_waiting: Callable[[], Awaitable[None]],
    repo: Path,
    workers: Workers,
    tails: Tails,
    end: StreamEnd,
) -> AsyncGenerator[EventBatch]:
    """The batches of one subscription, of raw events where `raw`: the first at once, with or without events.

    Where the first may take a while, as the log has to be read, `before_waiting` is called before. A stream that
    `end` ends gives out a last batch, which says where to resume, unless it had not begun yet. Nothing of a batch is
    kept while its reader has it: parsed, it can be many times as large as its text.

    Raises:
        EventMalformed: after everything before the malformed record was given out.
        CursorBeyondEnd, LogReplaced, LogTruncated, HistoryRewritten: the position is not, or no longer, one of
            this log.
        CursorInvalid, ResumeTokenInvalid, RequestInvalid, LoopNotFound, EventsNotFound, ArtifactNotRegular
    """
    return _Stream(log, query, str(repo), end, raw=raw).batches(workers, tails, before_waiting)


class _Stream:
    """Where one subscription stands. Lives as long as the subscription.

    It reads the file by itself up to the log's end; what reads runs in threads, a piece at a time, and nothing
    else touches the stream meanwhile. A follower then lets go of the file, and takes what comes from the tail.
    """

    _view: LogView
    _token: str
    """Where the stream stands; and the line and the offset of that."""
    _position = START
    _opening: Steps[None] | None = None
    """The search for the place to begin at."""
    _opened: LogReader | None = None
    """None: not opened yet, or let go of."""
    _looking: Steps[None] | None = None
    """A look at the log that is under way."""
    _found: EventBatch | None = None
    """What the last turn has made, until it is given out."""
    _fault: EventMalformed | None = None
    """The malformed record that the stream ends with, after that."""
    _has_read = False
    """Whether everything was read up to the file's end, or as much as is wanted."""
    _number: int | None = None
    """Of the tail's next portion, while it is followed."""
    _turn_seen = 0
    """The turn of the tail in which there was no more; -1: there is more."""
    _caught_up = False
    _told_so = False
    """Whether the last batch has said that all was sent."""

    def __init__(self, log: EventLog, query: EventQuery, repo: str, end: StreamEnd, *, raw: bool) -> None:
        self._log = log
        self._query = query
        self._raw = raw
        self._repo = repo
        self._end = end
        self._ends_at = time.monotonic() + end.age_limit()
        self._heard_at = time.monotonic()
        self._last_line = query.after_line
        self._sent = 0

    def close(self) -> None:
        """Closes the descriptor."""
        for steps in (self._opening, self._looking):
            if steps is not None:
                steps.close()
        self._opening = self._looking = None
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    async def batches(
        self, workers: Workers, tails: Tails, before_waiting: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[EventBatch]:
        """Batches until the query is satisfied."""
        tail: Tail | None = None
        try:
            while await self._open(workers, before_waiting):
                yield self._given()
            if self._found is None:
                return
            yield self._given()
            while True:
                while await self._read(workers):
                    yield self._given()
                if self._sent_enough() or not self._query.follow:
                    return
                if self._is_over():
                    break
                tail = tail or tails.follow(self._log, self._view)
                while await self._follow(tail, workers):
                    yield self._given()
            yield self._bookmark()
        finally:
            self.close()
            if tail is not None:
                tails.leave(self._log)

    async def _open(self, workers: Workers, before_waiting: Callable[[], Awaitable[None]]) -> bool:
        """Finds the place to begin at, and makes the first batch.

        True: a large log is still being read, and there is a batch that says so, as the place can be said before.
        """
        token, line = self._query.resume_token, self._query.after_line
        start = START_TOKEN if token is None else parse_token(token)
        if self._opening is None:
            if self._begins_at_end(line if token is None else start.position.line):
                return False
            self._opening = self._open_steps()
            if self._log.is_small() and not goes_on(self._opening):
                return False
            await before_waiting()
        opening = self._opening
        while not self._is_over() and await workers.run(lambda: goes_on(opening)):
            if self._silence() <= 0 and (token or not line):
                self._found = EventBatch(
                    events=[],
                    cursor={
                        "eventLineOffset": start.position.line,
                        "eventLineCount": max(start.position.line, self._log.lines_read),
                    },
                    resume_token=str(start),
                    caught_up=False,
                    skipped=[],
                    emitted_at=clock.now(),
                )
                return True
        return False

    async def _read(self, workers: Workers) -> bool:
        """Makes a batch of what the file holds from where the stream stands. False: there is no more, or enough."""
        if self._fault is not None:
            raise self._fault
        losses = 0
        while not self._has_read and not self._is_over():
            try:
                self._fault = await workers.run(self._turn)
            except (EventsNotFound, LoopNotFound, LogTruncated):
                # Whoever removes a log or cuts it off may be about to write it anew: what is there then decides.
                losses += 1
                if not self._query.follow or losses > _LOSSES:
                    raise
                self.close()  # it may be another file
                await asyncio.sleep(_LOSS_PAUSE)
                continue
            losses = 0
            self._has_read = self._caught_up or self._sent_enough()
            if self._says_something() or self._silence() <= 0:
                return True
            if self._fault is not None:
                raise self._fault
        self._has_read = False
        return False

    async def _follow(self, tail: Tail, workers: Workers) -> bool:
        """Waits for what the tail brings, and makes a batch of it. False: it can't be had from there."""
        await tail.wait(self._turn_seen, self._patience())
        number = self._number_in(tail)
        while number is not None and not self._is_over() and tail.view is not None and (news := tail.news(number)):
            number = self._number = news.next_number
            self._view, self._caught_up = tail.view, news.at_end
            self._turn_seen = tail.turn if news.at_end or news.end is None else -1
            if news.end is not None:
                self._position, self._token = news.end, news.token
            if news.batch is not None:
                self._last_line = news.batch.cursor["eventLineOffset"]
                self._sent += news.batch.event_count
                self._found = news.batch if self._raw else await workers.run(functools.partial(self._built, news.batch))
                return True
            if self._silence() <= 0 or (self._caught_up and not self._told_so):
                self._found = self._bookmark()
                return True
            await tail.wait(self._turn_seen, self._patience())
        self._number, self._turn_seen = None, tail.turn
        return False

    def _number_in(self, tail: Tail) -> int | None:
        """The number of the tail's portion to go on with, if it has that: then the file is let go of."""
        if self._number is None and not self._query.max_events:  # else a portion may be more than is wanted
            self._number = tail.number_of(self._view, self._position.offset)
            if self._number is not None:
                self.close()
        return self._number

    def _built(self, batch: EventBatch) -> EventBatch:
        """The same with events instead of raw ones."""
        builder = self._builder(batch.emitted_at)
        return replace(batch, events=[event for raw in batch.raw_events for event in builder.whole(raw)], raw_events=[])

    def _begins_at_end(self, line: int) -> bool:
        """Whether, after this line, there is nothing to read at first, as far as is known without a look at the log."""
        if line != self._log.lines_read or (view := self._log.known()) is None:
            return False
        end, token = view.token.position, str(view.token)
        if line != end.line or self._query.resume_token not in {None, token}:
            return False
        self._view, self._position, self._token, self._last_line = view, end, token, end.line
        self._caught_up = self._has_read = True
        self._found = self._bookmark()
        return True

    def _open_steps(self) -> Steps[None]:
        token, line = self._query.resume_token, self._query.after_line
        steps = self._log.after_line_steps(line) if token is None else self._log.after_token_steps(token)
        self._opened, self._view = yield from steps
        if token is not None:
            self._last_line = self._opened.position.line
        self._found, self._fault = self._next_batch()
        self._has_read = self._caught_up or self._sent_enough()

    def _silence(self) -> float:
        """Seconds until something is to be said, were it only that there is nothing."""
        due = self._heard_at + self._query.heartbeat_interval
        if self._query.heartbeat_interval > _ROUNDED_FROM:
            due -= due % _BEAT
        return due - time.monotonic()

    def _patience(self) -> float:
        """Seconds to wait for what comes."""
        return max(0.0, min(self._silence(), self._ends_at - time.monotonic()))

    def _is_over(self) -> bool:
        return self._end.requested or time.monotonic() >= self._ends_at

    def _says_something(self) -> bool:
        found = self._found
        return found is not None and bool(found.event_count or found.skipped or (found.caught_up and not self._told_so))

    def _given(self) -> EventBatch:
        """What the last turn has made; it is not held here any longer."""
        assert self._found is not None  # noqa: S101  # the caller has looked
        found, self._found = self._found, None
        self._heard_at = time.monotonic()
        self._told_so = found.caught_up
        return found

    @property
    def _reader(self) -> LogReader:
        assert self._opened is not None  # noqa: S101  # _open_steps() came first
        return self._opened

    def _turn(self) -> EventMalformed | None:
        """One piece of work: looks at the log again when that is due, and makes a batch of what is new.

        Gives the malformed record that ends the stream after the batch.
        """
        if (self._caught_up or self._opened is None) and self._looking is None:
            self._looking = self._look_steps()
        if self._looking is not None:
            looking, self._looking = self._looking, None
            if goes_on(looking):
                self._looking = looking
                self._caught_up = False
                self._found = self._bookmark()
                return None
        self._found, fault = self._next_batch()
        return fault

    def _look_steps(self) -> Steps[None]:
        """Looks at the log again."""
        if self._opened is not None:
            view = yield from self._log.look_steps()
            if view.identity == self._view.identity:
                self._view = view
                return
            self._opened.close()
            self._opened = None
        # Another file, a rewritten one, or let go of: go on only if it holds what was already sent.
        self._opened, self._view = yield from self._log.after_token_steps(self._token)

    def _next_batch(self) -> tuple[EventBatch, EventMalformed | None]:
        """What can be sent now, and the malformed record that ends the stream after it."""
        emitted_at = clock.now()
        gathered = gather(
            self._reader,
            self._view.end,
            self._builder(emitted_at),
            most=self._query.max_events - self._sent if self._query.max_events else None,
            raw=self._raw,
            skip_malformed=self._query.skip_malformed,
        )
        self._last_line = gathered.last_line or self._last_line
        self._stand()
        self._caught_up = self._reader.at_end(self._view.end)
        batch = self._batch(emitted_at, gathered)
        self._sent += batch.event_count
        return batch, gathered.fault

    def _sent_enough(self) -> bool:
        return 0 < self._query.max_events <= self._sent

    def _stand(self) -> None:
        """Notes where the reader has got to."""
        self._position, self._token = self._reader.position, str(self._reader.token())

    def _builder(self, emitted_at: str) -> EventBuilder:
        return EventBuilder(
            source={"repoPath": self._repo, "loopId": self._query.loop_id},
            trace_id=self._query.trace_id,
            emitted_at=emitted_at,
            line_count=self._view.lines,
        )

    def _bookmark(self) -> EventBatch:
        """Where the stream stands, without events."""
        return self._batch(clock.now(), Gathered())

    def _batch(self, emitted_at: str, gathered: Gathered) -> EventBatch:
        return EventBatch(
            events=gathered.events,
            cursor={"eventLineOffset": self._last_line, "eventLineCount": self._view.lines},
            resume_token=self._token,
            caught_up=self._caught_up,
            skipped=gathered.skipped,
            emitted_at=emitted_at,
            raw_events=gathered.raw_events,
        )
