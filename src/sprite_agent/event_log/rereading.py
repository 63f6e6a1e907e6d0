"""Reads a log again to notice what was rewritten further up than each read looks.

A program that changes what was read and appends in one go leaves no trace but the content
itself. So the content is read again, in the background of other looks.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from sprite_agent.event_log.pieces import Pace

CHUNK = 64 * 1024
_SHARE = 0.05
"""How much of a processor the background may use."""
_SAVED = 0.1
"""Seconds of that which may be saved up."""
_SETTLED = 0.05
"""Seconds after which a file's times have changed if its content has: they are kept in ticks of some milliseconds."""


class Stamp(NamedTuple):
    """What a file's status says of its content."""

    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp in a status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_settled(self) -> bool:
        """Whether whatever changes the content from now on changes the stamp too."""
        return time.time_ns() - max(self.modified, self.changed) > _SETTLED * 1e9


class Reading(Protocol):
    """What was read of a log at first."""

    def digest_after(self, offset: int) -> tuple[int, str]:
        """The next place after `offset` of which the SHA-256 of all before it is known, and that, lower-case hex."""
        ...


class Rereading:
    """Passes over one log, from its beginning to what was read of it when the pass began.

    A pass is asked for (`demand`) when the file changed and did not get longer, and is then
    made at once; otherwise one follows each change, a piece now and then.
    """

    def __init__(self) -> None:
        self._demanded = 0
        """Number of the pass that was asked for last; 0: none, or it is needed no more."""
        self._done = 0
        self._pass: _Pass | None = None
        self._clean: Stamp | None = None
        """The stamp at the beginning of the last pass, or of the first reading, if it was settled: a log that still
        has it needs no other.
        """
        self._credit, self._credited_at = _SAVED, time.monotonic()

    def demand(self) -> None:
        """Asks for a pass that begins from now on."""
        self._demanded = self._done + 1 + (self._pass is not None)

    def withdraw(self) -> None:
        """Says that no pass is needed at once any more."""
        self._demanded = 0

    def spare(self, stamp: Stamp) -> None:
        """Says that the first reading, which is over, began when the log had this stamp, which was settled."""
        self._clean = stamp

    @property
    def demanded(self) -> int:
        """Number of a pass that has to be done first; 0: none."""
        return self._demanded if self._done < self._demanded else 0

    def is_done(self, number: int) -> bool:
        """Whether the pass of this number is over, or was withdrawn."""
        return self._done >= min(number, self._demanded)

    def covers(self, stamp: Stamp) -> bool:
        """Whether a log with this stamp holds what was read, for certain."""
        return stamp == self._clean

    def go_on(self, log: int, stamp: Stamp, reading: Reading, end: tuple[int, str], pace: Pace) -> bool:
        """A piece of a pass, if there is need and time. False: the log no longer holds what was read.

        Args:
            log: descriptor of the log.
            stamp: the stamp it has now.
            reading: what was read.
            end: its end, and the SHA-256 of all of it.
            pace: how long the piece may be.
        """
        began = time.monotonic()
        self._credit = min(_SAVED, self._credit + _SHARE * (began - self._credited_at))
        self._credited_at = began
        if not self.demanded and (self.covers(stamp) or self._credit <= 0):
            return True
        worked = time.thread_time()  # not what others took of the processor meanwhile: it would be owed for long
        if self._pass is None:
            self._pass = _Pass(stamp if stamp.is_settled() else None, end)
        holds = self._pass.go_on(log, reading, pace)
        if holds and self._pass.is_over:
            self._done += 1
            self._clean, self._pass = self._pass.stamp, None
        self._credit -= time.thread_time() - worked
        return holds


class _Pass:
    """One pass, as far as it has got."""

    def __init__(self, stamp: Stamp | None, end: tuple[int, str]) -> None:
        self.stamp = stamp
        self._end = end
        self._offset = 0
        self._digest: Hash = hashlib.sha256()

    @property
    def is_over(self) -> bool:
        return self._offset >= self._end[0]

    def go_on(self, log: int, reading: Reading, pace: Pace) -> bool:
        while not self.is_over:
            place, digest = min(reading.digest_after(self._offset), self._end)
            while self._offset < place:
                data = os.pread(log, min(CHUNK, place - self._offset), self._offset)
                if not data:
                    return False
                self._digest.update(data)
                self._offset += len(data)
                if pace.over() and self._offset < place:
                    return True
            if self._digest.hexdigest() != digest:
                return False
            if pace.over():
                return True
        return True
