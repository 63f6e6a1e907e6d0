"""One loop's event log: its index, kept up to date by reading only what is new, and its readers.

The index knows the end of the log, its running digest, its last record and where lines
begin. Any number of readers share it, each with a descriptor and a pace of its own, so
that none waits for another.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sprite_agent.artifacts import loop_paths
from sprite_agent.errors import EventsNotFound, Starting
from sprite_agent.event_log.index import Aim, LogIndex
from sprite_agent.event_log.pieces import finished
from sprite_agent.event_log.reader import LogReader
from sprite_agent.event_log.rereading import Stamp
from sprite_agent.event_log.resume import parse_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from hashlib import _Hash as Hash

    from sprite_agent.artifacts import ArtifactFiles
    from sprite_agent.contract.events import EventBuilder
    from sprite_agent.event_log.index import LogView
    from sprite_agent.event_log.newest import Portion
    from sprite_agent.event_log.pieces import Steps
    from sprite_agent.event_log.records import Position

_T = TypeVar("_T")

_LITTLE = 64 * 1024
"""Bytes: reading and judging them takes a millisecond or two, whatever they hold."""
_NEWEST_BYTES = 125 * 1024
"""Looked at in one go for who keeps up: what one batch carries, and nothing over that would take another."""
_BEHIND_BYTES = 1024 * 1024
"""So much may have come, for a look to be made at once: it was just written, and no disk has to be waited for."""
_BESIDE = 0.001
"""Seconds of reading again beside those looks: what comes meanwhile waits for it."""
_MAX_WAITING = 8
"""Calls that wait for a log which is still being read; each holds a thread."""


def _never() -> bool:
    return False


class Opened(NamedTuple):
    """A reader, and what the log was like when it was made."""

    reader: LogReader
    view: LogView


class Arrived(NamedTuple):
    """What has come into a log."""

    view: LogView
    """What the log was like up to there."""
    portions: list[Portion]
    is_all: bool
    """Whether there was no more."""


class LogStamp(NamedTuple):
    """By what a file that has changed can be told, most likely."""

    file: tuple[int, int]
    """Device and inode."""
    content: Stamp

    @classmethod
    def of(cls, status: os.stat_result) -> LogStamp:
        """The stamp in a status."""
        return cls((status.st_dev, status.st_ino), Stamp.of(status))


class EventLog:
    """The log of one loop. Lives as long as its reader's process; any thread may call.

    What may take long is there twice: to be called, and (`..._steps`) to be done in pieces.
    """

    def __init__(
        self,
        files: ArtifactFiles,
        loop_id: str,
        *,
        patience: float = math.inf,
        is_over: Callable[[], bool] = _never,
    ) -> None:
        """Reads nothing yet.

        Args:
            files: where the log is.
            loop_id: the loop.
            patience: seconds after which a call gives up while the log is still being read.
            is_over: whether it is to at once: one that nobody waits for would keep its thread, and so the process, as
                long as sandbox code likes.
        """
        self._files = files
        self.loop_id = loop_id
        self._patience = patience
        self._is_over = is_over
        paths = loop_paths(loop_id)
        self.path = paths.events
        self._folder = paths.root
        self._place = f"{files.repo}/{self.path}"
        # Guards the index; held for one piece of work, and never while anyone waits for a peer.
        self._lock = threading.Lock()
        self._index = LogIndex(self.path)
        self._kept: tuple[int, tuple[int, int]] | None = None
        """The log, open as long as somebody keeps up with it; and which file that is."""
        self._waiting = 0
        """Calls that wait for it, as it is still being read."""

    @property
    def lines_read(self) -> int:
        """Complete lines that were read so far."""
        return self._index.lines

    def refresh(self) -> LogView:
        """Reads what is new and says what the log is like now.

        Raises:
            EventsNotFound: there is no log.
            LoopNotFound, ArtifactNotRegular
            Starting: it takes longer than the log's patience, or others wait for it already.
        """
        return self._called(self.look_steps())

    def reread(self) -> None:
        """Reads a short piece of the log again, in the background of looks that leave it out (`newest_steps`).

        Raises:
            EventsNotFound, LoopNotFound, ArtifactNotRegular
        """
        with self._opened() as log, self._lock:
            self._index.advance(log, Aim(), background=_BESIDE)

    def is_quick(self, stamp: LogStamp | None) -> bool:
        """Whether a look at a log with this stamp (see `newest_steps`) takes no longer than the way to another thread.

        But nobody else may be at work on it, and none waits here.
        """
        # What was read of a record that is not finished has yet to be judged, as a whole.
        end, finished = self._index.end, self._index.finished
        return (
            stamp is not None
            and end <= stamp.content.size <= end + _BEHIND_BYTES
            and end <= finished + _NEWEST_BYTES
            and not self._lock.locked()
        )

    def stamp(self) -> LogStamp | None:
        """What the file at the log's path looks like, in a few microseconds: a hint whether to look at it, no more."""
        try:
            return LogStamp.of(os.lstat(self._place))
        except OSError:
            return None

    def known(self) -> LogView | None:
        """What the log is like, if that takes no look: it is, for certain, what was read before. None: look.

        Raises:
            ArtifactNotRegular
        """
        if self._lock.locked() or not self._index.is_sure or (status := self._files.status(self.path)) is None:
            return None
        stamp = LogStamp.of(status)
        with self._lock:
            return self._index.view() if self._index.is_sure_of(stamp.file, stamp.content) else None

    def is_small(self) -> bool:
        """Whether all of it can be read in no time; see `is_quick`."""
        stamp = self.stamp()
        return stamp is not None and stamp.content.size <= _LITTLE and self.is_quick(stamp)

    def reader_after_line(self, line: int) -> LogReader:
        """A reader of the records after line `line` (of a record over several lines, its last counts).

        Raises:
            CursorBeyondEnd: the log has fewer lines.
            EventsNotFound, LoopNotFound, ArtifactNotRegular, Starting
        """
        return self._called(self.after_line_steps(line)).reader

    def reader_after_token(self, text: str) -> LogReader:
        """A reader of the records after the place of a resume token.

        Raises:
            ResumeTokenInvalid: it is no token, or none of this log's.
            LogReplaced, LogTruncated, HistoryRewritten: the log is no longer the one it was taken in.
            EventsNotFound, LoopNotFound, ArtifactNotRegular, Starting
        """
        return self._called(self.after_token_steps(text)).reader

    def look_steps(self) -> Steps[LogView]:
        """See `refresh`."""
        aim = Aim()
        while True:
            with self._opened() as log, self._lock:
                if self._index.advance(log, aim):
                    return self._index.view()
            yield

    def newest_steps(self, stamp: LogStamp | None = None, is_over: Callable[[], bool] = _never) -> Steps[Arrived]:
        """What has come since the last call, not too much at once, for who keeps up with it (see `keep_newest`).

        `stamp`: the log's, where the caller has just asked for it. `is_over`: whether somebody else may keep up with it
        by now, to whom what has come belongs.
        """
        aim = Aim(_NEWEST_BYTES)
        while True:
            with self._lock:
                if is_over():
                    raise RuntimeError("the log is kept up with no longer")
                log = self._found_again(stamp or self.stamp())
                if self._index.advance(log, aim, soon=True):
                    return Arrived(self._index.view(), self._index.take_newest(), aim.is_all)
            stamp = None
            yield

    def keep_newest(self, builder: EventBuilder | None, is_over: Callable[[], bool] = _never) -> None:
        """Begins to keep what comes into the log, for one who asks for it by `newest_steps`; None: ends to.

        The builder says of each record whether it is malformed. `is_over`: as for that.
        """
        with self._lock:
            if not is_over():
                self._index.keep_newest(builder)
                self._let_go()

    def is_at(self, view: LogView, stamp: LogStamp) -> bool:
        """Whether a log with this stamp holds just what was read, and that is what `view` saw."""
        with self._lock:
            return self._index.is_at(view, stamp.file, stamp.content)

    def after_line_steps(self, line: int) -> Steps[Opened]:
        """See `reader_after_line`."""
        opened = yield from self._open_steps(lambda log: self._index.place_before(log, line))
        try:
            yield from opened.reader.pass_steps(line, opened.view.end)
        except BaseException:
            opened.reader.close()
            raise
        return opened

    def after_token_steps(self, text: str) -> Steps[Opened]:
        """See `reader_after_token`."""
        token = parse_token(text)
        return (yield from self._open_steps(lambda log: (token.position, self._index.place_of(log, token))))

    def open_folder(self) -> int | None:
        """A descriptor of the loop's folder, for the caller to close; None: there is none.

        Raises:
            ArtifactNotRegular
        """
        return self._files.open_folder(self._folder)

    def _open_steps(self, find: Callable[[int], tuple[Position, Hash]]) -> Steps[Opened]:
        """Opens a reader at a place that is looked for once all of the log was read."""
        aim = Aim()
        while True:
            log = self._open()
            try:
                with self._lock:
                    if self._index.advance(log, aim):
                        # Of the very descriptor that the index was brought up to date with: all is of one file.
                        return Opened(LogReader(log, *find(log)), self._index.view())
            except BaseException:  # else the reader has it
                os.close(log)
                raise
            os.close(log)
            yield

    def _called(self, steps: Steps[_T]) -> _T:
        """The result of work, waited for as long as there is patience."""
        until = time.monotonic() + self._patience
        waits = False

        def wait() -> None:
            nonlocal waits
            if self._is_over():
                raise Starting(f"the event log of loop {self.loop_id} is read no further: its repo was closed")
            if self._patience == math.inf:
                return
            if not waits:
                with self._lock:
                    waits = self._waiting < _MAX_WAITING
                    self._waiting += waits
            if not waits or time.monotonic() >= until:
                raise Starting(
                    f"the event log of loop {self.loop_id} is still being read; try again in a second", retry_after=1.0
                )

        try:
            with contextlib.closing(steps):
                return finished(steps, wait)
        finally:
            if waits:
                with self._lock:
                    self._waiting -= 1

    def _found_again(self, stamp: LogStamp | None) -> int:
        """The descriptor that is kept for who keeps up, of what is at the log's path; the caller has the lock.

        Going to a file component by component takes longer than reading a line of it. Where the path still
        leads, by its stamp, to the very file that was opened so, it need not be opened again.
        """
        if self._kept is None or stamp is None or stamp.file != self._kept[1]:
            self._let_go()
            log = self._open()
            status = os.fstat(log)
            self._kept = (log, (status.st_dev, status.st_ino))
        return self._kept[0]

    def _let_go(self) -> None:
        if self._kept is not None:
            os.close(self._kept[0])
            self._kept = None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the log for the block."""
        log = self._open()
        try:
            yield log
        finally:
            os.close(log)

    def _open(self) -> int:
        log = self._files.open(self.path)
        if log is None:
            self._files.require_loop(self.loop_id)
            raise EventsNotFound(f"required artifact missing: {self._place}", details={"loopId": self.loop_id})
        return log
