"""Nothing is run when things are not as the request needs them, and what is so already is not run again."""

from __future__ import annotations

import hashlib
import os
import subprocess
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.control import preconditions
from sprite_agent.control.journal import RETENTION_SECONDS
from sprite_agent.errors import (
    ApprovalChanged,
    ApprovalNotPending,
    ArtifactMalformed,
    ArtifactNotRegular,
    ControlNotFound,
    EventsNotFound,
    IterationMismatch,
    LoopNotActive,
    LoopNotFound,
    RequestInvalid,
    RequestTooOld,
    RunMismatch,
)
from support.repos import LOOP, LoopFiles, event, line, put
from support.runtime import again, executions, request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sprite_agent.errors import OpsError
    from sprite_agent.repo import Repo

    MakeRepo = Callable[..., Repo]

NOTHING_RUNS = 2**22 + 1
"""Above the highest pid Linux gives."""


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    """A loop that waits for approval of iteration 3 of run-3."""
    loop = LoopFiles(tmp_path / "repo")
    loop.append(line(event("approval_requested", run_id="run-9", iteration=9)))
    loop.ask_approval(run_id="run-3", iteration=3)
    return loop


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo()


def refused(repo: Repo, loop: LoopFiles, refusal: type[OpsError], document: dict[str, Any]) -> OpsError:
    """The refusal of a request: nothing was run, and the journal does not have its key."""
    with pytest.raises(refusal) as caught:
        repo.execute(document)
    assert caught.value.executed is False
    assert executions(loop) == []
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, document["idempotencyKey"])
    return caught.value


# What was expected.


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_another_run_than_expected_is_refused(repo: Repo, loop: LoopFiles, intent: str) -> None:
    error = refused(repo, loop, RunMismatch, request(intent, expectedRunId="run-2"))

    assert str(error) == "run run-3 is at hand, run-2 was expected"
    assert error.details == {"runId": "run-3"}


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_another_iteration_than_expected_is_refused(repo: Repo, loop: LoopFiles, intent: str) -> None:
    error = refused(repo, loop, IterationMismatch, request(intent, expectedIteration=2))

    assert str(error) == "iteration 3 is at hand, 2 was expected"
    assert error.details == {"iteration": "3"}


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_another_approval_request_than_the_one_shown_is_refused(repo: Repo, loop: LoopFiles, intent: str) -> None:
    shown = hashlib.sha256(loop.approval.read_bytes()).hexdigest()
    loop.ask_approval(run_id="run-3", iteration=3, candidate="another")

    error = refused(repo, loop, ApprovalChanged, request(intent, expectedApprovalDigest=shown))

    assert error.details == {"approvalDigest": hashlib.sha256(loop.approval.read_bytes()).hexdigest()}


def test_an_approval_request_that_is_gone_is_not_the_one_shown(repo: Repo, loop: LoopFiles) -> None:
    shown = hashlib.sha256(loop.approval.read_bytes()).hexdigest()
    loop.approval.unlink()

    refused(repo, loop, ApprovalChanged, request(expectedApprovalDigest=shown))


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_a_request_that_expects_what_is_at_hand_is_run(repo: Repo, loop: LoopFiles, intent: str) -> None:
    shown = hashlib.sha256(loop.approval.read_bytes()).hexdigest()

    result = repo.execute(request(intent, expectedRunId="run-3", expectedIteration=3, expectedApprovalDigest=shown))

    assert result["executed"]
    assert len(executions(loop)) == 1


def test_an_approval_request_that_names_no_run_and_iteration_is_of_the_loops_latest(
    repo: Repo, loop: LoopFiles
) -> None:
    put(loop.approval, {"status": "pending"})

    refused(repo, loop, RunMismatch, request(expectedRunId="run-3"))
    refused(repo, loop, IterationMismatch, request(expectedIteration=3))
    assert repo.execute(request(expectedRunId="run-9", expectedIteration=9))["executed"]


@pytest.mark.parametrize("written", [3, 3.0, "3", "3.0"], ids=repr)
def test_an_iteration_is_compared_as_a_number(repo: Repo, loop: LoopFiles, written: Any) -> None:
    loop.ask_approval(iteration=written)

    assert repo.execute(request(expectedIteration=3))["executed"]


def test_iteration_0_of_an_approval_request_is_an_iteration(repo: Repo, loop: LoopFiles) -> None:
    loop.ask_approval(iteration=0)

    assert repo.execute(request(expectedIteration=0))["executed"]


@pytest.mark.parametrize("members", [{"expectedRunId": "run-3"}, {"expectedIteration": 3}])
def test_a_cancel_is_compared_with_the_loops_latest_run(repo: Repo, loop: LoopFiles, members: dict[str, Any]) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})

    with pytest.raises((RunMismatch, IterationMismatch)):
        repo.execute(request("cancel", **members))
    assert repo.execute(request("cancel", expectedRunId="run-9", expectedIteration=9))["executed"]


# What can be decided.


@pytest.mark.parametrize(
    ("intent", "status"),
    [
        ("approve", "rejected"),
        ("reject", "approved"),
        ("approve", None),
        ("reject", None),
        ("approve", ""),
        ("approve", "PENDING"),
        ("approve", ["pending"]),
        ("reject", True),
    ],
)
def test_a_decision_on_what_is_not_pending_is_refused(repo: Repo, loop: LoopFiles, intent: str, status: Any) -> None:
    loop.ask_approval(status=status)

    error = refused(repo, loop, ApprovalNotPending, request(intent))

    assert error.details == {"approvalStatus": str(status)}


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_a_decision_without_an_approval_request_is_refused(repo: Repo, loop: LoopFiles, intent: str) -> None:
    loop.approval.unlink()

    refused(repo, loop, ApprovalNotPending, request(intent))


def test_a_key_that_was_refused_can_be_used_when_things_have_changed(repo: Repo, loop: LoopFiles) -> None:
    loop.ask_approval(status="rejected")
    refused(repo, loop, ApprovalNotPending, request())

    loop.ask_approval()

    result = repo.execute(request())
    assert (result["executed"], result["replayed"]) == (True, False)


# What a cancel would stop.


@pytest.mark.parametrize(
    ("active_run", "active_state"),
    [
        ({"loop_id": "other", "pid": NOTHING_RUNS}, None),
        (None, {"active": True, "current_loop_id": "other"}),
        ({"loop_id": LOOP, "pid": NOTHING_RUNS}, {"active": True, "current_loop_id": "other"}),
        ({"loop_id": "other", "pid": NOTHING_RUNS}, {"active": True, "current_loop_id": LOOP}),
    ],
)
def test_a_cancel_that_would_stop_another_loop_is_refused(
    repo: Repo, loop: LoopFiles, active_run: dict[str, Any] | None, active_state: dict[str, Any] | None
) -> None:
    """C3: it is repo-wide in the runtime."""
    for path, content in ((loop.active_run, active_run), (loop.state, active_state)):
        if content is not None:
            put(path, content)

    error = refused(repo, loop, LoopNotActive, request("cancel"))

    assert error.details == {"activeLoopId": "other"}


@pytest.mark.parametrize("value", [[], {}, [LOOP], 3])
@pytest.mark.parametrize("file", ["active_run", "state"])
def test_a_cancel_that_would_stop_who_knows_what_is_refused(repo: Repo, loop: LoopFiles, file: str, value: Any) -> None:
    put(getattr(loop, file), {"active": True, "loop_id": value, "current_loop_id": value, "pid": NOTHING_RUNS})

    assert refused(repo, loop, LoopNotActive, request("cancel")).details == {"activeLoopId": str(value)}


@pytest.mark.parametrize(
    "active_state", [{"active": False, "current_loop_id": "other"}, {"current_loop_id": "other"}, {"active": True}]
)
def test_a_loop_that_is_not_active_is_none_that_a_cancel_would_stop(
    repo: Repo, loop: LoopFiles, active_state: dict[str, Any]
) -> None:
    put(loop.state, active_state)

    assert repo.execute(request("cancel"))["status"] == "confirmed"


# What is so already.


@pytest.mark.parametrize(
    ("intent", "effect"), [("approve", "decision_recorded"), ("reject", "completed"), ("cancel", "completed")]
)
def test_what_is_so_already_is_confirmed_without_running_anything(
    repo: Repo, loop: LoopFiles, intent: str, effect: str
) -> None:
    loop.ask_approval(status={"approve": "approved", "reject": "rejected"}.get(intent, "pending"))

    result = repo.execute(request(intent, traceId="trace-1", note="because"))

    assert executions(loop) == []
    assert {**result, "finishedAt": "", "confirmation": {}, "journal": {}} == {
        "schemaVersion": "v1",
        "envelopeType": "control_result",
        "traceId": "trace-1",
        "loopId": LOOP,
        "intent": intent,
        "requestedBy": "ada",
        "note": "because",
        "idempotencyKey": "key-1",
        "state": "done",
        "status": "confirmed",
        "reason": "not_needed",
        "detail": "it was so already; nothing was run",
        "effect": effect,
        "executed": False,
        "replayed": False,
        "command": [],
        "exitCode": 0,
        "timedOut": False,
        "output": "",
        "startedAt": None,
        "finishedAt": "",
        "confirmation": {},
        "journal": {},
    }
    record = result["confirmation"]
    assert record is not None
    assert (record["confirmed"], record["reason"], record["attempts"]) == (True, "not_needed", 1)
    assert record["timeoutSeconds"] == 0


def test_what_was_not_needed_is_answered_the_same_again_when_it_would_be(repo: Repo, loop: LoopFiles) -> None:
    loop.ask_approval(status="approved")
    first = repo.execute(request())
    loop.ask_approval()

    assert repo.execute(request()) == again(first)
    assert executions(loop) == []


def test_what_is_so_already_needs_no_runtime(make_repo: MakeRepo) -> None:
    assert make_repo(None).execute(request("cancel"))["reason"] == "not_needed"


@pytest.mark.parametrize("pid", [NOTHING_RUNS, 0, -1, "1", True, None, 1.5, [1], 2**70])
def test_a_run_whose_process_does_not_live_needs_no_cancel(repo: Repo, loop: LoopFiles, pid: Any) -> None:
    put(loop.active_run, {"loop_id": LOOP, "pid": pid})

    assert repo.execute(request("cancel"))["reason"] == "not_needed"


def test_a_run_whose_process_is_a_zombie_needs_no_cancel(repo: Repo, loop: LoopFiles) -> None:
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        put(loop.active_run, {"loop_id": LOOP, "pid": ended.pid})

        assert repo.execute(request("cancel"))["reason"] == "not_needed"


@pytest.mark.parametrize(
    ("lives", "active_state"),
    [(True, None), (True, {"active": False}), (False, {"active": True, "current_loop_id": LOOP})],
)
def test_a_run_that_lives_or_is_marked_active_is_cancelled(
    repo: Repo, loop: LoopFiles, *, lives: bool, active_state: dict[str, Any] | None
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        put(loop.active_run, {"loop_id": LOOP, "pid": process.pid if lives else NOTHING_RUNS})
        if active_state is not None:
            put(loop.state, active_state)
        try:
            result = repo.execute(request("cancel"))
        finally:
            process.kill()

    assert result["executed"]
    assert result["status"] == ("ambiguous" if lives else "confirmed")
    assert len(executions(loop)) == 1


# How old a request may be.


def made(**ago: float) -> str:
    """The moment that was so long ago."""
    return (datetime.now(UTC) - timedelta(**ago)).isoformat(timespec="seconds")


LONG_AGO = {
    "a day and a bit": lambda: made(hours=24, seconds=1),
    "a year": lambda: made(days=365),
    "the first moment": lambda: "0001-01-01T00:00:00+14:00",
    "nanoseconds": lambda: "2020-01-01T00:00:00.123456789Z",
}
"""Moments, as of when the test is run."""


@pytest.mark.parametrize("moment", LONG_AGO.values(), ids=LONG_AGO.keys())
def test_a_request_that_was_made_more_than_a_day_ago_is_refused(
    repo: Repo, loop: LoopFiles, moment: Callable[[], str]
) -> None:
    document = request(requestedAt=moment())

    error = refused(repo, loop, RequestTooOld, document)

    assert error.details == {"requestedAt": document["requestedAt"]}
    assert "more than 1 day, 0:00:00 ago" in str(error)


OF_LATE = {
    "nearly a day": lambda: made(hours=23, minutes=55),
    "now": lambda: made(seconds=0),
    "in an hour": lambda: made(hours=-1),
    "in small letters": lambda: made(seconds=0).lower(),
}
"""Moments, as of when the test is run."""


@pytest.mark.parametrize("moment", OF_LATE.values(), ids=OF_LATE.keys())
def test_a_request_of_this_day_is_run(repo: Repo, moment: Callable[[], str]) -> None:
    assert repo.execute(request(requestedAt=moment()))["executed"]


def test_a_moment_is_compared_in_its_own_zone(repo: Repo, loop: LoopFiles) -> None:
    here = datetime.now(timezone(timedelta(hours=-12))) - timedelta(hours=23)

    assert repo.execute(request(requestedAt=here.isoformat(timespec="seconds")))["executed"]


@pytest.mark.parametrize("moment", ["2016-12-31T23:59:60Z", "9999-12-31T23:59:59-14:00"])
def test_a_moment_that_there_never_was_or_that_is_far_ahead_is_refused(
    repo: Repo, loop: LoopFiles, moment: str
) -> None:
    error = refused(repo, loop, RequestInvalid, request(requestedAt=moment))

    assert [field for field, _ in error.violations] == ["requested_at"]


def test_a_key_that_was_used_is_answered_however_old_the_request_is_by_now(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repo.execute(request(requestedAt=made(seconds=0)))

    assert repo.execute(request(requestedAt=made(days=2))) == again(first)


def test_a_late_duplicate_never_finds_its_key_forgotten() -> None:
    assert preconditions.MAX_REQUEST_AGE.total_seconds() < RETENTION_SECONDS


# What can't be read.


def test_control_of_a_loop_that_is_not_there_is_refused(repo: Repo, loop: LoopFiles) -> None:
    with pytest.raises(LoopNotFound):
        repo.execute(request(loopId="other"))
    assert executions(loop) == []


def test_control_of_a_loop_without_a_log_is_refused(repo: Repo, loop: LoopFiles) -> None:
    loop.log.unlink()

    refused(repo, loop, EventsNotFound, request())


@pytest.mark.parametrize("file", ["approval", "state", "active_run"])
def test_control_of_a_loop_that_cannot_be_read_is_refused(repo: Repo, loop: LoopFiles, file: str) -> None:
    put(getattr(loop, file), b"{")

    refused(repo, loop, ArtifactMalformed, request())


def test_control_of_a_loop_that_is_a_link_is_refused(repo: Repo, loop: LoopFiles) -> None:
    loop.folder.rename(loop.folder.with_name("other"))
    loop.folder.symlink_to("other")

    refused(repo, loop, ArtifactNotRegular, request())
