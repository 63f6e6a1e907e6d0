"""What is known of one loop's log: its end, its digest, its last record, and places to start reading from.

It is kept up to date by reading what is new, in pieces: sandbox code may make a log as
large, and as costly to read, as it likes.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import os
from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.errors import CursorBeyondEnd, ResumeTokenInvalid
from sprite_agent.event_log.newest import Newest
from sprite_agent.event_log.pieces import PIECE, Pace
from sprite_agent.event_log.record_reader import ANY, RecordReader
from sprite_agent.event_log.records import START, Position, Run
from sprite_agent.event_log.rereading import CHUNK, Rereading, Stamp
from sprite_agent.event_log.resume import Trail, check_beginning, check_digest, cut_off

if TYPE_CHECKING:
    from collections.abc import Iterator
    from hashlib import _Hash as Hash

    from sprite_agent.contract.envelopes import ArtifactRef
    from sprite_agent.contract.events import EventBuilder
    from sprite_agent.event_log.newest import Portion
    from sprite_agent.event_log.records import Record
    from sprite_agent.event_log.resume import ResumeToken

READ_AGAIN_AT_ONCE = 1024 * 1024
"""Bytes of a log that can be read again while somebody waits: it takes a millisecond, and a twentieth of the time."""
_MAX_MARKS = 4096
"""Beyond it every other one is forgotten, so that the largest log takes about a megabyte."""


class LogView(NamedTuple):
    """What a log was like at one moment."""

    lines: int
    """Complete lines."""
    end: int
    """Bytes up to the last newline: a torn last line is not counted."""
    last_record: Record | None
    """The last finished record, not yet judged; None: there is none."""
    token: ResumeToken
    """After everything that is finished; before a record whose last lines are not there yet."""
    ref: ArtifactRef
    """The file as a whole, a torn last line included."""
    is_sure: bool
    """All of it was read again since it last changed; if not, that goes on with further looks."""
    identity: int
    """Changes when the file at the path is another one, or no continuation of what was read before."""


class Mark(NamedTuple):
    """A place in a log that was passed."""

    offset: int
    lines: int
    """Newlines before it."""
    digest: Hash
    """Running SHA-256 of all before it. Not to be updated."""
    boundary: Position
    """The last one before it."""


class Aim:
    """What one caller wants to have been read: what the log held when it first looked."""

    identity = 0
    size = 0
    passes = 0

    def __init__(self, most: int | None = None) -> None:
        """`most`: so many bytes are enough, if there are more."""
        self.most = most
        self.is_all = True
        """Whether it wants all that there was."""


class LogIndex:
    """The index of one log. For one thread at a time: its owner locks.

    What was read is compared with what the file holds. With each look: the first and the last 4 KiB. At
    once: everything, when the file was changed and is not longer than before, so that a rewrite of the
    same size is told from a mere `touch`. In the background, with a twentieth of a core: everything, after
    any other change. So a rewrite further up that comes together with new lines is noticed before these
    are seen where the log is small (a few megabytes, for its tail one) and does not change all
    the time; else within some twenty times what it takes to read the log, as long as somebody follows it;
    ten times that while it is written without pause. Without a follower each look does one piece.
    """

    _first_stamp: Stamp | None
    """What the file looked like before anything was read of it, if that was settled; until all was read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity = 0
        self._file: tuple[int, int] | None = None
        self._newest: Newest | None = None
        self._forget()

    @property
    def lines(self) -> int:
        """Complete lines that were read so far."""
        return self._records.lines

    @property
    def end(self) -> int:
        """Bytes that were read so far."""
        return self._trail.end

    @property
    def finished(self) -> int:
        """Bytes of what is finished of that: the records, and the blank lines after them."""
        return self._records.boundary.offset

    @property
    def is_sure(self) -> bool:
        """Whether the file held what was read, for certain, when it was looked at last."""
        return self._stamp is not None and self._rereading.covers(self._stamp)

    def keep_newest(self, builder: EventBuilder | None) -> None:
        """Begins to keep, checked by `builder`, what is read from now on, for `take_newest`; None: ends to."""
        self._newest = None if builder is None else Newest(self._records.boundary, builder)
        self._records.judge(wanted=builder is not None)

    def take_newest(self) -> list[Portion]:
        """What was read since the last call, up to the last view."""
        return [] if self._newest is None else self._newest.take()

    def advance(self, log: int, aim: Aim, *, soon: bool = False, background: float = PIECE) -> bool:
        """Goes on for a piece with the file open as `log`; whether everything that `aim` wants was read.

        `soon`: reading again in the background is left to another look, unless it takes next to nothing; `background`:
        seconds that it may take.
        """
        pace = Pace()
        status = os.fstat(log)
        file = (status.st_dev, status.st_ino)
        if self._file is None:
            self._file, self._identity = file, 1
        elif file != self._file or not self._trail.is_whole(log):
            self._begin_anew(file)
        self._notice(status)
        if aim.identity != self._identity:
            aim.identity, aim.size, aim.passes = self._identity, status.st_size, self._rereading.demanded
            if aim.most is not None:
                aim.size = min(aim.size, self._trail.end + aim.most)
            aim.is_all = aim.size == status.st_size
        aim.size = min(aim.size, status.st_size)  # of a log that was cut off meanwhile, there is no more to come
        if not self._read(log, aim.size, pace):
            return False
        if self._first_stamp is not None:
            self._rereading.spare(self._first_stamp)
            self._first_stamp = None
        if soon and not self._rereading.demanded and self._trail.end > READ_AGAIN_AT_ONCE:
            return True
        end = (self._trail.end, self._trail.sha256)
        if not self._rereading.demanded:
            pace = Pace(math.inf if self._trail.end <= READ_AGAIN_AT_ONCE else background)
        if not self._rereading.go_on(log, Stamp.of(status), self, end, pace):
            self._begin_anew(file)
            return False
        return self._rereading.is_done(aim.passes)

    def is_at(self, view: LogView, file: tuple[int, int], stamp: Stamp) -> bool:
        """Whether what was read is what `view` saw, and all that this file (device, inode) with this stamp holds."""
        return self._is_all_of(file, stamp) and (view.identity, view.ref["sizeBytes"]) == (self._identity, stamp.size)

    def is_sure_of(self, file: tuple[int, int], stamp: Stamp) -> bool:
        """Whether what was read is, for certain, all that this file with this stamp holds."""
        return self._is_all_of(file, stamp) and self.is_sure

    def _is_all_of(self, file: tuple[int, int], stamp: Stamp) -> bool:
        return (file, stamp) == (self._file, self._stamp) and stamp.size == self._trail.end and self._coming is None

    def view(self) -> LogView:
        """What the log is like, after `advance` has said that all was read."""
        assert self._stamp is not None  # noqa: S101  # advance() came first
        ref: ArtifactRef = {
            "path": self._path,
            "exists": True,
            "sizeBytes": self._trail.end,
            "lineCount": self._records.lines,
            "sha256": self._trail.sha256,
            "mtimeEpoch": self._stamp.modified // 10**9,
        }
        boundary = self._records.boundary
        token = self._trail.token(boundary)
        if self._newest is not None:
            self._newest.cut(boundary, str(token))
        return LogView(
            lines=self._records.lines,
            end=self._end,
            last_record=self._last_record,
            token=token,
            ref=ref,
            is_sure=self.is_sure,
            identity=self._identity,
        )

    def place_before(self, log: int, line: int) -> tuple[Position, Hash]:
        """A place at or before line `line` where reading may begin, and the digest of all before it.

        Raises:
            CursorBeyondEnd: the log has fewer lines.
            LogTruncated: it was cut off meanwhile.
        """
        if line > self._records.lines:
            raise CursorBeyondEnd(
                f"cursor {line} is past the {self._records.lines} lines of the log; reset it or replay from the start",
                details={"requested": line, "available": self._records.lines},
            )
        place = self._marks[bisect.bisect_right(self._marks, line, key=lambda mark: mark.boundary.line) - 1].boundary
        return place, self._digest_at(log, place.offset)[0]

    def place_of(self, log: int, token: ResumeToken) -> Hash:
        """The digest of all before the place of a token, which is the token's own.

        Raises:
            LogReplaced, LogTruncated, HistoryRewritten: the log is no longer the one it was taken in.
            ResumeTokenInvalid: its place is no place of this log.
        """
        line, offset = token.position
        if offset:
            check_beginning(log, token.generation, token.position)
        digest, lines, ends_line = self._digest_at(log, offset)
        if offset:
            check_digest(digest, token)
        if lines != line or not ends_line:
            raise ResumeTokenInvalid(
                f"the resume token takes byte {offset} for the end of line {line}, which it is not",
                violations=[("resume_token", "does not fit the lines of the log")],
            )
        return digest

    def digest_after(self, offset: int) -> tuple[int, str]:
        """See `rereading.Reading`."""
        at = bisect.bisect_right(self._marks, offset, key=lambda mark: mark.offset)
        if at == len(self._marks):
            return self._trail.end, self._trail.sha256
        return self._marks[at].offset, self._marks[at].digest.hexdigest()

    def _begin_anew(self, file: tuple[int, int]) -> None:
        self._forget()
        self._file = file
        self._identity += 1

    def _forget(self) -> None:
        self._records = RecordReader()
        self._coming: Iterator[Run | Record | None] | None = None
        self._trail = Trail()
        self._end = 0
        self._last_record: Record | None = None
        self._marks = [Mark(0, 0, hashlib.sha256(), START)]
        self._stride = CHUNK
        self._rereading = Rereading()
        self._stamp: Stamp | None = None
        self._first_stamp = None
        if self._newest is not None:
            self._newest.begin_anew()
            self._records.judge(wanted=True)

    def _notice(self, status: os.stat_result) -> None:
        """Wants all read again when the file was changed without becoming longer."""
        stamp = Stamp.of(status)
        if stamp.size > self._trail.end:
            self._rereading.withdraw()
        elif self._stamp is not None and stamp != self._stamp:
            self._rereading.demand()
        if self._stamp is None and stamp.is_settled():
            self._first_stamp = stamp
        self._stamp = stamp

    def _read(self, log: int, size: int, pace: Pace) -> bool:
        """Reads up to `size` bytes of the log; False: there was not time enough, or the log has changed."""
        self._records.most = ANY if self._newest is None else self._newest.room()
        while True:
            for found in self._coming or ():
                if found is not None:
                    self._note(found)
                if pace.over():
                    return False
            if self._coming is not None:
                self._coming = None
                self._mark()
            start = self._trail.end
            if start >= size:
                return True
            if pace.over():
                return False
            data = os.pread(log, min(CHUNK, size - start), start)
            if not data or not self._trail.is_whole(log):
                return False  # cut off, or another log's by now: the next look finds out
            self._trail.extend(data, boundary=self._records.boundary.offset, earliest=self._records.earliest)
            self._coming = self._records.feed(data)
            if (newline := data.rfind(b"\n")) >= 0:
                self._end = start + newline + 1

    def _note(self, found: Run | Record) -> None:
        self._last_record = found.last if isinstance(found, Run) else found
        if self._newest is not None:
            self._newest.add(found, self._trail)
            self._records.most = self._newest.room()

    def _mark(self) -> None:
        if self._trail.end - self._marks[-1].offset >= self._stride:
            mark = Mark(self._trail.end, self._records.lines, self._trail.digest.copy(), self._records.boundary)
            self._marks.append(mark)
        if len(self._marks) > _MAX_MARKS:
            del self._marks[1::2]
            self._stride *= 2

    def _digest_at(self, log: int, offset: int) -> tuple[Hash, int, bool]:
        """Of all before `offset` the running digest and the number of newlines, and whether a line ends there."""
        mark = self._marks[bisect.bisect_right(self._marks, offset, key=lambda mark: mark.offset) - 1]
        digest, lines, at = mark.digest.copy(), mark.lines, mark.offset
        while at < offset and (data := os.pread(log, min(CHUNK, offset - at), at)):
            digest.update(data)
            lines += data.count(b"\n")
            at += len(data)
        last = os.pread(log, 1, offset - 1) if offset else b"\n"
        if at < offset or not last:
            raise cut_off(Position(lines, offset), os.fstat(log).st_size)
        return digest, lines, last == b"\n"
