"""One loop's event log: its index, kept up to date by reading only what is new, and its readers.

The index knows the end of the log, its running digest, its last record and where lines
begin. Any number of readers share it, each with a descriptor and a pace of its own, so
that none waits for another.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sprite_agent.artifacts import loop_paths, missing_ref
from sprite_agent.errors import CursorBeyondEnd, CursorInvalid, EventsNotFound, LogReplaced, ResumeTokenInvalid
from sprite_agent.records import Position, RecordReader
from sprite_agent.resume import WINDOW_BYTES, check_token, parse_token, token_at, window_before

if TYPE_CHECKING:
    from types import TracebackType

    from sprite_agent.artifacts import ArtifactFiles
    from sprite_agent.contract.envelopes import ArtifactRef
    from sprite_agent.records import Record
    from sprite_agent.resume import ResumeToken

_CHUNK = 256 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class LogView:
    """What a log was like at one moment."""

    lines: int
    """Complete lines."""
    end: int
    """Bytes up to the last newline: a torn last line is not counted."""
    last_record: Record | None
    """The last finished record; None: there is none."""
    token: ResumeToken
    """After everything that is finished; before a record whose last lines are not there yet."""
    ref: ArtifactRef
    """The file as a whole, a torn last line included."""
    identity: tuple[int, int, int]
    """Changes when the file at the path is another one, or no continuation of what was read before."""


class EventLog:
    """The log of one loop. Lives as long as its reader's process; any thread may call."""

    def __init__(self, files: ArtifactFiles, loop_id: str) -> None:
        self._files = files
        self._loop_id = loop_id
        self.path = loop_paths(loop_id).events
        # Guards the index, which refresh() moves on; never held while anyone waits for a peer.
        self._lock = threading.Lock()
        self._epoch = 0
        self._forget()

    def refresh(self) -> LogView:
        """Reads what is new and says what the log is like now.

        Raises:
            EventsNotFound: there is no log.
            LoopNotFound, ArtifactNotRegular
        """
        log = self._open()
        try:
            with self._lock:
                self._read_on(log)
                status = os.fstat(log)
                ref: ArtifactRef = {
                    **missing_ref(self.path),
                    "exists": True,
                    "sizeBytes": self._size,
                    "lineCount": self._reader.lines,
                    "sha256": self._digest.hexdigest(),
                    "mtimeEpoch": int(status.st_mtime),
                }
                return LogView(
                    lines=self._reader.lines,
                    end=self._end,
                    last_record=self._last_record,
                    token=token_at(log, self._reader.boundary),
                    ref=ref,
                    identity=(status.st_dev, status.st_ino, self._epoch),
                )
        finally:
            os.close(log)

    def reader_after_line(self, line: int) -> LogReader:
        """A reader of the records after line `line` (of a record over several lines, its last counts).

        Raises:
            CursorInvalid: the line is negative.
            CursorBeyondEnd: the log has fewer lines.
            EventsNotFound, LoopNotFound, ArtifactNotRegular
        """
        if line < 0:
            raise CursorInvalid(
                f"cursor {line} is negative; 0 starts from the first line", violations=[("event_line_offset", "< 0")]
            )
        view = self.refresh()
        if line > view.lines:
            raise CursorBeyondEnd(
                f"cursor {line} is past the {view.lines} lines of the log; reset it or replay from the start",
                details={"requested": line, "available": view.lines},
            )
        with self._lock:
            place = self._index[bisect.bisect_right(self._index, line, key=lambda entry: entry.line) - 1]
        with LogReader(self._open(), place) as scout:
            while scout.boundary.line < line and not scout.at_end(view.end):
                for record in scout.read(view.end):
                    if record.last_line <= line:
                        place = Position(record.last_line, record.end)
        return LogReader(self._open(), place)

    def reader_after_token(self, text: str) -> LogReader:
        """A reader of the records after the place of a resume token.

        Raises:
            ResumeTokenInvalid: it is no token, or none of this log's.
            LogReplaced, LogTruncated: the log is no longer the one it was taken in.
            EventsNotFound, LoopNotFound, ArtifactNotRegular
        """
        token = parse_token(text)
        log = self._open()
        try:
            check_token(log, token)
            self.refresh()
            self._check_line(log, token.position)
        except BaseException:
            os.close(log)
            raise
        return LogReader(log, token.position)

    def _open(self) -> int:
        log = self._files.open(self.path)
        if log is None:
            self._files.require_loop(self._loop_id)
            raise EventsNotFound(
                f"required artifact missing: {self._files.repo / self.path}", details={"loopId": self._loop_id}
            )
        return log

    def _forget(self) -> None:
        self._reader = RecordReader()
        self._digest = hashlib.sha256()
        self._size = 0
        self._end = 0
        self._window = b""
        self._last_record: Record | None = None
        self._index = [Position(0, 0)]

    def _read_on(self, log: int) -> None:
        if os.fstat(log).st_size < self._size or window_before(log, self._size) != self._window:
            self._forget()
            self._epoch += 1
        while data := os.pread(log, _CHUNK, self._size):
            records = self._reader.feed(data)
            if records:
                self._last_record = records[-1]
            self._digest.update(data)
            if (newline := data.rfind(b"\n")) >= 0:
                self._end = self._size + newline + 1
            self._size += len(data)
            if self._reader.boundary.offset - self._index[-1].offset >= _CHUNK:
                self._index.append(self._reader.boundary)
            self._window = (self._window + data)[-WINDOW_BYTES:]

    def _check_line(self, log: int, position: Position) -> None:
        with self._lock:
            near = self._index[bisect.bisect_right(self._index, position.offset, key=lambda entry: entry.offset) - 1]
        between = os.pread(log, position.offset - near.offset, near.offset)
        if (between and not between.endswith(b"\n")) or near.line + between.count(b"\n") != position.line:
            raise ResumeTokenInvalid(
                f"the resume token takes byte {position.offset} for the end of line {position.line}, which it is not",
                violations=[("resume_token", "does not fit the lines of the log")],
            )


class LogReader:
    """Reads one log from a place on. Owns its descriptor: close it, or use it in a `with`.

    Holds at most what one chunk and one unfinished record take, whatever the log's size.
    """

    def __init__(self, log: int, start: Position) -> None:
        self._log = log
        self._records = RecordReader(start)
        self._offset = start.offset
        self._window = window_before(log, start.offset)

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
    def boundary(self) -> Position:
        """After the last record given out or blank line passed."""
        return self._records.boundary

    def at_end(self, end: int) -> bool:
        """Whether everything up to byte `end` was read."""
        return self._offset >= end

    def read(self, end: int) -> list[Record]:
        """The records completed by the next chunk, of which nothing past byte `end` is read.

        Raises:
            LogReplaced: the log was changed where this reader has already been.
        """
        data = os.pread(self._log, min(_CHUNK, end - self._offset), self._offset)
        # The identity is checked after the read: what was read may be another log's by now.
        if not data or window_before(self._log, self._offset) != self._window:
            raise LogReplaced(
                f"the event log was rewritten while it was read, before byte {end}; replay from the start",
                details={"line": self.boundary.line, "offset": self._offset},
            )
        self._offset += len(data)
        self._window = (self._window + data)[-WINDOW_BYTES:]
        return self._records.feed(data)

    def token(self, position: Position) -> ResumeToken:
        """The resume token for a place this reader has reached."""
        return token_at(self._log, position)
