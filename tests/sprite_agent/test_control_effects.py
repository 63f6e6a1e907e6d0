"""An intent is confirmed by what is newer than its command and tied to what it was aimed at, and by nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.callers import Caller, Proof
from sprite_agent.contract import confirmation
from sprite_agent.contract.validation import violations
from sprite_agent.control import conclusion
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.runtime import LOOKS_ONCE, SKIPS, WAITS, mark_in, request, run, script, state_of, turn
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.repo import Repo

    MakeRepo = Callable[..., Repo]

SHIPPED_SETTLE = conclusion.SETTLE
RECORDED = {**LOOKS_ONCE, "requiredEffect": "decision_recorded"}


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo()


@pytest.fixture
def survivor() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no cancel of the stand-in stops: it is no `run` of it."""
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as process:
        yield process
        process.kill()


def active(loop: LoopFiles, pid: int) -> None:
    """Has the artifacts say that a process runs the loop."""
    put(loop.active_run, {"loop_id": LOOP, "pid": pid, "pgid": pid})
    put(loop.state, {"active": True, "current_loop_id": LOOP})


def outcome(result: ControlResult) -> tuple[Any, ...]:
    """What a result says of the effect; fails unless it keeps the contract."""
    assert violations("control_result", result) == []
    assert result["confirmation"] is None or result["confirmation"]["confirmed"] == (result["status"] == "confirmed")
    return result["status"], result["reason"], result["effect"]


NOTHING_SHOWS = ("ambiguous", "timeout", "none")


# A cancel.


def test_a_cancel_without_effect_is_ambiguous(repo: Repo, loop: LoopFiles) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    turn(loop, skip_effect=True)

    result = repo.execute(request("cancel"))

    assert outcome(result) == NOTHING_SHOWS
    assert result["detail"] == "the loop is still awaiting_approval, active True"


def test_a_cancel_is_not_confirmed_while_the_process_of_the_run_goes_on(
    repo: Repo, loop: LoopFiles, survivor: subprocess.Popen[bytes]
) -> None:
    """C2: that the files are gone is not enough."""
    active(loop, survivor.pid)

    result = repo.execute(request("cancel", confirmation={"mode": "wait", "timeoutSeconds": 0.3}))

    assert outcome(result) == NOTHING_SHOWS
    assert result["detail"] == ("the loop is still awaiting_approval, active None, and the process of its run lives")
    assert not loop.state.exists()
    assert not loop.active_run.exists()


def test_a_cancel_is_confirmed_when_the_process_of_the_run_has_ended_meanwhile(
    repo: Repo, loop: LoopFiles, survivor: subprocess.Popen[bytes]
) -> None:
    active(loop, survivor.pid)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(repo.execute, request("cancel", confirmation=WAITS))
        until(lambda: state_of(repo) == "executed", "the command has ended")
        survivor.kill()
        result = asked.result()

    assert outcome(result) == ("confirmed", "inactive_not_running", "completed")


def test_a_cancel_is_not_confirmed_while_any_process_is_named_as_the_active_run(
    make_repo: MakeRepo, loop: LoopFiles, survivor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    (tmp_path / "new").write_text(json.dumps({"loop_id": LOOP, "pid": survivor.pid}))
    repo = make_repo(script(tmp_path / "superloop", f"rm {loop.state}; cp {tmp_path}/new {loop.active_run}"))

    assert outcome(repo.execute(request("cancel"))) == NOTHING_SHOWS


def test_a_cancel_is_not_confirmed_when_the_loop_is_active_again_a_moment_later(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C2: a run that was not stopped writes its state once more."""
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    repo = make_repo(script(tmp_path / "superloop", f"mv {loop.state} {tmp_path}/kept"))
    waits: list[float] = []

    def meanwhile(seconds: float) -> None:
        waits.append(seconds)
        (tmp_path / "kept").rename(loop.state)

    monkeypatch.setattr(conclusion, "SETTLE", SHIPPED_SETTLE)
    monkeypatch.setattr(confirmation, "time", SimpleNamespace(monotonic=time.monotonic, sleep=meanwhile))

    result = repo.execute(request("cancel"))

    assert waits == [SHIPPED_SETTLE]
    assert outcome(result) == NOTHING_SHOWS
    assert result["detail"] == "the loop is still awaiting_approval, active True"


def test_a_cancel_has_to_show_for_a_second(
    make_repo: MakeRepo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    repo = make_repo()
    monkeypatch.setattr(conclusion, "SETTLE", SHIPPED_SETTLE)
    began = time.monotonic()

    result = repo.execute(request("cancel"))

    assert time.monotonic() - began >= 1
    assert outcome(result) == ("confirmed", "inactive_not_running", "completed")
    assert result["confirmation"] is not None
    assert result["confirmation"]["attempts"] == 2


def test_what_is_approved_after_a_cancel_is_recorded_in_that_order(repo: Repo, loop: LoopFiles) -> None:
    """C7: a cancel leaves the approval request; whether it may still be decided is the manager's to say."""
    put(loop.state, {"active": True, "current_loop_id": LOOP})

    cancelled = repo.execute(request("cancel"))
    approved = repo.execute(request(idempotencyKey="key-2", confirmation=RECORDED))

    assert (cancelled["status"], approved["status"]) == ("confirmed", "confirmed")
    assert cancelled["journal"]["sequence"] < approved["journal"]["sequence"]


# A decision.


def test_the_decision_is_recorded_under_who_asked_who_vouches_for_them_and_the_execution(
    repo: Repo, loop: LoopFiles
) -> None:
    """C8: the agent makes the name, in one line, and no two executions share it."""
    proof = Proof(issuer="ops-1", key_id="k", actor="ada", nonce="n", expires=time.time() + 60)

    result = repo.execute(request("reject"), caller=Caller(identity="ops-1", proof=proof))

    decision = json.loads(loop.approval.read_bytes())["decision"]
    assert decision["by"] == mark_in(result)
    assert re.fullmatch(r"ada@ops-1#[0-9a-f]{16}", decision["by"])
    loop.ask_approval()
    assert mark_in(repo.execute(request("reject", idempotencyKey="key-2"))).partition("#")[2] not in decision["by"]


def test_what_was_so_before_the_command_does_not_confirm_it(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize({"completion_ok": True})
    loop.append(line(event("loop_complete")))
    turn(loop, skip_effect=True)

    assert outcome(repo.execute(request())) == NOTHING_SHOWS


def decides(loop: LoopFiles, path: Path, status: str, by: str) -> str:
    """A runtime that records a decision with a status, by a name in which `$mark` is ours; its path."""
    decided = {**json.loads(loop.approval.read_bytes()), "status": status, "decision": {"by": "BY"}}
    told = event("approval_decision", status=status, data={"status": status, "by": "BY"})
    return script(
        path,
        'while [ "$1" != --by ]; do shift; done; mark=$2\n'
        f"approval='{json.dumps(decided)}'\nevent='{json.dumps(told)}'\n"
        f'echo "$approval" | sed "s/BY/{by}/" > {loop.approval}\n'
        f'echo "$event" | sed "s/BY/{by}/" >> {loop.log}\n',
    )


@pytest.mark.parametrize(("intent", "status"), [("approve", "approved"), ("reject", "rejected")])
def test_a_decision_under_our_mark_confirms(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path, intent: str, status: str
) -> None:
    repo = make_repo(decides(loop, tmp_path / "superloop", status, "$mark"))

    assert repo.execute(request(intent, confirmation=RECORDED))["status"] == "confirmed"


@pytest.mark.parametrize(("intent", "status"), [("approve", "approved"), ("reject", "rejected")])
@pytest.mark.parametrize("by", ["ada", "ada#0000000000000000", "eve", "x$mark"])
def test_somebody_elses_decision_confirms_nothing(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path, *, intent: str, status: str, by: str
) -> None:
    repo = make_repo(decides(loop, tmp_path / "superloop", status, by))

    assert outcome(repo.execute(request(intent, confirmation=RECORDED))) == NOTHING_SHOWS


@pytest.mark.parametrize(("intent", "status"), [("approve", "rejected"), ("reject", "approved")])
def test_another_decision_than_the_one_asked_for_does_not_confirm_it(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path, intent: str, status: str
) -> None:
    """C5: not even under our mark."""
    repo = make_repo(decides(loop, tmp_path / "superloop", status, "$mark"))

    assert outcome(repo.execute(request(intent, confirmation=RECORDED))) == NOTHING_SHOWS


def test_a_decision_that_only_the_log_tells_of_confirms(make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path) -> None:
    """As when a run has consumed the approval request at once."""
    decides(loop, tmp_path / "decide", "approved", "$mark")
    repo = make_repo(script(tmp_path / "superloop", f'{tmp_path}/decide "$@"; rm {loop.approval}'))

    result = repo.execute(request(confirmation=RECORDED))

    assert outcome(result) == ("confirmed", "decision_observed", "decision_recorded")


def test_a_decision_in_another_log_confirms_nothing(make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path) -> None:
    """One that was put in the place of the log there was."""
    decides(loop, tmp_path / "decide", "approved", "$mark")
    another = tmp_path / "another.jsonl"
    another.write_bytes(line(event("loop_start", run_id="run-0")))
    swap = f'mv {another} {loop.log}; {tmp_path}/decide "$@"; rm {loop.approval}'
    repo = make_repo(script(tmp_path / "superloop", swap))

    assert outcome(repo.execute(request(confirmation=RECORDED))) == NOTHING_SHOWS


def test_the_completion_of_another_run_does_not_confirm_an_approve(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    """C4: neither its summary nor its event."""
    old = LoopFiles(tmp_path / "old")
    old.summarize({"run_id": "run-old", "iteration": 1, "completion_ok": True})
    old.append(line(event("loop_complete", run_id="run-old")))
    completes = f'{STANDIN} "$@"; cp {old.run_summary} {loop.run_summary}; cat {old.log} >> {loop.log}'
    repo = make_repo(script(tmp_path / "superloop", completes))

    result = repo.execute(request())

    assert outcome(result) == ("ambiguous", "timeout", "decision_recorded")
    assert result["detail"] == "decision recorded; no active run to consume it: start the run again"


def test_a_completion_without_our_decision_does_not_confirm_an_approve(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    decides(loop, tmp_path / "decide", "approved", "eve")
    told = json.dumps(event("loop_complete"))
    repo = make_repo(script(tmp_path / "superloop", f"{tmp_path}/decide \"$@\"; echo '{told}' >> {loop.log}"))

    assert outcome(repo.execute(request())) == NOTHING_SHOWS


def test_a_completion_that_comes_with_the_decision_confirms_an_approve(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    loop.approval.unlink()
    run(loop)
    again = f'{STANDIN} "$@"; exec {STANDIN} run --repo {loop.repo} --loop {LOOP}'
    repo = make_repo(script(tmp_path / "superloop", again))

    result = repo.execute(request())

    assert outcome(result) == ("confirmed", "completion_observed", "completed")
    assert not loop.approval.exists()


def test_a_decision_on_another_request_than_the_one_at_hand_is_told_as_that(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    """The sandbox exchanged the request between the check and the command."""
    loop.ask_approval(iteration=2)
    other = loop.approval.rename(tmp_path / "other.json")
    loop.ask_approval()
    repo = make_repo(script(tmp_path / "superloop", f'cp {other} {loop.approval}; exec {STANDIN} "$@"'))

    result = repo.execute(request(confirmation=RECORDED))

    assert outcome(result) == ("ambiguous", "approved_different", "decision_recorded")
    assert result["detail"] == (
        "the decision landed on another approval request than the one at hand when the command was started"
    )
    assert result["confirmation"] is not None
    assert result["confirmation"]["reason"] == "approved_different"


@pytest.mark.parametrize(("intent", "status"), [("approve", "approved"), ("reject", "rejected")])
def test_a_decision_on_another_request_is_not_confirmed_where_only_the_log_tells(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path, intent: str, status: str
) -> None:
    """The request was exchanged under the command, and the next one is pending already."""
    decided = event("approval_decision", run_id="run-2", iteration=7, status=status, data={"by": "BY"})
    pending = {"status": "pending", "loop_id": LOOP, "run_id": "run-3", "iteration": 8}
    runtime = script(
        tmp_path / "exchanged",
        f"""
import sys
from pathlib import Path
by = sys.argv[sys.argv.index("--by") + 1]
with open({str(loop.log)!r}, "ab") as log:
    log.write({line(decided)!r}.replace(b"BY", by.encode()))
Path({str(loop.approval)!r}).write_bytes({json.dumps(pending).encode()!r})
""",
        interpreter=sys.executable,
    )

    result = make_repo(runtime).execute(request(intent, confirmation=LOOKS_ONCE))

    assert (result["status"], result["reason"]) == ("ambiguous", "approved_different")


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_a_decision_without_effect_is_ambiguous(repo: Repo, loop: LoopFiles, intent: str) -> None:
    turn(loop, skip_effect=True)

    result = repo.execute(request(intent))

    assert outcome(result) == NOTHING_SHOWS
    assert result["detail"] == "the decision does not show: approval status pending, last event approval_requested"


def test_a_recorded_decision_is_answered_at_once_where_it_is_enough(repo: Repo) -> None:
    """I12: nobody waits for a run that has to be started again first."""
    began = time.monotonic()

    result = repo.execute(request(confirmation={**WAITS, "requiredEffect": "decision_recorded"}))

    assert time.monotonic() - began < 5
    assert outcome(result) == ("confirmed", "decision_observed", "decision_recorded")


# A command that fails.


@pytest.mark.parametrize("mode", [LOOKS_ONCE, WAITS, SKIPS], ids=["looks once", "waits", "skips"])
def test_a_command_that_failed_after_its_effect_is_confirmed_with_a_warning(
    repo: Repo, loop: LoopFiles, mode: dict[str, Any]
) -> None:
    """C6: what shows counts before the exit code, also where nobody was to look."""
    turn(loop, exit_code=1)

    result = repo.execute(request("reject", confirmation=mode))

    assert outcome(result) == ("confirmed", "rejection_observed", "completed")
    assert result["detail"] == "PARTIAL_EFFECT: the effect shows, but the command exited with 1"
    assert (result["executed"], result["exitCode"]) == (True, 1)


def test_a_command_that_failed_after_a_part_of_its_effect_is_ambiguous(repo: Repo, loop: LoopFiles) -> None:
    """C6: and not waited for, since nothing more will come."""
    turn(loop, exit_code=1)
    began = time.monotonic()

    result = repo.execute(request(confirmation=WAITS))

    assert time.monotonic() - began < 5
    assert outcome(result) == ("ambiguous", "timeout", "decision_recorded")
    assert result["detail"] == (
        "PARTIAL_EFFECT: decision recorded; no active run to consume it: start the run again;"
        " but the command exited with 1"
    )


def test_a_command_that_failed_where_its_effect_cannot_be_seen_is_ambiguous(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    repo = make_repo(script(tmp_path / "superloop", f"{STANDIN} \"$@\"; printf '{{' > {loop.state}; exit 1"))

    result = repo.execute(request("reject"))

    assert outcome(result) == NOTHING_SHOWS
    assert result["detail"] is not None
    assert result["detail"].startswith("the command exited with 1; the loop can't be read: ")


# A loop that can't be read, and clocks.


def test_a_loop_that_cannot_be_read_afterwards_makes_the_result_ambiguous(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    repo = make_repo(script(tmp_path / "superloop", f"rm {loop.log}"))

    result = repo.execute(request(confirmation={"mode": "wait", "timeoutSeconds": 0.3}))

    assert outcome(result) == NOTHING_SHOWS
    assert result["detail"] == f"the loop can't be read: required artifact missing: {loop.log}"
    assert result["confirmation"] is not None
    assert result["confirmation"]["attempts"] >= 2
    assert result["confirmation"]["observedStatus"] is None


@pytest.mark.parametrize("file", ["state", "approval", "run_summary", "active_run"])
def test_an_artifact_that_is_malformed_for_a_while_only_delays_the_confirmation(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path, file: str
) -> None:
    path = getattr(loop, file)
    loop.approval.unlink()
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    repo = make_repo(script(tmp_path / "superloop", f"rm {loop.state}; printf '{{' > {path}"))
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(repo.execute, request("cancel", confirmation=WAITS))
        until(lambda: state_of(repo) == "executed", "the command has ended")
        path.unlink()
        result = asked.result()

    assert outcome(result) == ("confirmed", "inactive_not_running", "completed")


@pytest.mark.parametrize("step", [-3600.0, 3600.0], ids=["back", "forward"])
def test_a_step_of_the_wall_clock_changes_no_duration(
    make_repo: MakeRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """I15: neither of the command's time limit nor of the looking."""
    stepped = tmp_path / "stepped"
    repo = make_repo(script(tmp_path / "superloop", f"touch {stepped}; sleep 0.2"))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + (step if stepped.exists() else 0))
    began = time.monotonic()

    result = repo.execute(request(confirmation={"mode": "wait", "timeoutSeconds": 0.5}))

    assert 0.7 <= time.monotonic() - began < 5
    assert outcome(result) == NOTHING_SHOWS
    assert result["confirmation"] is not None
    assert result["confirmation"]["attempts"] >= 2
    assert result["timedOut"] is False
