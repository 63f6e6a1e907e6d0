"""One subscription to a loop's events. Keeps the promises of StreamEvents, whichever transport carries it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from sprite_agent.contract import clock
from sprite_agent.contract.events import EventContext, build_event, check_event
from sprite_agent.contract.streaming import EventBatch, SkippedRecord
from sprite_agent.errors import ContractError, EventMalformed, EventsNotFound, LogTruncated, LoopNotFound
from sprite_agent.event_log.pieces import Pace, goes_on
from sprite_agent.event_log.records import judged
from sprite_agent.event_log.resume import START_TOKEN, parse_token

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from sprite_agent.contract.envelopes import EventEnvelope, Json
    from sprite_agent.contract.streaming import EventQuery, RawEvent
    from sprite_agent.event_log.folder_watch import Changes, FolderWatch
    from sprite_agent.event_log.index import LogView
    from sprite_agent.event_log.log import EventLog, LogReader
    from sprite_agent.event_log.pieces import Steps
    from sprite_agent.event_log.records import Record

_T = TypeVar("_T")

MAX_BATCH_EVENTS = 200
MAX_BATCH_BYTES = 128 * 1024
"""Of raw lines; one longer record makes a batch of its own."""
QUIET_PAUSE = 0.002
"""Seconds between two looks of a busy stream: at once when quiet, never one message per append."""
_UNSURE_PAUSE = 0.1
"""Seconds between looks at a log that was not yet read again since it last changed."""
_LOSSES, _LOSS_PAUSE = 10, 0.025
"""How often a follower looks for a log that is gone or too short before it says so, and seconds in between."""
_THREADS = 1
"""They share one interpreter: a second one reads little more, and keeps everybody else waiting for it longer."""


class Workers:
    """What the streams of one repo read in: beside the event loop, and piece by piece, so that none waits for long."""

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


class StreamEnd:
    """When streams end although they could go on: at an age of their own, and all at once when asked to."""

    def __init__(self, max_age: float = math.inf) -> None:
        """`max_age` is in seconds; each stream takes a random part off, so that they do not end together."""
        self._max_age = max_age
        self.requested = False

    def age_limit(self) -> float:
        """The age, in seconds, at which a stream that starts now ends."""
        return self._max_age * random.uniform(0.9, 1.0)  # noqa: S311  # spreads load, guards nothing


async def stream_events(
    log: EventLog, query: EventQuery, *, raw: bool, repo: Path, workers: Workers, folders: FolderWatch, end: StreamEnd
) -> AsyncGenerator[EventBatch]:
    """The batches of one subscription, of raw events where `raw`: the first at once, with or without events.

    A stream that `end` ends gives out a last batch, which says where to resume. Nothing of a batch is
    kept while its reader has it: parsed, it can be many times as large as its text.

    Raises:
        EventMalformed: after everything before the malformed record was given out.
        CursorBeyondEnd, LogReplaced, LogTruncated, HistoryRewritten: the position is not, or no longer, one of
            this log.
        CursorInvalid, ResumeTokenInvalid, RequestInvalid, LoopNotFound, EventsNotFound, ArtifactNotRegular
    """
    with folders.follow(log.open_folder) as changes:
        stream = _Stream(log, query, str(repo), end, raw=raw)
        try:
            async with contextlib.aclosing(stream.batches(workers, changes)) as batches:
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        yield await anext(batches)
        finally:
            stream.close()


class _Stream:
    """Where one subscription stands. Lives as long as the subscription.

    What reads runs in threads, a piece at a time, and nothing else touches the stream meanwhile.
    """

    _view: LogView
    _opened: LogReader | None = None
    _looking: Steps[None] | None = None
    """A look at the log that is under way."""
    _found: EventBatch | None = None
    """What the last turn has made, until it is given out."""
    _caught_up = False

    def __init__(self, log: EventLog, query: EventQuery, repo: str, end: StreamEnd, *, raw: bool) -> None:
        self._log = log
        self._query = query
        self._raw = raw
        self._repo = repo
        self._end = end
        self._ends_at = time.monotonic() + end.age_limit()
        self._last_line = query.after_line
        self._sent = 0
        self._has_moved = False

    def close(self) -> None:
        """Closes the descriptor."""
        if self._looking is not None:
            self._looking.close()
        if self._opened is not None:
            self._opened.close()

    async def batches(self, workers: Workers, changes: Changes) -> AsyncGenerator[EventBatch]:
        """Batches until the query is satisfied."""
        async with contextlib.aclosing(self._open(workers)) as beats:
            async for beat in beats:
                yield beat
        heard_at, first, losses = time.monotonic(), True, 0
        while self._opened is not None:
            try:
                fault = await workers.run(self._turn)
            except (EventsNotFound, LoopNotFound, LogTruncated):
                # Whoever removes a log or cuts it off may be about to write it anew: what is there then decides.
                losses += 1
                if first or not self._query.follow or losses > _LOSSES or self._is_over():
                    raise
                await asyncio.sleep(_LOSS_PAUSE)
                continue
            losses = 0
            silence = self._query.heartbeat_interval - (time.monotonic() - heard_at)
            if first or self._says_something() or silence <= 0:
                yield self._given()
                first, heard_at, silence = False, time.monotonic(), self._query.heartbeat_interval
            if fault is not None:
                raise fault
            if self._sent_enough() or (self._caught_up and not self._query.follow):
                return
            if self._is_over():
                yield self._bookmark()
                return
            if self._caught_up:
                await self._wait(changes, silence)

    async def _open(self, workers: Workers) -> AsyncGenerator[EventBatch]:
        """Finds the place to start from. Beats while a large log is read, if the place can be said before."""
        token, line = self._query.resume_token, self._query.after_line
        start = START_TOKEN if token is None else parse_token(token)
        heard_at = time.monotonic()
        with contextlib.closing(self._open_steps()) as opening:
            while not self._is_over() and await workers.run(lambda: goes_on(opening)):
                if time.monotonic() - heard_at >= self._query.heartbeat_interval and (token or not line):
                    heard_at = time.monotonic()
                    yield EventBatch(
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

    def _open_steps(self) -> Steps[None]:
        token, line = self._query.resume_token, self._query.after_line
        steps = self._log.after_line_steps(line) if token is None else self._log.after_token_steps(token)
        self._opened, self._view = yield from steps
        if token is not None:
            self._last_line = self._reader.position.line

    async def _wait(self, changes: Changes, silence: float) -> None:
        """Returns when it is time to look at the log again, after `silence` seconds at the latest."""
        await asyncio.sleep(QUIET_PAUSE)
        if self._has_moved:
            changes.look_anew()
            self._has_moved = False
        soon = math.inf if self._view.is_sure else _UNSURE_PAUSE
        await changes.wait(min(silence, soon, max(0.0, self._ends_at - time.monotonic())))

    def _is_over(self) -> bool:
        return self._end.requested or time.monotonic() >= self._ends_at

    def _says_something(self) -> bool:
        found = self._found
        return found is not None and bool(found.events or found.raw_events or found.skipped)

    def _given(self) -> EventBatch:
        """What the last turn has made; it is not held here any longer."""
        assert self._found is not None  # noqa: S101  # the caller has looked
        found, self._found = self._found, None
        return found

    @property
    def _reader(self) -> LogReader:
        assert self._opened is not None  # noqa: S101  # _open_steps() came first
        return self._opened

    def _turn(self) -> EventMalformed | None:
        """One piece of work: looks at the log again when all of it was sent, and makes a batch of what is new.

        Gives the malformed record that ends the stream after the batch.
        """
        if self._caught_up and self._looking is None:
            self._looking = self._look_steps()
        if self._looking is not None:
            looking, self._looking = self._looking, None
            if goes_on(looking):
                self._looking = looking
                self._found = replace(self._bookmark(), caught_up=False)
                self._caught_up = False
                return None
        self._found, fault = self._next_batch()
        self._caught_up = self._found.caught_up
        return fault

    def _look_steps(self) -> Steps[None]:
        """Looks at the log again."""
        view = yield from self._log.look_steps()
        if view.identity != self._view.identity:
            # Another file, or a rewritten one: go on only if it holds what was already sent.
            reader, view = yield from self._log.after_token_steps(str(self._reader.token()))
            self._reader.close()
            self._opened, self._has_moved = reader, True
        self._view = view

    def _next_batch(self) -> tuple[EventBatch, EventMalformed | None]:
        """What can be sent now, and the malformed record that ends the stream after it."""
        context = EventContext(
            source={"repoPath": self._repo, "loopId": self._query.loop_id},
            trace_id=self._query.trace_id,
            emitted_at=clock.now(),
            line_count=self._view.lines,
        )
        events: list[EventEnvelope] = []
        raw_events: list[RawEvent] = []
        skipped: list[SkippedRecord] = []
        fault: EventMalformed | None = None
        reader, end, pace = self._reader, self._view.end, Pace()
        before, size = self._sent, 0
        most = min(MAX_BATCH_EVENTS, self._query.max_events - before if self._query.max_events else MAX_BATCH_EVENTS)
        while self._sent - before < most and (record := reader.take(end, pace)) is not None:
            size += len(record.text)
            if size > MAX_BATCH_BYTES and (self._sent > before or skipped):
                reader.put_back(record)
                break
            line = record.last_line
            try:
                value = _value_of(record)
                if self._raw:
                    check_event(value, line, context)
                    raw_events.append((line, record.text.decode()))
                else:
                    events.append(build_event(value, record.text.decode(), line, context))
            except ContractError as error:
                if not self._query.skip_malformed:
                    reader.put_back(record)
                    fault = _malformed(record, error)
                    break
                skipped.append(_skipped(record, error))
                most -= 1
            else:
                self._last_line = line
                self._sent += 1
        found = replace(
            self._bookmark(), events=events, raw_events=raw_events, skipped=skipped, emitted_at=context.emitted_at
        )
        return found, fault

    def _sent_enough(self) -> bool:
        return 0 < self._query.max_events <= self._sent

    def _bookmark(self) -> EventBatch:
        """Where the stream stands, without events."""
        return EventBatch(
            events=[],
            cursor={"eventLineOffset": self._last_line, "eventLineCount": self._view.lines},
            resume_token=str(self._reader.token()),
            caught_up=self._reader.at_end(self._view.end),
            skipped=[],
            emitted_at=clock.now(),
        )


def _value_of(record: Record) -> Json:
    if record.value is None:
        record = judged(record)
    if record.value is None:
        raise ContractError(record.fault or "malformed")
    return record.value


def _malformed(record: Record, error: ContractError) -> EventMalformed:
    where = f"line {record.first_line}"
    if record.last_line > record.first_line:
        where = f"lines {record.first_line} to {record.last_line}"
    return EventMalformed(
        f"{where} of the event log is malformed: {error}",
        details={"line": record.first_line, "lastLine": record.last_line},
    )


def _skipped(record: Record, error: ContractError) -> SkippedRecord:
    return SkippedRecord(
        first_line=record.first_line,
        last_line=record.last_line,
        reason=error.message,
        excerpt=record.excerpt,
        size_bytes=record.size_bytes,
        sha256=record.sha256,
    )
