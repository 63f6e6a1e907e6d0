"""One loop's event log: its index, kept up to date by reading only what is new, and its readers.

The index knows the end of the log, its running digest, its last record and where lines
begin. Any number of readers share it, each with a descriptor and a pace of its own, so
that none waits for another.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sprite_agent.artifacts import loop_paths
from sprite_agent.errors import CursorBeyondEnd, EventsNotFound, LogReplaced, ResumeTokenInvalid
from sprite_agent.records import START, Position, RecordReader
from sprite_agent.resume import Trail, check_token, parse_token

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    identity: int
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
        self._file: tuple[int, int] | None = None
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
                return self._view(log)
        finally:
            os.close(log)

    def reader_after_line(self, line: int) -> LogReader:
        """A reader of the records after line `line` (of a record over several lines, its last counts).

        Raises:
            CursorBeyondEnd: the log has fewer lines.
            EventsNotFound, LoopNotFound, ArtifactNotRegular
        """
        with self._kept_open() as log:
            with self._lock:
                view = self._view(log)
                place = self._index[bisect.bisect_right(self._index, line, key=lambda entry: entry.line) - 1]
            if line > view.lines:
                raise CursorBeyondEnd(
                    f"cursor {line} is past the {view.lines} lines of the log; reset it or replay from the start",
                    details={"requested": line, "available": view.lines},
                )
            scout = LogReader(log, place)
            while scout.boundary.line < line and not scout.at_end(view.end):
                for record in scout.read(view.end):
                    if record.last_line <= line:
                        place = Position(record.last_line, record.end)
            return LogReader(log, place)

    def reader_after_token(self, text: str) -> LogReader:
        """A reader of the records after the place of a resume token.

        Raises:
            ResumeTokenInvalid: it is no token, or none of this log's.
            LogReplaced, LogTruncated: the log is no longer the one it was taken in.
            EventsNotFound, LoopNotFound, ArtifactNotRegular
        """
        token = parse_token(text)
        with self._kept_open() as log:
            check_token(log, token)
            reader = LogReader(log, token.position)
            with self._lock:
                self._view(log)
                self._check_line(log, token.position)
            if reader.token(token.position) != token:
                raise LogReplaced("the event log was rewritten while it was opened; replay from the start")
            return reader

    @contextlib.contextmanager
    def _kept_open(self) -> Iterator[int]:
        """A descriptor of the log that outlives the block, unless that fails. All of a block sees one file."""
        log = self._open()
        try:
            yield log
        except BaseException:
            os.close(log)
            raise

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
        self._trail = Trail()
        self._end = 0
        self._last_record: Record | None = None
        self._index = [START]

    def _view(self, log: int) -> LogView:
        """Brings the index up to date with the file open as `log`; the lock is held."""
        status = os.fstat(log)
        file = (status.st_dev, status.st_ino)
        if file != self._file or not self._trail.is_whole(log):
            self._forget()
            self._file = file
            self._epoch += 1
        while data := os.pread(log, _CHUNK, self._trail.end):
            self._trail.extend(data, boundary=self._reader.boundary.offset, earliest=self._reader.earliest)
            records = self._reader.feed(data)
            if records:
                self._last_record = records[-1]
            self._digest.update(data)
            if (newline := data.rfind(b"\n")) >= 0:
                self._end = self._trail.end - len(data) + newline + 1
            if self._reader.boundary.offset - self._index[-1].offset >= _CHUNK:
                self._index.append(self._reader.boundary)
        ref: ArtifactRef = {
            "path": str(self.path),
            "exists": True,
            "sizeBytes": self._trail.end,
            "lineCount": self._reader.lines,
            "sha256": self._digest.hexdigest(),
            "mtimeEpoch": int(os.fstat(log).st_mtime),
        }
        return LogView(
            lines=self._reader.lines,
            end=self._end,
            last_record=self._last_record,
            token=self._trail.token(self._reader.boundary),
            ref=ref,
            identity=self._epoch,
        )

    def _check_line(self, log: int, position: Position) -> None:
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
        self._trail = Trail(log, start)

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
        return self._trail.end >= end

    def read(self, end: int) -> list[Record]:
        """The records completed by the next chunk, of which nothing past byte `end` is read.

        Raises:
            LogReplaced: the log was changed where this reader has already been.
        """
        start = self._trail.end
        data = os.pread(self._log, min(_CHUNK, end - start), start)
        # The identity is checked after the read: what was read may be another log's by now.
        if not data or not self._trail.is_whole(self._log):
            raise LogReplaced(
                f"the event log was rewritten while it was read, before byte {end}; replay from the start",
                details={"line": self.boundary.line, "offset": start},
            )
        self._trail.extend(data, boundary=self.boundary.offset, earliest=self._records.earliest)
        return self._records.feed(data)

    def token(self, position: Position) -> ResumeToken:
        """The resume token for a place this reader has passed since its last read."""
        return self._trail.token(position)
