"""An intent's effect is confirmed only by what is newer than the start of its command."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.contract import confirmation
from sprite_agent.contract.confirmation import (
    Decision,
    Evidence,
    Finding,
    build_record,
    decided_another,
    enough,
    evidence_from,
    find_effect,
    look_for_effect,
)
from sprite_agent.errors import ArtifactMalformed, EventsNotFound, OpsError
from sprite_agent.repo import Repo
from support.journals import BEFORE
from support.repos import LOOP, LoopFiles, event, line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlEffect, Intent

RUNNING = dataclasses.replace(BEFORE, status="running", active=True, approval_status=None)

NOTHING = Finding("none", None)
DECIDED = Finding("decision_recorded", "decision_observed")
COMPLETED = Finding("completed", "completion_observed")
REJECTED = Finding("completed", "rejection_observed")
STOPPED = Finding("completed", "inactive_not_running")


def changed(**members: Any) -> Evidence:
    """The loop that waits for approval, a moment later."""
    return dataclasses.replace(BEFORE, **members)


def run_on(**members: Any) -> Evidence:
    """The loop that runs, a moment later."""
    return dataclasses.replace(RUNNING, **members)


# The rules.


@pytest.mark.parametrize(
    ("now", "finding"),
    [
        (run_on(active=False, status="stopped"), STOPPED),
        (run_on(active=None, status="unknown"), STOPPED),
        (run_on(active=False, status="awaiting_approval"), STOPPED),
        (RUNNING, NOTHING),
        (run_on(status="stopped"), NOTHING),
        (run_on(active=None), NOTHING),
        (run_on(active=False, status="stopped", target_is_gone=False), NOTHING),
    ],
)
def test_a_cancel_shows_when_the_loop_is_neither_active_nor_running_and_its_process_gone(
    now: Evidence, finding: Finding
) -> None:
    assert find_effect("cancel", now, RUNNING) == finding


APPROVED: dict[str, Any] = {"approval_status": "approved", "approval_digest": "b" * 64}
DECISION: dict[str, Any] = {"lines": 11, "last_event": "approval_decision"}


@pytest.mark.parametrize(
    ("now", "finding"),
    [
        (BEFORE, NOTHING),
        (changed(**APPROVED), DECIDED),
        (changed(**DECISION, last_event_status="approved"), DECIDED),
        (changed(lines=11, last_event="approval_consumed"), DECIDED),
        (changed(**APPROVED, **DECISION, last_event_status="approved"), DECIDED),
        (changed(lines=11, last_event="loop_complete"), COMPLETED),
        (changed(completion_ok=True, summary={"iteration": 1, "completion_ok": True}), COMPLETED),
        (changed(**DECISION, last_event_status="rejected"), NOTHING),
        (changed(**DECISION, last_event_status=None), NOTHING),
        (changed(approval_status="rejected", approval_digest="b" * 64), NOTHING),
        (changed(approval_status=None, approval_digest=None), NOTHING),
        (changed(lines=11, last_event="approval_rejected"), NOTHING),
        (changed(lines=11, last_event="loop_stop"), NOTHING),
        (changed(status="complete"), NOTHING),
    ],
)
def test_an_approve_shows_as_decision_and_then_as_completion(now: Evidence, finding: Finding) -> None:
    assert find_effect("approve", now, BEFORE) == finding


@pytest.mark.parametrize(
    ("now", "finding"),
    [
        (BEFORE, NOTHING),
        (changed(approval_status="rejected", approval_digest="b" * 64), REJECTED),
        (changed(**DECISION, last_event_status="rejected"), REJECTED),
        (changed(lines=11, last_event="approval_rejected"), REJECTED),
        (changed(**APPROVED), NOTHING),
        (changed(**DECISION, last_event_status="approved"), NOTHING),
        (changed(**DECISION, last_event_status=None), NOTHING),
        (changed(lines=11, last_event="loop_complete", completion_ok=True, summary={}), NOTHING),
    ],
)
def test_a_reject_shows_as_rejection_and_never_as_an_approve(now: Evidence, finding: Finding) -> None:
    assert find_effect("reject", now, BEFORE) == finding


@pytest.mark.parametrize(
    ("intent", "old"),
    [
        ("approve", {"last_event": "loop_complete"}),
        ("approve", {"last_event": "approval_consumed"}),
        ("approve", {"last_event": "approval_decision", "last_event_status": "approved"}),
        ("approve", {"approval_status": "approved"}),
        ("approve", {"completion_ok": True, "summary": {"completion_ok": True}}),
        ("reject", {"last_event": "approval_rejected"}),
        ("reject", {"last_event": "approval_decision", "last_event_status": "rejected"}),
        ("reject", {"approval_status": "rejected"}),
    ],
)
def test_what_was_so_before_the_command_shows_nothing(intent: Intent, old: dict[str, Any]) -> None:
    evidence = changed(**old)

    assert find_effect(intent, evidence, evidence) == NOTHING
    assert find_effect(intent, evidence, None) != NOTHING


@pytest.mark.parametrize(
    ("finding", "required", "is_enough"),
    [
        (COMPLETED, "completed", True),
        (COMPLETED, "decision_recorded", True),
        (DECIDED, "completed", False),
        (DECIDED, "decision_recorded", True),
        (NOTHING, "completed", False),
        (NOTHING, "decision_recorded", False),
    ],
)
def test_an_effect_is_enough_when_it_is_as_much_as_was_asked_for(
    *, finding: Finding, required: ControlEffect, is_enough: bool
) -> None:
    assert enough(finding, required) is is_enough


# The rules under a mark, as the agent has them.

MARK = "ada#0123456789abcdef"
OURS: dict[str, Any] = {**APPROVED, "decided_by": MARK}
DECIDED_IN_LOG = Decision("approval_decision", "approved", MARK, "run-1")
DONE_IN_LOG = Decision("loop_complete", None, None, "run-1")


@pytest.mark.parametrize(
    ("now", "finding"),
    [
        (changed(**OURS), DECIDED),
        (changed(**APPROVED), NOTHING),
        (changed(**APPROVED, decided_by="ada"), NOTHING),
        (changed(**APPROVED, decided_by="ada#fedcba9876543210"), NOTHING),
        (changed(**{**OURS, "approval_digest": BEFORE.approval_digest}), NOTHING),
        (changed(**{**OURS, "approval_status": "rejected"}), NOTHING),
        (changed(**DECISION, last_event_status="approved"), NOTHING),
        (changed(lines=11, last_event="approval_consumed"), NOTHING),
        (changed(decisions=(DECIDED_IN_LOG,)), DECIDED),
        (changed(decisions=(DECIDED_IN_LOG._replace(event="approval_consumed"),)), DECIDED),
        (changed(decisions=(DECIDED_IN_LOG._replace(by="ada"),)), NOTHING),
        (changed(decisions=(DECIDED_IN_LOG._replace(by=None),)), NOTHING),
        (changed(decisions=(DECIDED_IN_LOG._replace(status="rejected"),)), NOTHING),
        (changed(decisions=(DECIDED_IN_LOG._replace(by="eve"), DECIDED_IN_LOG)), DECIDED),
    ],
)
def test_under_a_mark_only_a_decision_that_bears_it_shows(now: Evidence, finding: Finding) -> None:
    """C5, C11: in the approval request or in the log."""
    assert find_effect("approve", now, BEFORE, MARK) == finding


REJECTED_BY_US = changed(approval_status="rejected", approval_digest="b" * 64, decided_by=MARK)


@pytest.mark.parametrize(
    ("now", "finding"),
    [
        (REJECTED_BY_US, REJECTED),
        (dataclasses.replace(REJECTED_BY_US, decided_by="eve"), NOTHING),
        (changed(decisions=(DECIDED_IN_LOG._replace(status="rejected"),)), REJECTED),
        (changed(**OURS), NOTHING),
        (changed(decisions=(DECIDED_IN_LOG,)), NOTHING),
    ],
)
def test_under_a_mark_a_reject_shows_as_a_rejection_that_bears_it(now: Evidence, finding: Finding) -> None:
    assert find_effect("reject", now, BEFORE, MARK) == finding


ASKED = dataclasses.replace(BEFORE, asking_run="run-1", summary_run="run-1")


def after(**members: Any) -> Evidence:
    """The loop that waits for approval of run-1, a moment after we approved it."""
    return dataclasses.replace(ASKED, **{**OURS, **members})


SUMMED: dict[str, Any] = {"completion_ok": True, "summary": {"iteration": 2}}


@pytest.mark.parametrize(
    ("now", "finding"),
    [
        (after(**SUMMED), COMPLETED),
        (after(**SUMMED, summary_run=None), COMPLETED),
        (after(**SUMMED, summary_run="run-old"), DECIDED),
        (after(completion_ok=True), DECIDED),
        (after(decisions=(DECIDED_IN_LOG, DONE_IN_LOG)), COMPLETED),
        (after(decisions=(DONE_IN_LOG._replace(run_id=None),)), COMPLETED),
        (after(decisions=(DONE_IN_LOG._replace(run_id="run-old"),)), DECIDED),
        (after(decisions=(DECIDED_IN_LOG,), lines=11, last_event="loop_complete"), DECIDED),
        (after(lines=11, last_event="loop_complete"), COMPLETED),
        (after(lines=11, last_event="loop_complete", summary_run="run-old"), DECIDED),
        (after(last_event="loop_complete"), DECIDED),
        (after(**SUMMED, decided_by="eve"), NOTHING),
        (after(decisions=(DONE_IN_LOG,), decided_by="eve"), NOTHING),
    ],
)
def test_under_a_mark_a_completion_shows_only_with_our_decision_and_of_the_run_that_asked(
    now: Evidence, finding: Finding
) -> None:
    """C4: not the completion of another run."""
    assert find_effect("approve", now, ASKED, MARK) == finding


@pytest.mark.parametrize(
    ("now", "is_another"),
    [
        (changed(decided_by=MARK, subject="x"), True),
        (changed(decided_by=MARK, subject="s"), False),
        (changed(decided_by="eve", subject="x"), False),
        (changed(decided_by=None, subject=None), False),
    ],
)
def test_a_decision_is_on_another_request_when_the_mark_is_on_another_subject(
    *, now: Evidence, is_another: bool
) -> None:
    assert decided_another(now, changed(subject="s"), MARK) is is_another


# Looking.


def seen(*looks: Evidence | OpsError) -> Callable[[], Evidence]:
    """Observes these one after the other, the last one for ever."""
    left = list(looks)

    def observe() -> Evidence:
        look = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(look, OpsError):
            raise look
        return look

    return observe


def look(
    intent: Intent, *looks: Evidence | OpsError, timeout: float = 60, required: ControlEffect = "completed"
) -> Any:
    """Looks, without a pause between two looks."""
    return look_for_effect(intent, seen(*looks), baseline=BEFORE, required=required, timeout=timeout, interval=0)


def test_looking_ends_when_the_effect_shows() -> None:
    found = look("reject", BEFORE, BEFORE, changed(approval_status="rejected", approval_digest="b" * 64))

    assert found.effect == "completed"
    assert found.record == {
        "intent": "reject",
        "confirmed": True,
        "reason": "rejection_observed",
        "attempts": 3,
        "timeoutSeconds": 60,
        "observedStatus": "awaiting_approval",
        "observedLastEvent": "approval_requested",
        "observedApprovalStatus": "rejected",
        "observedActive": False,
        "observedAt": "2026-01-02T03:04:05Z",
    }


def test_looking_without_time_looks_once() -> None:
    found = look("approve", BEFORE, changed(**APPROVED), timeout=0)

    assert found.effect == "none"
    assert (found.record["confirmed"], found.record["reason"], found.record["attempts"]) == (False, "timeout", 1)


class Clock:
    """Goes on for those who sleep, and for nobody else."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Takes no time."""
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What looking goes by."""
    clock = Clock()
    monkeypatch.setattr(confirmation, "time", clock)
    return clock


def test_looking_ends_with_the_time(clock: Clock) -> None:
    found = look_for_effect("approve", seen(BEFORE), baseline=BEFORE, required="completed", timeout=2, interval=0.5)

    assert clock.slept == [0.5] * 4
    assert (found.record["confirmed"], found.record["reason"]) == (False, "timeout")
    assert found.record["attempts"] == 5


def test_a_pause_between_two_looks_is_never_longer_than_the_time_left(clock: Clock) -> None:
    look_for_effect("approve", seen(BEFORE), baseline=BEFORE, required="completed", timeout=5, interval=4)

    assert clock.slept == [4, 1]


def test_a_recorded_decision_is_told_though_it_is_not_enough() -> None:
    found = look("approve", changed(**APPROVED), timeout=0)

    assert found.effect == "decision_recorded"
    assert (found.record["confirmed"], found.record["reason"]) == (False, "timeout")
    assert found.detail == "decision recorded; no active run to consume it: start the run again"


def test_a_recorded_decision_with_an_active_run_says_so() -> None:
    found = look("approve", changed(**APPROVED, active=True), timeout=0)

    assert found.detail == "decision recorded; the active run has not completed yet"


def test_a_recorded_decision_is_enough_where_it_was_asked_for() -> None:
    found = look("approve", BEFORE, changed(**APPROVED), required="decision_recorded")

    assert found.effect == "decision_recorded"
    assert (found.record["confirmed"], found.record["reason"]) == (True, "decision_observed")


@pytest.mark.parametrize(
    ("intent", "now", "detail"),
    [
        ("cancel", RUNNING, "the loop is still running, active True"),
        (
            "approve",
            BEFORE,
            "the decision does not show: approval status pending, last event approval_requested",
        ),
        ("reject", BEFORE, "the decision does not show: approval status pending, last event approval_requested"),
    ],
)
def test_an_effect_that_does_not_show_is_explained(intent: Intent, now: Evidence, detail: str) -> None:
    assert look(intent, now, timeout=0).detail == detail


def test_a_living_process_of_the_run_is_explained() -> None:
    detail = look("cancel", run_on(active=None, status="unknown", target_is_gone=False), timeout=0).detail

    assert detail == "the loop is still unknown, active None, and the process of its run lives"


STILL = run_on(active=None, status="stopped")


@pytest.mark.parametrize(
    ("looks", "confirmed", "attempts"),
    [
        ([STILL, STILL], True, 2),
        ([STILL, RUNNING], False, 2),
        ([RUNNING, STILL], False, 1),
    ],
)
def test_what_has_to_show_for_a_while_is_looked_at_twice_even_without_time(
    clock: Clock, *, looks: list[Evidence], confirmed: bool, attempts: int
) -> None:
    """C2: a run that was not stopped writes its state once more."""
    found = look_for_effect(
        "cancel", seen(*looks), baseline=RUNNING, required="completed", timeout=0, interval=0, settle=0.1
    )

    assert clock.slept == [0.1] * (attempts - 1)
    assert (found.record["confirmed"], found.record["attempts"]) == (confirmed, attempts)
    assert (found.effect == "completed") is confirmed


def test_what_has_to_show_for_a_while_starts_anew_each_time_it_does_not() -> None:
    unreadable = ArtifactMalformed("state.json can't be read")
    looks: list[Evidence | OpsError] = [STILL, RUNNING, STILL, unreadable, unreadable, STILL, STILL]

    found = look_for_effect(
        "cancel", seen(*looks), baseline=RUNNING, required="completed", timeout=60, interval=0, settle=0.01
    )

    assert (found.record["confirmed"], found.record["attempts"]) == (True, 7)


def test_what_showed_and_cannot_be_looked_at_again_is_not_confirmed() -> None:
    looks = seen(STILL, ArtifactMalformed("state.json can't be read"))

    found = look_for_effect("cancel", looks, baseline=RUNNING, required="completed", timeout=0, interval=0, settle=0.01)

    assert found.record["confirmed"] is False
    assert found.detail == "the loop can't be read: state.json can't be read"


def test_what_cannot_be_read_shows_nothing_yet() -> None:
    unreadable = ArtifactMalformed("state.json can't be read")

    found = look("reject", unreadable, unreadable, changed(approval_status="rejected", approval_digest="b" * 64))

    assert found.record["confirmed"]
    assert found.record["attempts"] == 3


def test_a_loop_that_can_never_be_read_is_not_confirmed_and_nothing_was_observed() -> None:
    found = look("cancel", EventsNotFound("required artifact missing"), timeout=0)

    assert found.effect == "none"
    assert found.detail == "the loop can't be read: required artifact missing"
    assert (found.record["confirmed"], found.record["reason"], found.now) == (False, "timeout", None)
    observed = [value for name, value in found.record.items() if name.startswith("observed") and name != "observedAt"]
    assert observed == [None] * 4
    assert found.record["observedAt"].endswith("Z")


def test_an_effect_that_was_seen_is_not_forgotten_when_the_loop_cannot_be_read_later(clock: Clock) -> None:
    unreadable = ArtifactMalformed("state.json can't be read")
    looks = seen(changed(**APPROVED), unreadable)

    found = look_for_effect("approve", looks, baseline=BEFORE, required="completed", timeout=5, interval=1)

    assert found.record["attempts"] > 1
    assert found.effect == "decision_recorded"
    assert found.record["observedApprovalStatus"] == "approved"


def test_a_record_of_what_did_not_confirm_says_timeout() -> None:
    record = build_record("approve", DECIDED, confirmed=False, now=BEFORE, attempts=4, timeout_seconds=1.5)

    assert (record["reason"], record["attempts"], record["timeoutSeconds"]) == ("timeout", 4, 1.5)


# Evidence.


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    return LoopFiles(tmp_path / "repo")


@pytest.fixture
def repo(loop: LoopFiles, tmp_path: Path) -> Iterator[Repo]:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
    yield repo
    repo.close()


def test_the_evidence_is_what_a_snapshot_and_the_last_event_say(repo: Repo, loop: LoopFiles) -> None:
    loop.append(line(event()), line(event("approval_decision", status="approved")))
    loop.ask_approval(status="approved")
    loop.summarize({"completion_ok": True})
    loop.state.write_bytes(b'{"active": false}')
    reading = repo.read_loop(LOOP)

    evidence = evidence_from(reading.snapshot, reading.last_event)

    assert evidence == Evidence(
        status="complete",
        active=False,
        lines=2,
        last_event="approval_decision",
        last_event_status="approved",
        approval_status="approved",
        approval_digest=reading.snapshot["artifacts"]["approval"]["sha256"],
        completion_ok=True,
        summary={"completion_ok": True},
        observed_at=reading.snapshot["emittedAt"],
    )
    assert evidence_from(reading.snapshot).last_event_status is None


@pytest.mark.parametrize("odd", ["1", '"true"', "[]", "null"])
def test_values_of_another_type_are_no_evidence(repo: Repo, loop: LoopFiles, odd: str) -> None:
    loop.state.write_bytes(f'{{"active": {odd}}}'.encode())
    loop.approval.write_bytes(b'{"status": ["approved"]}')
    loop.summarize({"completion_ok": 1})

    evidence = evidence_from(repo.read_loop(LOOP).snapshot)

    assert (evidence.active, evidence.approval_status, evidence.completion_ok) == (None, None, False)
