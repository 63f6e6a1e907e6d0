"""What the agent sees of an intent's effect: more than a snapshot says, and only what is newer than its command."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from sprite_agent.contract import json_text
from sprite_agent.contract.confirmation import Decision, Evidence, evidence_from
from sprite_agent.contract.events import event_name
from sprite_agent.contract.json_text import member
from sprite_agent.control.processes import is_alive, name_of
from sprite_agent.errors import EventsNotFound, PositionLost, ResumeTokenInvalid

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from sprite_agent.event_log.log import EventLog
    from sprite_agent.event_log.reader import LogReader
    from sprite_agent.snapshot import LoopReading

_DECISIONS = frozenset({"approval_decision", "approval_consumed", "approval_rejected", "loop_complete"})
_SUBJECT = ("run_id", "iteration", "requested_at", "candidate")
_MOST_DECISIONS = 100
"""Kept of one control: sandbox code may write any number of them."""
_LONGEST_NAME = 1024
"""More than any mark has, in characters: what is longer is nobody's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """A loop before a command was started, as the journal keeps it."""

    evidence: Evidence
    resume_token: str
    """What the log has after this is newer than the command."""

    def document(self) -> dict[str, Any]:
        """The baseline as JSON values."""
        return {"evidence": {**asdict(self.evidence), "decisions": []}, "resumeToken": self.resume_token}


def take_baseline(reading: LoopReading) -> Baseline:
    """The baseline that a reading of the loop gives."""
    return Baseline(evidence=_evidence(reading), resume_token=reading.resume_token)


def baseline_from(document: dict[str, Any]) -> Baseline:
    """The baseline that `Baseline.document` was made of."""
    evidence = Evidence(**{**document["evidence"], "decisions": ()})
    return Baseline(evidence=evidence, resume_token=document["resumeToken"])


def subject_of(approval: Any) -> str | None:
    """A digest of what an approval request asks to decide; None: there is none."""
    return None if approval is None else _digest({name: member(approval, name) for name in _SUBJECT})


def decided_by(approval: Any) -> str | None:
    """Who an approval request was decided by, as it says itself."""
    by = member(member(approval, "decision"), "by")
    return by if isinstance(by, str) else None


class Witness:
    """Looks at one loop for what is newer than a baseline. Use it in a `with`."""

    def __init__(
        self, read_loop: Callable[[], LoopReading], find_log: Callable[[], EventLog], baseline: Baseline
    ) -> None:
        """Looks at nothing yet: the loop may be gone."""
        self._read_loop = read_loop
        self._find_log = find_log
        self._baseline = baseline
        self._reader: LogReader | None = None
        self._decisions: list[Decision] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def look(self) -> Evidence:
        """The loop as it is now.

        Raises:
            OpsError: it can't be read.
        """
        reading = self._read_loop()
        self._read_on()
        evidence = _evidence(reading)
        target = self._baseline.evidence.target
        gone = evidence.target is None and (target is None or not is_alive(target))
        return replace(evidence, decisions=tuple(self._decisions), target_is_gone=gone)

    def _read_on(self) -> None:
        """Notes the decisions that the log has got; while it is not the same log, it shows nothing more."""
        log = self._find_log()
        try:
            if self._reader is None:
                self._reader = log.reader_after_token(self._baseline.resume_token)
                self._decisions.clear()
            end = log.refresh().end
            while not self._reader.at_end(end):
                for record in self._reader.read(end):
                    self._note(record.value)
        except (PositionLost, ResumeTokenInvalid, EventsNotFound):  # the token may be an earlier version's
            self._let_go()

    def _let_go(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _note(self, event: dict[str, Any] | None) -> None:
        name = event_name(event)
        if isinstance(name, str) and name in _DECISIONS and len(self._decisions) < _MOST_DECISIONS:
            data = member(event, "data")
            status = member(event, "status") or member(data, "status")
            by, run_id = member(data, "by"), member(event, "run_id")
            self._decisions.append(Decision(name, _short(status), _short(by), _short(run_id)))


def _evidence(reading: LoopReading) -> Evidence:
    evidence = evidence_from(reading.snapshot, reading.last_event)
    runtime = reading.snapshot["runtime"]
    return replace(
        evidence,
        summary=_digest(evidence.summary),  # compared only, and kept in the journal
        decided_by=decided_by(runtime["approval"]),
        subject=subject_of(runtime["approval"]),
        asking_run=_text(member(runtime["approval"], "run_id")),
        summary_run=_text(member(reading.snapshot["run"]["summary"], "run_id")),
        target=name_of(member(runtime["activeRun"], "pid")),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json_text.encode(value)).hexdigest()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _short(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) <= _LONGEST_NAME else None
