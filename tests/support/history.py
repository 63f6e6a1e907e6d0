"""Checks what clients saw against what there was, whatever happened in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO

    from sprite_agent.contract.streaming import EventBatch


class EventHistory:
    """The events that one client has seen of a log, checked as it sees them. Use it in a `with`.

    They have to be a prefix of what the log's complete lines hold after where the client
    began: in order, none left out, none twice, each byte for byte. Records that the agent
    reported as skipped count as seen.
    """

    def __init__(self, log: Path, *, after_line: int = 0) -> None:
        self._path = log
        self._log: BinaryIO
        self._line = after_line
        """Lines of the log before which everything was seen."""
        self.events = 0
        """How many were seen."""

    def __enter__(self) -> Self:
        self._log = self._path.open("rb")
        for _ in range(self._line):
            self._log.readline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def saw(self, batch: EventBatch) -> None:
        """Takes in one batch; fails when it does not go on where the last one ended."""
        lines = [event["cursor"]["eventLineOffset"] for event in batch.events]
        assert lines == sorted(lines), f"lines out of order: {lines}"
        records: list[tuple[int, int, str | None]] = [
            (record.first_line, record.last_line, None) for record in batch.skipped
        ]
        # Where an event over several lines begins, the log says: after its blank lines.
        records += [
            (0, number, getattr(event["event"]["raw"], "text", ""))
            for number, event in zip(lines, batch.events, strict=True)
        ]
        for first, last, raw in sorted(records, key=lambda record: record[1]):
            assert last > self._line, f"line {last} came again, after line {self._line}"
            text = b"".join(self._complete_line() for _ in range(last - self._line)).strip()
            if raw is not None:
                assert text == raw.encode(), f"up to line {last} the log has {text[:300]!r}, the event {raw[:300]!r}"
                self.events += 1
            else:
                assert text.count(b"\n") <= last - first, (
                    f"lines before {first} were passed over with it: {text[:300]!r}"
                )

    def at_end(self) -> bool:
        """Whether everything that the log holds now was seen."""
        here = self._log.tell()
        rest = self._log.read()
        self._log.seek(here)
        return not rest[: rest.rfind(b"\n") + 1].strip()

    def _complete_line(self) -> bytes:
        line = self._log.readline()
        self._line += 1
        assert line.endswith(b"\n"), f"line {self._line} is not complete: {line[:300]!r}"
        return line


def assert_prefix(batches: list[EventBatch], log: Path, *, after_line: int = 0) -> int:
    """Fails unless `batches` are, in order and once each, what the log holds first; how many events that were."""
    with EventHistory(log, after_line=after_line) as history:
        for batch in batches:
            history.saw(batch)
        return history.events
