"""Whether an intent's effect shows: the rules, shared by the agent and the manager.

Only what is newer than the start of the command counts: the world as it was then is the
baseline, and the rules look at what differs from it. The agent knows more than a snapshot
says: the mark its command recorded the decision under, every decision in the log since,
and whether the process it wanted to stop is gone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprite_agent.contract.envelopes import (
        ConfirmationRecord,
        ControlEffect,
        Intent,
        RunStatus,
        SnapshotEnvelope,
    )


class Decision(NamedTuple):
    """A decision on an approval request, or its completion, as the log has it."""

    event: str
    status: str | None
    by: str | None
    run_id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one look at a loop shows of an intent's effect."""

    status: RunStatus
    active: bool | None
    lines: int
    last_event: str | None
    last_event_status: str | None
    """Status of the last event; None also where only a snapshot envelope is at hand."""
    approval_status: str | None
    approval_digest: str | None
    completion_ok: bool
    summary: Any
    observed_at: str
    decided_by: str | None = None
    """Who the approval request was decided by, as it says itself."""
    subject: str | None = None
    """Digest of what there is to decide: run, iteration, moment and candidate of the approval request."""
    asking_run: str | None = None
    """The run that asked for approval."""
    summary_run: str | None = None
    """The run of the latest summary entry."""
    decisions: tuple[Decision, ...] = ()
    """Those in the log since the baseline; only the agent has them."""
    target: str | None = None
    """Name of the active run's process; only the agent knows it."""
    target_is_gone: bool = True
    """Whether the baseline's target has ended; only the agent can tell."""


class Finding(NamedTuple):
    """How far the effect has got, and what shows it."""

    effect: ControlEffect
    reason: str | None


def evidence_from(snapshot: SnapshotEnvelope, last_event: dict[str, Any] | None = None) -> Evidence:
    """The evidence in a snapshot; `last_event` is the last record of the log, where it is at hand."""
    approval = snapshot["runtime"]["approval"]
    active = member(snapshot["runtime"]["superloopState"], "active")
    approval_status = member(approval, "status")
    event_status = member(last_event, "status")
    return Evidence(
        status=snapshot["run"]["status"],
        active=active if isinstance(active, bool) else None,
        lines=snapshot["cursor"]["eventLineCount"],
        last_event=snapshot["health"]["lastEventName"],
        last_event_status=event_status if isinstance(event_status, str) else None,
        approval_status=approval_status if isinstance(approval_status, str) else None,
        approval_digest=snapshot["artifacts"]["approval"]["sha256"],
        completion_ok=member(snapshot["run"]["summary"], "completion_ok") is True,
        summary=snapshot["run"]["summary"],
        observed_at=snapshot["emittedAt"],
    )


def find_effect(intent: Intent, now: Evidence, baseline: Evidence | None, mark: str | None = None) -> Finding:
    """How far `intent` shows in `now`.

    Args:
        intent: whose effect.
        now: the latest look.
        baseline: the loop before the command; None: everything counts as new.
        mark: what the command recorded its decision under; None: anybody's decision counts.
    """
    if intent == "cancel":
        stopped = now.active is not True and now.status != "running" and now.target_is_gone
        return Finding("completed", "inactive_not_running") if stopped else Finding("none", None)
    status = "approved" if intent == "approve" else "rejected"
    decided = _decided(status, now, baseline, mark)
    if intent == "reject":
        return Finding("completed", "rejection_observed") if decided else Finding("none", None)
    if (decided or mark is None) and _completed(now, baseline):
        return Finding("completed", "completion_observed")
    return Finding("decision_recorded", "decision_observed") if decided else Finding("none", None)


def decided_another(now: Evidence, baseline: Evidence, mark: str) -> bool:
    """Whether the decision under `mark` is on another approval request than the one there was before."""
    asking = baseline.asking_run
    runs = {found.run_id for found in now.decisions if found.by == mark} - {None, asking}
    return (now.decided_by == mark and now.subject != baseline.subject) or bool(asking and runs)


def enough(finding: Finding, required: ControlEffect) -> bool:
    """Whether the effect is as much as was asked for."""
    return finding.effect == "completed" or finding.effect == required == "decision_recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What came of looking for an effect."""

    effect: ControlEffect
    record: ConfirmationRecord
    detail: str
    """Why the effect does not (yet) show, in one sentence for people."""
    now: Evidence | None = None
    """The last look; None: the loop could never be read."""


def look_for_effect(
    intent: Intent,
    observe: Callable[[], Evidence],
    *,
    baseline: Evidence | None,
    required: ControlEffect,
    timeout: float,
    interval: float = 0.25,
    mark: str | None = None,
    settle: float = 0.0,
) -> Look:
    """Looks until the effect shows or `timeout` seconds are over; blocks meanwhile.

    What can't be read at the moment shows nothing yet: it is no failure of the intent.

    Args:
        intent: whose effect.
        observe: takes a look; may raise OpsError.
        baseline: the loop before the command was started; None: everything counts as new.
        required: the effect that is enough.
        timeout: seconds; 0 looks once.
        interval: seconds between two looks.
        mark: as for `find_effect`.
        settle: seconds for which the effect must go on to show; it may take so much longer.
    """
    until = time.monotonic() + timeout
    attempts, now, finding, detail = 0, None, Finding("none", None), ""
    showed = not settle  # whether it has shown for long enough, should it show now
    while True:
        attempts += 1
        seen = False
        try:
            now = observe()
            finding = find_effect(intent, now, baseline, mark)
            detail = _explained(intent, finding, now)
            seen = True
        except OpsError as error:
            detail = f"the loop can't be read: {error}"
        shows = enough(finding, required) and (seen or not settle)
        if shows and not showed:
            showed = True
            time.sleep(settle)
        elif shows or time.monotonic() >= until:
            record = build_record(intent, finding, confirmed=shows, now=now, attempts=attempts, timeout_seconds=timeout)
            return Look(effect=finding.effect, record=record, detail=detail, now=now)
        else:
            showed = not settle
            time.sleep(min(interval, max(0.0, until - time.monotonic())))


def build_record(
    intent: Intent, finding: Finding, *, confirmed: bool, now: Evidence | None, attempts: int, timeout_seconds: float
) -> ConfirmationRecord:
    """The record of having looked for the effect."""
    return {
        "intent": intent,
        "confirmed": confirmed,
        "reason": finding.reason if confirmed and finding.reason else "timeout",
        "attempts": attempts,
        "timeoutSeconds": timeout_seconds,
        "observedStatus": now.status if now else None,
        "observedLastEvent": now.last_event if now else None,
        "observedApprovalStatus": now.approval_status if now else None,
        "observedActive": now.active if now else None,
        "observedAt": now.observed_at if now else clock.now(),
    }


def _explained(intent: Intent, finding: Finding, now: Evidence) -> str:
    if intent == "cancel":
        living = "" if now.target_is_gone else ", and the process of its run lives"
        return f"the loop is still {now.status}, active {now.active}{living}"
    if finding.effect == "decision_recorded":
        if now.active is True:
            return "decision recorded; the active run has not completed yet"
        return "decision recorded; no active run to consume it: start the run again"
    return f"the decision does not show: approval status {now.approval_status}, last event {now.last_event}"


def _decided(status: str, now: Evidence, baseline: Evidence | None, mark: str | None) -> bool:
    """Whether the decision shows: in the approval request, or in the log, where it is under `mark`."""
    new_approval = baseline is None or now.approval_digest != baseline.approval_digest
    if new_approval and now.approval_status == status and mark in {None, now.decided_by}:
        return True
    if mark is not None:
        return any(found.by == mark and found.status == status for found in now.decisions)
    if baseline is not None and now.lines <= baseline.lines:
        return False
    if now.last_event == ("approval_consumed" if status == "approved" else "approval_rejected"):
        return True
    return now.last_event == "approval_decision" and now.last_event_status == status


def _completed(now: Evidence, baseline: Evidence | None) -> bool:
    """Whether the run that asked for approval is complete, and was not before."""
    if baseline is None:
        return now.completion_ok or now.last_event == "loop_complete"
    asking = baseline.asking_run
    same_run = asking is None or now.summary_run in {None, asking}
    if now.completion_ok and now.summary != baseline.summary and same_run:
        return True
    if now.decisions:
        runs = [found.run_id for found in now.decisions if found.event == "loop_complete"]
        return any(run is None or asking in {None, run} for run in runs)
    return now.lines > baseline.lines and now.last_event == "loop_complete" and same_run
