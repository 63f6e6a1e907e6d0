"""An intent is run by the runtime's command, and its result says what is known of the effect."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent import control
from sprite_agent.command import run_command
from sprite_agent.contract.validation import violations
from sprite_agent.control import MAX_CONTROLS
from sprite_agent.errors import (
    ActorInvalid,
    ApprovalNotPending,
    ControlBusy,
    ControlNotFound,
    IdempotencyKeyInvalid,
    IdempotencyKeyMissing,
    IntentUnsupported,
    InternalError,
    LoopIdInvalid,
    NoteInvalid,
    OpsError,
    RequestInvalid,
    RequestRefused,
    RuntimeMissing,
)
from sprite_agent.processes import pid_is_alive
from sprite_agent.repo import Repo
from sprite_agent.state_folder import StateFolder
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.runtime import LOOKS_ONCE, SKIPS, WAITS, executions, request, run, script, this_python_first, turn
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlResult

    MakeRepo = Callable[..., Repo]


LOOKS_INTO_THE_JOURNAL = """
import sqlite3

rows = sqlite3.connect(f"file:{state}/journal.sqlite3?mode=ro", uri=True).execute(
    "SELECT state, idempotency_key, json_extract(result, '$.command[1]') FROM control")
with open(found, "w") as file:
    file.write(repr(rows.fetchall()))
"""
"""A command that finds out what the journal has at its start."""


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    """A loop that waits for approval."""
    loop = LoopFiles(tmp_path / "repo")
    loop.append(line(event("approval_requested")))
    loop.ask_approval()
    return loop


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def make_repo(loop: LoopFiles, state: Path) -> Iterator[MakeRepo]:
    """Makes the repo, with the stand-in for its runtime unless told otherwise."""
    made: list[Repo] = []

    def make(runtime: str | None = str(STANDIN)) -> Repo:
        made.append(Repo(loop.repo, state_folder=state, runtime=runtime))
        return made[-1]

    yield make
    for repo in made:
        repo.close()


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo()


def approval(loop: LoopFiles) -> dict[str, Any]:
    return dict(json.loads(loop.approval.read_bytes()))


def check_result(result: ControlResult) -> None:
    assert violations("control_result", result) == []


# What becomes of an intent.


def test_an_approve_is_recorded_by_the_runtime_and_ambiguous_until_a_run_consumes_it(
    repo: Repo, loop: LoopFiles
) -> None:
    result = repo.execute(request(note="well done", traceId="trace-1", confirmation=LOOKS_ONCE))

    check_result(result)
    assert {**result, "startedAt": "", "finishedAt": "", "journal": {}, "confirmation": {}} == {
        "schemaVersion": "v1",
        "envelopeType": "control_result",
        "traceId": "trace-1",
        "loopId": LOOP,
        "intent": "approve",
        "requestedBy": "ada",
        "note": "well done",
        "idempotencyKey": "key-1",
        "state": "done",
        "status": "ambiguous",
        "reason": "timeout",
        "detail": "decision recorded; no active run to consume it: start the run again",
        "effect": "decision_recorded",
        "executed": True,
        "replayed": False,
        "command": [
            *(str(STANDIN), "approve", "--repo", str(loop.repo), "--loop", LOOP),
            *("--by", "ada", "--note", "well done"),
        ],
        "exitCode": 0,
        "timedOut": False,
        "output": "approved by ada\n",
        "startedAt": "",
        "finishedAt": "",
        "confirmation": {},
        "journal": {},
    }
    assert approval(loop)["decision"]["by"] == "ada"
    assert approval(loop)["decision"]["note"] == "well done"
    assert [execution["argv"][1:] for execution in executions(loop)] == [result["command"][1:]]


def test_the_confirmation_record_says_what_was_looked_for_and_seen(repo: Repo) -> None:
    record = repo.execute(request())["confirmation"]

    assert record is not None
    assert {**record, "observedAt": ""} == {
        "intent": "approve",
        "confirmed": False,
        "reason": "timeout",
        "attempts": 1,
        "timeoutSeconds": 0,
        "observedStatus": "unknown",
        "observedLastEvent": "approval_decision",
        "observedApprovalStatus": "approved",
        "observedActive": None,
        "observedAt": "",
    }


def test_an_approve_is_confirmed_by_the_decision_where_that_is_what_was_asked_for(repo: Repo) -> None:
    result = repo.execute(request(confirmation={**WAITS, "requiredEffect": "decision_recorded"}))

    check_result(result)
    assert (result["status"], result["reason"], result["effect"]) == (
        "confirmed",
        "decision_observed",
        "decision_recorded",
    )
    assert result["confirmation"] is not None
    assert result["confirmation"]["confirmed"]


def test_an_approve_is_confirmed_by_the_completion_when_the_run_is_started_again_meanwhile(
    repo: Repo, loop: LoopFiles
) -> None:
    loop.approval.unlink()
    run(loop)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(repo.execute, request(confirmation=WAITS))
        until(lambda: approval(loop)["status"] == "approved", "the decision is recorded")
        run(loop)
        result = asked.result()

    check_result(result)
    assert (result["status"], result["reason"], result["effect"]) == ("confirmed", "completion_observed", "completed")
    assert result["confirmation"] is not None
    assert result["confirmation"]["observedStatus"] == "complete"


def test_a_reject_is_confirmed_when_it_is_recorded(repo: Repo, loop: LoopFiles) -> None:
    result = repo.execute(request("reject", note="not yet", confirmation=WAITS))

    check_result(result)
    assert (result["status"], result["reason"], result["effect"]) == ("confirmed", "rejection_observed", "completed")
    assert approval(loop)["status"] == "rejected"
    assert executions(loop)[0]["argv"][-3:] == ["--reject", "--note", "not yet"]


def test_a_cancel_stops_the_run_and_is_confirmed_when_nothing_is_active(
    repo: Repo, loop: LoopFiles, tmp_path: Path
) -> None:
    loop.approval.unlink()
    command = [str(STANDIN), "run", "--repo", str(loop.repo), "--loop", LOOP, "--hang"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as running:
        until(lambda: b"role_start" in loop.log.read_bytes(), "the run is in the middle of its first iteration")
        assert repo.read_loop(LOOP).snapshot["run"]["status"] == "running"

        result = repo.execute(request("cancel", confirmation=WAITS))

        assert running.wait(timeout=5) == -15
    check_result(result)
    assert (result["status"], result["reason"], result["effect"]) == ("confirmed", "inactive_not_running", "completed")
    assert not loop.state.exists()


def test_a_cancel_without_effect_is_ambiguous(repo: Repo, loop: LoopFiles) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    turn(loop, skip_effect=True)

    result = repo.execute(request("cancel"))

    assert (result["status"], result["reason"], result["effect"]) == ("ambiguous", "timeout", "none")
    assert result["detail"] == "the loop is still awaiting_approval, active True"


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_a_decision_without_effect_is_ambiguous(repo: Repo, loop: LoopFiles, intent: str) -> None:
    turn(loop, skip_effect=True)

    result = repo.execute(request(intent))

    assert (result["status"], result["reason"], result["effect"]) == ("ambiguous", "timeout", "none")
    assert result["detail"] == "the decision does not show: approval status pending, last event approval_requested"


@pytest.mark.parametrize("intent", ["approve", "reject", "cancel"])
def test_without_a_confirmation_the_result_says_only_that_it_ran(repo: Repo, loop: LoopFiles, intent: str) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})

    result = repo.execute(request(intent, confirmation=SKIPS))

    check_result(result)
    assert (result["status"], result["reason"]) == ("executed_unconfirmed", "confirmation_skipped")
    assert (result["effect"], result["confirmation"], result["executed"]) == ("none", None, True)


@pytest.mark.parametrize("note", ["--reject", "--approve", "-", "--by=eve", "; rm -rf /", "$(id)", "é 日本 👩‍🚀"])
def test_a_note_is_a_note_whatever_it_looks_like(repo: Repo, loop: LoopFiles, note: str) -> None:
    repo.execute(request(note=note))

    assert approval(loop)["status"] == "approved"
    assert approval(loop)["decision"]["note"] == note
    assert approval(loop)["decision"]["by"] == "ada"


def test_whoever_asks_is_taken_by_their_word_whatever_it_looks_like(repo: Repo, loop: LoopFiles) -> None:
    repo.execute(request(requestedBy="--reject"))

    assert (approval(loop)["status"], approval(loop)["decision"]["by"]) == ("approved", "--reject")


# What becomes of a command.


def test_a_command_that_fails_is_reported_with_its_exit_code_and_output(repo: Repo, loop: LoopFiles) -> None:
    turn(loop, exit_code=7, output="no such thing\n", skip_effect=True)

    result = repo.execute(request(confirmation=WAITS))

    check_result(result)
    assert (result["state"], result["status"], result["reason"]) == ("done", "failed_command", "command_failed")
    assert (result["executed"], result["exitCode"], result["output"]) == (True, 7, "no such thing\n")
    assert (result["detail"], result["confirmation"]) == ("the command exited with 7", None)
    assert repo.execute(request(confirmation=WAITS)) == {**result, "replayed": True}
    assert len(executions(loop)) == 1


def test_a_command_that_cannot_be_started_is_reported_as_not_executed(make_repo: MakeRepo, tmp_path: Path) -> None:
    broken = tmp_path / "superloop"
    broken.write_bytes(b"\0\0")
    broken.chmod(0o755)
    repo = make_repo(str(broken))

    result = repo.execute(request())

    check_result(result)
    assert (result["status"], result["reason"], result["executed"]) == ("failed_command", "command_failed", False)
    assert (result["exitCode"], result["detail"]) == (None, "the command could not be started")
    assert repo.get_control(LOOP, "key-1") == {**result, "replayed": True}


@pytest.mark.parametrize("runtime", [None, "gone", "."])
def test_without_a_runtime_nothing_is_recorded(make_repo: MakeRepo, tmp_path: Path, runtime: str | None) -> None:
    repo = make_repo(runtime and str(tmp_path / runtime))

    with pytest.raises(RuntimeMissing):
        repo.execute(request())
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, "key-1")


def test_a_command_over_its_time_is_reported_as_ended(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn(loop, sleep_before=1000, ignore_sigterm=True)
    monkeypatch.setattr(control, "run_command", functools.partial(run_command, timeout=1.0))

    result = repo.execute(request())

    check_result(result)
    assert (result["status"], result["timedOut"], result["exitCode"]) == ("failed_command", True, -9)
    assert result["detail"] == "the command ran over its time limit and was ended"
    assert not pid_is_alive(executions(loop)[0]["pid"])


def test_of_a_long_output_the_end_is_kept(repo: Repo, loop: LoopFiles) -> None:
    turn(loop, output_bytes=3_000_000)

    result = repo.execute(request())

    assert result["output"] == "x" * 8192


def test_the_command_is_given_nothing_of_the_agents(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "secret")

    repo.execute(request())

    (execution,) = executions(loop)
    assert set(execution["env_keys"]) <= {"PATH", "HOME", "LANG"}
    assert (execution["cwd"], execution["stdin_is_tty"]) == ("/", False)


def test_the_row_is_there_before_the_command_starts(make_repo: MakeRepo, state: Path, tmp_path: Path) -> None:
    found = tmp_path / "found"
    program = f"state, found = {str(state)!r}, {str(found)!r}\n{LOOKS_INTO_THE_JOURNAL}"
    repo = make_repo(script(tmp_path / "superloop", program, interpreter=sys.executable))

    repo.execute(request())

    assert found.read_text() == "[('executing', 'key-1', 'approve')]"


# While the effect is looked for.


def test_a_loop_that_cannot_be_read_afterwards_makes_the_result_ambiguous(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    repo = make_repo(script(tmp_path / "superloop", f"rm {loop.log}"))

    result = repo.execute(request(confirmation={"mode": "wait", "timeoutSeconds": 0.3}))

    check_result(result)
    assert (result["status"], result["reason"], result["effect"]) == ("ambiguous", "timeout", "none")
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
        until(lambda: repo_state(repo) == "executed", "the command has ended")
        path.unlink()
        result = asked.result()

    assert (result["status"], result["reason"]) == ("confirmed", "inactive_not_running")


def repo_state(repo: Repo) -> str | None:
    """How far the key has got."""
    try:
        return repo.get_control(LOOP, "key-1")["state"]
    except ControlNotFound:
        return None


def test_what_was_so_before_the_command_does_not_confirm_it(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize({"completion_ok": True})
    loop.append(line(event("loop_complete")))
    turn(loop, skip_effect=True)

    result = repo.execute(request())

    assert (result["status"], result["effect"]) == ("ambiguous", "none")


def test_another_decision_than_the_one_asked_for_does_not_confirm_it(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    approved = json.dumps({"status": "approved"})
    repo = make_repo(script(tmp_path / "superloop", f"printf '%s' '{approved}' > {loop.approval}"))

    result = repo.execute(request("reject"))

    assert (result["status"], result["effect"]) == ("ambiguous", "none")


# What cannot be recorded.


@pytest.mark.parametrize(
    "damage",
    ["printf 'not a database, and long enough to be seen as none of those: %500s' x > {journal}", "rm {journal}"],
    ids=["overwritten", "removed"],
)
def test_a_command_that_ran_and_could_not_be_recorded_is_never_said_not_to_have_run(
    make_repo: MakeRepo, state: Path, tmp_path: Path, damage: str
) -> None:
    ran = tmp_path / "ran"
    journal = state / "journal.sqlite3"
    repo = make_repo(script(tmp_path / "superloop", f"touch {ran}; {damage.format(journal=journal)}"))

    found: OpsError | None = None
    try:
        executed: bool | None = repo.execute(request())["executed"]
    except OpsError as error:
        found, executed = error, error.executed

    assert ran.exists()
    assert executed is not False
    assert found is None or isinstance(found, InternalError)


# One at a time.


def test_commands_of_different_keys_run_one_after_the_other(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    repo = make_repo(script(tmp_path / "superloop", f"echo begin >> {marks}; sleep 0.1; echo end >> {marks}"))
    other = make_repo(str(tmp_path / "superloop"))
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(which.execute, request(idempotencyKey=f"key-{number}", confirmation=SKIPS))
            for number, which in enumerate([repo, other, repo, other])
        ]
        assert {each.result()["status"] for each in asked} == {"executed_unconfirmed"}

    assert marks.read_text().split() == ["begin", "end"] * 4


def test_of_an_approve_and_a_reject_at_once_one_is_run_and_the_other_refused(repo: Repo, loop: LoopFiles) -> None:
    turn(loop, sleep_before=0.2)
    together = threading.Barrier(2)

    def ask(intent: str) -> str:
        together.wait()
        try:
            return repo.execute(request(intent, idempotencyKey=intent, confirmation=SKIPS))["status"] or ""
        except ApprovalNotPending:
            return "refused"

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(ask, ["approve", "reject"]))

    assert sorted(found) == ["executed_unconfirmed", "refused"]
    assert len(executions(loop)) == 1


def test_while_another_process_runs_a_command_control_is_busy_and_nothing_is_recorded(
    repo: Repo, loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LANE_WAIT", 0.1)

    with StateFolder(state, loop.repo).lane(0), pytest.raises(ControlBusy) as busy:
        repo.execute(request())

    assert (busy.value.retryable, busy.value.retry_after, busy.value.executed) == (True, 1.0, False)
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, "key-1")
    assert repo.execute(request())["executed"]


def test_more_controls_than_are_worked_on_at_once_are_busy(
    make_repo: MakeRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LANE_WAIT", 0.1)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    repo = make_repo(script(tmp_path / "superloop", f"read line < {gate}"))
    with ThreadPoolExecutor(MAX_CONTROLS) as pool:
        first = pool.submit(repo.execute, request())
        until(lambda: repo_state(repo) == "executing", "the command runs")
        others = [pool.submit(repo.execute, request()) for _ in range(MAX_CONTROLS - 1)]
        try:
            until(lambda: is_busy(repo), "no more are taken on")
        finally:
            gate.write_text("go\n")
        assert [each.result()["replayed"] for each in [first, *others]] == [False] + [True] * (MAX_CONTROLS - 1)
    assert not is_busy(repo)


def is_busy(repo: Repo) -> bool:
    """Whether a control that would need no waiting is turned away."""
    try:
        repo.execute(request("cancel", idempotencyKey="key-2"), deadline=0.0)
    except ControlBusy as busy:
        return str(MAX_CONTROLS) in str(busy)
    return False


# What may be asked.


@pytest.mark.parametrize(
    ("members", "refusal"),
    [
        ({"loopId": ""}, LoopIdInvalid),
        ({"loopId": None}, LoopIdInvalid),
        ({"loopId": 3}, LoopIdInvalid),
        ({"intent": "stop"}, IntentUnsupported),
        ({"intent": ""}, IntentUnsupported),
        ({"intent": "APPROVE"}, IntentUnsupported),
        ({"intent": ["approve"]}, IntentUnsupported),
        ({"idempotencyKey": ""}, IdempotencyKeyMissing),
        ({"idempotencyKey": None}, IdempotencyKeyMissing),
        ({"idempotencyKey": "a b"}, IdempotencyKeyInvalid),
        ({"idempotencyKey": "key\n"}, IdempotencyKeyInvalid),
        ({"idempotencyKey": "k" * 129}, IdempotencyKeyInvalid),
        ({"idempotencyKey": "schlüssel"}, IdempotencyKeyInvalid),
        ({"idempotencyKey": 7}, IdempotencyKeyInvalid),
        ({"requestedBy": ""}, ActorInvalid),
        ({"requestedBy": None}, ActorInvalid),
        ({"requestedBy": "a\nb"}, ActorInvalid),
        ({"requestedBy": "a\0b"}, ActorInvalid),
        ({"requestedBy": "a" * 201}, ActorInvalid),
        ({"requestedBy": "\x7f"}, ActorInvalid),
        ({"requestedBy": "\x85"}, ActorInvalid),
        ({"requestedBy": "\u2028"}, ActorInvalid),
        ({"requestedBy": "\udcff"}, ActorInvalid),
        ({"note": ""}, NoteInvalid),
        ({"note": None}, NoteInvalid),
        ({"note": "a\nb"}, NoteInvalid),
        ({"note": "a\x1bb"}, NoteInvalid),
        ({"note": "a\0b"}, NoteInvalid),
        ({"note": "a" * 2001}, NoteInvalid),
        ({"note": "\udcff"}, NoteInvalid),
        ({"traceId": "t" * 257}, RequestInvalid),
        ({"confirmation": {}}, RequestInvalid),
        ({"confirmation": {"mode": "maybe"}}, RequestInvalid),
        ({"confirmation": {"mode": "wait", "timeoutSeconds": -1}}, RequestInvalid),
        ({"confirmation": {"mode": "wait", "timeoutSeconds": 121}}, RequestInvalid),
        ({"confirmation": {"mode": "wait", "requiredEffect": "none"}}, RequestInvalid),
        ({"provenance": {"managerId": "m"}}, RequestInvalid),
        ({"expectedRunId": ""}, RequestInvalid),
        ({"expectedIteration": -1}, RequestInvalid),
        ({"expectedIteration": "1"}, RequestInvalid),
        ({"expectedApprovalDigest": "A" * 64}, RequestInvalid),
        ({"unknown": 1}, RequestInvalid),
    ],
)
def test_a_request_that_is_none_is_refused_by_its_first_field_at_fault(
    repo: Repo, loop: LoopFiles, members: dict[str, Any], refusal: type[OpsError]
) -> None:
    with pytest.raises(refusal) as refused:
        repo.execute(request(**members))

    assert refused.value.violations
    assert executions(loop) == []


@pytest.mark.parametrize("missing", ["loopId", "intent", "requestedBy", "idempotencyKey"])
def test_a_request_that_lacks_a_field_is_refused_and_the_field_named(repo: Repo, loop: LoopFiles, missing: str) -> None:
    document = request()
    del document[missing]

    with pytest.raises(RequestRefused) as refused:
        repo.execute(document)
    assert missing in str(refused.value.violations)
    assert executions(loop) == []


def test_the_longest_note_and_name_and_key_are_taken(repo: Repo, loop: LoopFiles) -> None:
    document = request(note="👩" * 2000, requestedBy="é" * 200, idempotencyKey="k" * 128, traceId="t" * 256)

    assert repo.execute(document)["exitCode"] == 0
    assert approval(loop)["decision"]["note"] == "👩" * 2000
