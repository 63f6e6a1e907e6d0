"""Resume tokens: a place in an event log, bound to the log's content.

A token names the log by the digest of its first line (the generation), and the place by
line, byte offset and the digest of all the bytes before it. So a log that was truncated,
replaced, rewritten or rolled back is noticed even when it is longer than before.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from sprite_agent.errors import HistoryRewritten, LogReplaced, LogTruncated, PositionLost, ResumeTokenInvalid
from sprite_agent.event_log.records import START, Position

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

WINDOW_BYTES = 4096
"""How much at the beginning and before a place is compared with each read: it costs microseconds."""
_FAR = 16 * 1024
"""Bytes between two places of which the running digest is kept: so much is digested again for a token between them."""

_TOKEN = re.compile(r"r1\.([0-9a-f]{16})\.(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})\.([0-9a-f]{32})")


class ResumeToken(NamedTuple):
    """A place in a log and what the log was like before it."""

    position: Position
    generation: str
    digest: str

    def __str__(self) -> str:
        return f"r1.{self.generation}.{self.position.line}.{self.position.offset}.{self.digest}"


START_TOKEN = ResumeToken(position=START, generation="0" * 16, digest=hashlib.sha256().hexdigest()[:32])
"""Before the first line of whatever log."""


def parse_token(text: str) -> ResumeToken:
    """The token that `text` is.

    Raises:
        ResumeTokenInvalid: it is none of ours.
    """
    match = _TOKEN.fullmatch(text)
    if not match:
        raise ResumeTokenInvalid(
            f"{text[:80]!r} is not a resume token; leave it out to start from the first line",
            violations=[("resume_token", "not a token that this agent made")],
        )
    generation, line, offset, digest = match.groups()
    return ResumeToken(position=Position(int(line), int(offset)), generation=generation, digest=digest)


def check_beginning(log: int, generation: str, place: Position) -> None:
    """Returns if the log open as descriptor `log` is of this generation, and reaches to this place.

    Raises:
        LogReplaced: it begins otherwise.
        LogTruncated: it is shorter.
    """
    line, offset = place
    details = {"line": line, "offset": offset, "oldGeneration": generation}
    size = os.fstat(log).st_size
    head = os.pread(log, WINDOW_BYTES, 0)
    found = _digest_of_first_line(head)
    has_first_line = b"\n" in head or len(head) == WINDOW_BYTES
    is_cut_off = len(head) < min(WINDOW_BYTES, size)
    if found != generation and (has_first_line or size >= offset) and not is_cut_off:
        raise LogReplaced(
            f"the event log was replaced: it begins otherwise than when line {line} was read; replay from the start",
            details={**details, "newGeneration": found},
        )
    if size < offset or is_cut_off:
        raise LogTruncated(
            f"the event log was truncated: {size} bytes, and line {line} ended at byte {offset}; replay from the start",
            details={**details, "size": size},
        )


def check_digest(digest: Hash, token: ResumeToken) -> None:
    """Returns if `digest`, of all before the token's place, is the token's.

    Raises:
        HistoryRewritten: it is another.
    """
    if _shortened(digest.hexdigest()) != token.digest:
        raise _rewritten(token.generation, token.position)


class Trail:
    """What a reader has read of a log, so far as tokens are made from it.

    A token must say what was read, not what the file holds when the token is made: by then it may be another log's.
    """

    def __init__(self, log: int | None = None, start: Position = START, digest: Hash | None = None) -> None:
        """Starts at a place in the log open as descriptor `log`, with the running SHA-256 of all before it."""
        if log is None or not start.offset:
            self._head, self._bytes = b"", bytearray()
        else:
            self._head = os.pread(log, min(WINDOW_BYTES, start.offset), 0)
            self._bytes = bytearray(_window_before(log, start.offset))
            if min(len(self._head), len(self._bytes)) < min(WINDOW_BYTES, start.offset):
                raise cut_off(start, os.fstat(log).st_size)
        self.digest = hashlib.sha256() if digest is None else digest
        """Of everything read, from the beginning of the log. Not to be updated."""
        self.sha256 = self.digest.hexdigest()
        """The same, lower-case hex."""
        self.end = start.offset
        """Bytes read, from the beginning of the log."""
        self._generation = _digest_of_first_line(self._head)
        # Running digests at places not after any that a token may still be asked for, but for the boundary.
        self._known = deque([(start.offset, self.digest.copy())])
        self._boundary = (start.offset, _shortened(self.sha256))

    def is_whole(self, log: int) -> bool:
        """Whether the log still begins with what was read, and holds it where this ends."""
        begins = not self.end or os.pread(log, len(self._head), 0) == self._head
        if self.end <= WINDOW_BYTES:
            return begins  # that was all of it
        return begins and _window_before(log, self.end) == self._bytes[-WINDOW_BYTES:]

    def why_not_whole(self, log: int, end: int, position: Position) -> PositionLost:
        """What has become of the log, where it is not what was read, or not as long as byte `end` any more."""
        if self.end:
            try:
                check_beginning(log, self._generation, Position(position.line, self.end))
            except PositionLost as lost:
                return lost
        size = os.fstat(log).st_size
        if size < end:
            return LogTruncated(
                f"the event log was truncated while it was read: {size} bytes of {end}; replay from the start",
                details={"line": position.line, "offset": position.offset, "size": size},
            )
        if self.is_whole(log):
            return cut_off(position, size)
        return _rewritten(self._generation, position)

    def extend(self, data: bytes, *, boundary: int, earliest: int) -> None:
        """Notes what was read. A token may still be asked for at `boundary`, and from `earliest` on."""
        if boundary != self._boundary[0]:
            self._boundary = (boundary, self._digest_at(boundary))
        if (size := len(self._head)) < WINDOW_BYTES:
            begun = b"\n" in self._head
            self._head += data[: WINDOW_BYTES - size]
            if not begun:
                self._generation = _digest_of_first_line(self._head)
        if earliest >= self.end:
            self._known.clear()
        while len(self._known) > 1 and self._known[1][0] <= earliest:
            self._known.popleft()
        view = memoryview(data)
        # Where the last line ends a token is asked for most likely, and what comes next begins.
        last = data.rfind(b"\n") + 1 if len(data) > _FAR else 0
        at = 0
        while at < len(data):
            if not self._known or self.end - self._known[-1][0] >= _FAR or 0 < at == last:
                self._known.append((self.end, self.digest.copy()))
            piece = view[at : last if at < last < at + _FAR else at + _FAR]
            self.digest.update(piece)
            self.end += len(piece)
            at += len(piece)
        self.sha256 = self.digest.hexdigest()
        needed = self.end - min(self._known[0][0], self.end - WINDOW_BYTES)
        del self._bytes[: max(0, len(self._bytes) + len(data) - needed)]
        self._bytes += data

    def token(self, position: Position) -> ResumeToken:
        """The token for a place that was passed."""
        offset, digest = self._boundary
        return ResumeToken(
            position=position,
            generation=self._generation if position.offset else START_TOKEN.generation,
            digest=digest if position.offset == offset else self._digest_at(position.offset),
        )

    def _digest_at(self, offset: int) -> str:
        if offset == self.end:
            return _shortened(self.sha256)
        known, digest = next(entry for entry in reversed(self._known) if entry[0] <= offset)
        behind = len(self._bytes) - self.end
        digest = digest.copy()
        digest.update(self._bytes[behind + known : behind + offset])
        return _shortened(digest.hexdigest())


def _shortened(sha256: str) -> str:
    return sha256[:32]


def cut_off(position: Position, size: int) -> LogTruncated:
    """That the log was shorter for a moment."""
    line, offset = position
    return LogTruncated(
        f"the event log was cut off while it was read up to line {line}; replay from the start",
        details={"line": line, "offset": offset, "size": size},
    )


def _rewritten(generation: str, position: Position) -> HistoryRewritten:
    line, offset = position
    return HistoryRewritten(
        f"the event log was rewritten: it begins as before, but reads otherwise before line {line + 1}; "
        "replay from the start",
        details={"line": line, "offset": offset, "generation": generation},
    )


def _window_before(log: int, offset: int) -> bytes:
    start = max(0, offset - WINDOW_BYTES)
    return os.pread(log, offset - start, start)


def _digest_of_first_line(head: bytes) -> str:
    first, newline, _ = head.partition(b"\n")
    return hashlib.sha256(first + newline).hexdigest()[:16]
