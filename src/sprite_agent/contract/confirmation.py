"""Whether an intent's effect shows: the rules, shared by the agent and the manager.

Only what is newer than the start of the command counts: the world as it was then is the
baseline, and the rules look at what differs from it.
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


def find_effect(intent: Intent, now: Evidence, baseline: Evidence | None) -> Finding:
    """How far `intent` shows in `now`. Without a baseline everything counts as new."""
    new_event = baseline is None or now.lines > baseline.lines
    new_approval = baseline is None or now.approval_digest != baseline.approval_digest
    new_summary = baseline is None or now.summary != baseline.summary
    if intent == "cancel":
        stopped = now.active is not True and now.status != "running"
        return Finding("completed", "inactive_not_running") if stopped else Finding("none", None)
    if intent == "approve":
        if (new_summary and now.completion_ok) or (new_event and now.last_event == "loop_complete"):
            return Finding("completed", "completion_observed")
        consumed = new_event and now.last_event == "approval_consumed"
        if consumed or _decided("approved", now, new_approval=new_approval, new_event=new_event):
            return Finding("decision_recorded", "decision_observed")
        return Finding("none", None)
    rejected = new_event and now.last_event == "approval_rejected"
    if rejected or _decided("rejected", now, new_approval=new_approval, new_event=new_event):
        return Finding("completed", "rejection_observed")
    return Finding("none", None)


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


def look_for_effect(
    intent: Intent,
    observe: Callable[[], Evidence],
    *,
    baseline: Evidence | None,
    required: ControlEffect,
    timeout: float,
    interval: float = 0.25,
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
    """
    until = time.monotonic() + timeout
    attempts, now, finding, detail = 0, None, Finding("none", None), ""
    while True:
        attempts += 1
        try:
            now = observe()
            finding = find_effect(intent, now, baseline)
            detail = _explained(intent, finding, now)
        except OpsError as error:
            detail = f"the loop can't be read: {error}"
        confirmed = enough(finding, required)
        if confirmed or time.monotonic() >= until:
            record = build_record(
                intent, finding, confirmed=confirmed, now=now, attempts=attempts, timeout_seconds=timeout
            )
            return Look(effect=finding.effect, record=record, detail=detail)
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
        return f"the loop is still {now.status}, active {now.active}"
    if finding.effect == "decision_recorded":
        if now.active is True:
            return "decision recorded; the active run has not completed yet"
        return "decision recorded; no active run to consume it: start the run again"
    return f"the decision does not show: approval status {now.approval_status}, last event {now.last_event}"


def _decided(decision: str, now: Evidence, *, new_approval: bool, new_event: bool) -> bool:
    in_approval = new_approval and now.approval_status == decision
    in_log = new_event and now.last_event == "approval_decision" and now.last_event_status == decision
    return in_approval or in_log
