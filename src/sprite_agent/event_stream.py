"""One subscription to a loop's events. Keeps the promises of StreamEvents, whichever transport carries it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from sprite_agent.contract import clock
from sprite_agent.contract.streaming import EventBatch, SkippedRecord
from sprite_agent.errors import ContractError, EventMalformed
from sprite_agent.events import EventContext, build_event
from sprite_agent.records import Position

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from sprite_agent.contract.envelopes import EventEnvelope
    from sprite_agent.contract.streaming import EventQuery
    from sprite_agent.event_log import EventLog, LogReader, LogView
    from sprite_agent.folder_watch import Changes, FolderWatch
    from sprite_agent.records import Record

MAX_BATCH_EVENTS = 200
MAX_BATCH_BYTES = 128 * 1024
"""Of raw lines; one longer record makes a batch of its own."""
QUIET_PAUSE = 0.002
"""Seconds between two batches of a busy stream: at once when quiet, never one message per append."""


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
    log: EventLog, query: EventQuery, *, repo: Path, folders: FolderWatch, end: StreamEnd
) -> AsyncGenerator[EventBatch]:
    """The batches of one subscription: the first at once, with or without events.

    A stream that `end` ends gives out a last batch, which says where to resume.

    Raises:
        EventMalformed: after everything before the malformed record was given out.
        CursorBeyondEnd, LogReplaced, LogTruncated: the position is not, or no longer, one of this log.
        CursorInvalid, ResumeTokenInvalid, RequestInvalid, LoopNotFound, EventsNotFound, ArtifactNotRegular
    """
    with folders.follow(repo / log.path.parent) as changes:
        stream = _Stream(log, query, str(repo), end)
        try:
            await stream.open()
            async with contextlib.aclosing(stream.batches(changes)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            stream.close()


class _Stream:
    """Where one subscription stands. Lives as long as the subscription."""

    _view: LogView
    _reader: LogReader | None = None

    def __init__(self, log: EventLog, query: EventQuery, repo: str, end: StreamEnd) -> None:
        self._log = log
        self._query = query
        self._repo = repo
        self._end = end
        self._ends_at = time.monotonic() + end.age_limit()
        self._pending: deque[Record] = deque()
        self._last_line = query.after_line
        self._sent = 0

    async def open(self) -> None:
        """Finds the place to start from."""
        # In a thread: the first look at a log reads all of it.
        self._view = await asyncio.to_thread(self._log.refresh)
        if self._query.resume_token is not None:
            self._reader = await asyncio.to_thread(self._log.reader_after_token, self._query.resume_token)
            self._last_line = self._reader.boundary.line
        else:
            self._reader = await asyncio.to_thread(self._log.reader_after_line, self._query.after_line)
        self._position = self._reader.boundary

    def close(self) -> None:
        """Closes the descriptor."""
        if self._reader is not None:
            self._reader.close()

    async def batches(self, changes: Changes) -> AsyncGenerator[EventBatch]:
        """Batches until the query is satisfied."""
        heard_at = time.monotonic()
        first = True
        while True:
            batch, fault = self._next_batch()
            quiet = time.monotonic() - heard_at
            if first or batch.events or batch.skipped or quiet >= self._query.heartbeat_interval:
                yield batch
                first, heard_at = False, time.monotonic()
            if fault is not None:
                raise fault
            if self._sent_enough() or (batch.caught_up and not self._query.follow):
                return
            if batch.caught_up:
                await asyncio.sleep(QUIET_PAUSE if batch.events else 0)
                while not self._is_over() and not await self._grown():
                    silence = self._query.heartbeat_interval - (time.monotonic() - heard_at)
                    if silence <= 0:
                        yield self._batch([], [])
                        heard_at = time.monotonic()
                    else:
                        await changes.wait(min(silence, max(0.0, self._ends_at - time.monotonic())))
            else:
                await asyncio.sleep(0)  # a long replay shares its event loop
            if self._is_over():
                yield self._batch([], [])
                return

    def _is_over(self) -> bool:
        return self._end.requested or time.monotonic() >= self._ends_at

    async def _grown(self) -> bool:
        """Looks at the log again; whether there is more to read."""
        view = await asyncio.to_thread(self._log.refresh)
        assert self._reader is not None  # noqa: S101  # open() came first
        if view.identity != self._view.identity:
            # Another file, or a rewritten one: go on only if it holds what was already sent.
            token = str(self._reader.token(self._position))
            reader = await asyncio.to_thread(self._log.reader_after_token, token)
            self._reader.close()
            self._reader = reader
        self._view = view
        return not self._reader.at_end(view.end)

    def _next_batch(self) -> tuple[EventBatch, EventMalformed | None]:
        """What can be sent now, and the malformed record that ends the stream after it."""
        context = EventContext(
            source={"repoPath": self._repo, "loopId": self._query.loop_id},
            trace_id=self._query.trace_id,
            emitted_at=clock.now(),
            line_count=self._view.lines,
        )
        events: list[EventEnvelope] = []
        skipped: list[SkippedRecord] = []
        size = 0
        while (record := self._next_record()) is not None:
            size += len(record.text)
            if size > MAX_BATCH_BYTES and (events or skipped):
                self._pending.appendleft(record)
                break
            try:
                events.append(build_event(record, context))
            except ContractError as error:
                if not self._query.skip_malformed:
                    return replace(self._batch(events, skipped), caught_up=False), _malformed(record, error)
                skipped.append(_skipped(record, error))
            else:
                self._last_line = record.last_line
                self._sent += 1
            self._position = Position(record.last_line, record.end)
            if len(events) + len(skipped) == MAX_BATCH_EVENTS or self._sent_enough():
                break
        return self._batch(events, skipped), None

    def _next_record(self) -> Record | None:
        assert self._reader is not None  # noqa: S101  # open() came first
        if not self._pending and not self._reader.at_end(self._view.end):
            self._pending.extend(self._reader.read(self._view.end))
        if not self._pending:
            self._position = self._reader.boundary
            return None  # the end, or a chunk without a record: others get their turn before the next
        return self._pending.popleft()

    def _sent_enough(self) -> bool:
        return 0 < self._query.max_events <= self._sent

    def _batch(self, events: list[EventEnvelope], skipped: list[SkippedRecord]) -> EventBatch:
        assert self._reader is not None  # noqa: S101  # open() came first
        return EventBatch(
            events=events,
            cursor={"eventLineOffset": self._last_line, "eventLineCount": self._view.lines},
            resume_token=str(self._reader.token(self._position)),
            caught_up=not self._pending and self._reader.at_end(self._view.end),
            skipped=skipped,
            emitted_at=clock.now(),
        )


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
