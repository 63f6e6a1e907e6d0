"""Resume tokens: a place in an event log, bound to the log's content.

A token names the log by the digest of its first line (the generation), and the place by
line, byte offset and the digest of the bytes before it. So a log that was truncated,
replaced, rewritten or rolled back is noticed even when it is longer than before.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

from sprite_agent.errors import LogReplaced, LogTruncated, ResumeTokenInvalid
from sprite_agent.records import START, Position

WINDOW_BYTES = 4096
"""How much before a place is digested: about ten lines, at a cost of microseconds."""

_TOKEN = re.compile(r"r1\.([0-9a-f]{16})\.(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})\.([0-9a-f]{32})")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeToken:
    """A place in a log and what the log was like before it."""

    position: Position
    generation: str
    digest: str

    def __str__(self) -> str:
        return f"r1.{self.generation}.{self.position.line}.{self.position.offset}.{self.digest}"


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


def check_token(log: int, token: ResumeToken) -> None:
    """Returns if the log open as descriptor `log` is, up to the token's place, the one it was taken in.

    Raises:
        LogTruncated: it is shorter.
        LogReplaced: it begins otherwise, or reads otherwise before the place.
    """
    line, offset = token.position
    if not offset:
        return
    details = {"line": line, "offset": offset, "oldGeneration": token.generation}
    size = os.fstat(log).st_size
    generation = _generation(log)
    if size and generation != token.generation:
        raise LogReplaced(
            f"the event log was replaced: it begins otherwise than when line {line} was read; replay from the start",
            details={**details, "newGeneration": generation},
        )
    if size < offset:
        raise LogTruncated(
            f"the event log was truncated: {size} bytes, and line {line} ended at byte {offset}; replay from the start",
            details={**details, "size": size},
        )
    if _digest(_window_before(log, offset)) != token.digest:
        raise LogReplaced(
            f"the event log was rewritten: it reads otherwise before line {line + 1}; replay from the start",
            details={**details, "newGeneration": generation},
        )


class Trail:
    """The bytes a reader has read last, from which it makes tokens.

    A token must say what was read, not what the file holds when the token is made: by then it may be another log's.
    """

    def __init__(self, log: int | None = None, start: Position = START) -> None:
        """Starts at a place in the log open as descriptor `log`; at its beginning none is needed."""
        self._head = b"" if log is None else os.pread(log, min(WINDOW_BYTES, start.offset), 0)
        self._bytes = b"" if log is None else _window_before(log, start.offset)
        self.end = start.offset
        """Bytes read, from the beginning of the log."""
        self._boundary = (start.offset, _digest(self._bytes))

    def is_whole(self, log: int) -> bool:
        """Whether the log still begins with what was read, and holds it where this ends."""
        begins = os.pread(log, len(self._head), 0) == self._head
        return begins and _window_before(log, self.end) == self._bytes[-WINDOW_BYTES:]

    def extend(self, data: bytes, *, boundary: int, earliest: int) -> None:
        """Notes what was read. A token may still be asked for at `boundary`, and from `earliest` on."""
        if boundary != self._boundary[0]:
            self._boundary = (boundary, self._digest_at(boundary))
        if len(self._head) < WINDOW_BYTES:
            self._head = (self._head + data)[:WINDOW_BYTES]
        needed = self.end - earliest + WINDOW_BYTES
        self._bytes = self._bytes[-needed:] + data
        self.end += len(data)

    def token(self, position: Position) -> ResumeToken:
        """The token for a place that was passed."""
        offset, digest = self._boundary
        return ResumeToken(
            position=position,
            generation=_digest_of_first_line(self._head) if position.offset else "0" * 16,
            digest=digest if position.offset == offset else self._digest_at(position.offset),
        )

    def _digest_at(self, offset: int) -> str:
        stop = len(self._bytes) - (self.end - offset)
        return _digest(self._bytes[max(0, stop - WINDOW_BYTES) : stop])


def _window_before(log: int, offset: int) -> bytes:
    """The bytes that a digest at `offset` covers."""
    start = max(0, offset - WINDOW_BYTES)
    return os.pread(log, offset - start, start)


def _generation(log: int) -> str:
    return _digest_of_first_line(os.pread(log, WINDOW_BYTES, 0))


def _digest_of_first_line(head: bytes) -> str:
    first, newline, _ = head.partition(b"\n")
    return hashlib.sha256(first + newline).hexdigest()[:16]


def _digest(window: bytes) -> str:
    return hashlib.sha256(window).hexdigest()[:32]
