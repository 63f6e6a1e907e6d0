"""What must hold before an intent is run: pure rules over a request and a snapshot."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sprite_agent.contract.events import whole_number
from sprite_agent.contract.json_text import member
from sprite_agent.control.processes import name_of
from sprite_agent.errors import (
    ApprovalChanged,
    ApprovalNotPending,
    IterationMismatch,
    LoopNotActive,
    RequestInvalid,
    RequestTooOld,
    RunMismatch,
)

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ControlRequest, SnapshotEnvelope

MAX_REQUEST_AGE = timedelta(hours=24)
"""Far less than a key is kept: a late duplicate never finds its key forgotten."""

_DECISION = {"approve": "approved", "reject": "rejected"}


def check(request: ControlRequest, snapshot: SnapshotEnvelope, last_event: dict[str, Any] | None) -> None:
    """Returns if the request fits the loop as it is.

    The run at hand is, for a decision, that of the approval request; for a cancel that of the last event: a run that
    has just started has no summary entry yet.

    Raises:
        RunMismatch, IterationMismatch, ApprovalChanged: it is not what the operator was shown.
        ApprovalNotPending: there is no request to decide, or it was decided the other way.
        LoopNotActive: a cancel would stop another loop.
    """
    approval = snapshot["runtime"]["approval"]
    if request["intent"] == "cancel":
        _check_active(request, snapshot)
    at_hand = last_event if request["intent"] == "cancel" else approval
    run_id = member(at_hand, "run_id") or snapshot["run"]["runId"]
    iteration = member(at_hand, "iteration")
    iteration = snapshot["run"]["iteration"] if iteration is None else whole_number(iteration)
    if request.get("expectedRunId", run_id) != run_id:
        raise RunMismatch(
            f"run {run_id} is at hand, {request['expectedRunId']} was expected", details={"runId": run_id}
        )
    if request.get("expectedIteration", iteration) != iteration:
        raise IterationMismatch(
            f"iteration {iteration} is at hand, {request['expectedIteration']} was expected",
            details={"iteration": iteration},
        )
    digest = snapshot["artifacts"]["approval"]["sha256"]
    if request.get("expectedApprovalDigest", digest) != digest:
        raise ApprovalChanged(
            "the approval request is not the one that was shown; look at it again", details={"approvalDigest": digest}
        )
    if request["intent"] != "cancel":
        status = member(approval, "status")
        if status not in ("pending", _DECISION[request["intent"]]):
            raise ApprovalNotPending(
                f"loop {request['loopId']} has no pending approval request (approval status: {status})",
                details={"approvalStatus": status},
            )


def check_age(request: ControlRequest, now: datetime) -> None:
    """Returns if the request is of this day.

    Raises:
        RequestTooOld
        RequestInvalid: it is of a day to come, so it would be young enough long after its key was forgotten.
    """
    made = request.get("requestedAt")
    if made is None:
        return
    age = now - _moment(made)
    if age > MAX_REQUEST_AGE:
        raise RequestTooOld(
            f"the request was made at {made}, more than {MAX_REQUEST_AGE} ago;"
            " look at the loop again and make a new one",
            details={"requestedAt": made},
        )
    if -age > MAX_REQUEST_AGE:
        raise _no_moment(made, f"it is more than {MAX_REQUEST_AGE} ahead of this clock")


def is_so_already(request: ControlRequest, snapshot: SnapshotEnvelope) -> bool:
    """Whether what is asked for is there without running anything."""
    runtime = snapshot["runtime"]
    if request["intent"] == "cancel":
        running = name_of(member(runtime["activeRun"], "pid"))
        return running is None and member(runtime["superloopState"], "active") is not True
    return bool(member(runtime["approval"], "status") == _DECISION[request["intent"]])


def _check_active(request: ControlRequest, snapshot: SnapshotEnvelope) -> None:
    runtime = snapshot["runtime"]
    state, run = runtime["superloopState"], runtime["activeRun"]
    active = [member(run, "loop_id"), member(state, "current_loop_id") if member(state, "active") is True else None]
    others = sorted(str(loop) for loop in active if loop not in (None, request["loopId"]))  # any JSON value, it may be
    if others:
        raise LoopNotActive(
            f"loop {others[0]} is the active one: a cancel would stop it, not {request['loopId']}",
            details={"activeLoopId": others[0]},
        )


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.upper())  # RFC 3339 has t and z as well
    except ValueError as error:  # a leap second, say
        raise _no_moment(text, str(error)) from error


def _no_moment(text: str, fault: str) -> RequestInvalid:
    return RequestInvalid(
        f"requested_at {text!r} is no moment: {fault}",
        details={"requestedAt": text},
        violations=[("requested_at", fault)],
    )
