"""Reads one log from a place on, record by record, and says where it stands."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Self

from sprite_agent.event_log.pieces import Pace
from sprite_agent.event_log.record_reader import ANY, RUN_BYTES, RecordReader
from sprite_agent.event_log.records import Position, Run, judged
from sprite_agent.event_log.rereading import CHUNK
from sprite_agent.event_log.resume import Trail

if TYPE_CHECKING:
    from collections.abc import Iterator
    from hashlib import _Hash as Hash
    from types import TracebackType

    from sprite_agent.event_log.pieces import Steps
    from sprite_agent.event_log.records import Record
    from sprite_agent.event_log.resume import ResumeToken

_RECORDS_AT_ONCE = 1000


class LogReader:
    """Reads one log from a place on. Owns its descriptor: close it, or use it in a `with`.

    Holds at most what one chunk and one unfinished record take, whatever the log's size.
    """

    def __init__(self, log: int, start: Position, digest: Hash) -> None:
        """Starts at a boundary, with the running digest of all before it."""
        self._log = log
        self._records = RecordReader(start)
        self._trail = Trail(log, start, digest)
        self._coming: Iterator[Run | Record | None] | None = None
        self._held: deque[Record] = deque()
        self._at: tuple[int, int] = start
        self._before: tuple[int, int] = start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._log)

    @property
    def position(self) -> Position:
        """After the last record taken, and the blank lines after it, as far as was read."""
        return Position(*self._at)

    def at_end(self, end: int) -> bool:
        """Whether everything up to byte `end` was read and taken."""
        return not self._held and self._coming is None and self._trail.end >= end

    def read(self, end: int) -> list[Record]:
        """The next records, judged, as many as a short time allows; see `take`."""
        pace = Pace()
        found: list[Record] = []
        while len(found) < _RECORDS_AT_ONCE and (next_one := self.take(end, pace)) is not None:
            found.extend(map(judged, next_one.records()))
        return found

    def take(self, end: int, pace: Pace, most: tuple[int, int] = ANY) -> Run | Record | None:
        """What comes next, maybe not yet judged; nothing past byte `end` is read. None: `at_end`, or the pace is over.

        A run has at most so many records and bytes.

        Raises:
            LogReplaced, LogTruncated, HistoryRewritten: the log was changed where this reader has already been.
        """
        if self._held:
            record = self._held.popleft()
            self._before, self._at = self._at, (record.last_line, record.end)
            return record
        self._records.most = most
        while True:
            for found in self._coming or ():
                if found is not None:
                    self._before, self._at = self._at, (found.last_line, found.end)
                    return found
                if pace.over():
                    return None
            self._coming = None
            self._at = self._records.boundary
            if self._trail.end >= end or pace.over():
                return None
            self._read_chunk(end)

    def judge(self, *, values: bool) -> None:
        """Has records be judged as they come, where that costs little more than reading them; `values`: and made."""
        self._records.judge(wanted=True, values=values)

    def put_back(self, taken: Run | Record) -> None:
        """Has what was just taken be the next again; the records of a run come one by one then."""
        self._held.extendleft(reversed(taken.records()))
        self._at = self._before

    def pass_steps(self, line: int, end: int) -> Steps[None]:
        """Passes the records up to line `line`."""
        while self.position.line < line and not self.at_end(end):
            pace = Pace()
            while (passed := self.take(end, pace, (line - self.position.line, RUN_BYTES))) is not None:
                if passed.last_line > line:
                    self.put_back(passed)
                    if isinstance(passed, Run):
                        continue
                    return
                if passed.last_line == line or pace.over():
                    break
            if pace.over():
                yield

    def token(self) -> ResumeToken:
        """The resume token for the position."""
        return self._trail.token(self.position)

    def _read_chunk(self, end: int) -> None:
        start = self._trail.end
        data = os.pread(self._log, min(CHUNK, end - start), start)
        # Compared after the read: what was read may be another log's by now.
        if not data or not self._trail.is_whole(self._log):
            raise self._trail.why_not_whole(self._log, end, self.position)
        self._trail.extend(data, boundary=self._records.boundary.offset, earliest=self._records.earliest)
        self._coming = self._records.feed(data)
