"""An intent is run by the runtime's command, and its result says what is known of the effect."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent import repo as repo_module
from sprite_agent.contract.validation import violations
from sprite_agent.control import engine as control
from sprite_agent.control.engine import MAX_CONTROLS
from sprite_agent.control.executions import Executions
from sprite_agent.control.executors import EXECUTOR
from sprite_agent.errors import (
    ActorInvalid,
    ApprovalNotPending,
    ControlBusy,
    ControlNotFound,
    IdempotencyKeyInvalid,
    IdempotencyKeyMissing,
    IntentUnsupported,
    LoopIdInvalid,
    NoteInvalid,
    NotExecuted,
    RequestInvalid,
    RequestRefused,
    RuntimeMissing,
    RuntimeUntrusted,
)
from sprite_agent.repo import Repo
from support.repos import LOOP, STANDIN, put
from support.runtime import (
    LOOKS_ONCE,
    SKIPS,
    WAITS,
    again,
    commands,
    executions,
    made_folder,
    mark_in,
    patient,
    request,
    run,
    script,
    state_of,
    turn,
)
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.errors import OpsError
    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]


LOOKS_INTO_THE_JOURNAL = """
import sqlite3

rows = sqlite3.connect(f"file:{state}/journal.sqlite3?mode=ro", uri=True).execute(
    "SELECT state, idempotency_key, json_extract(result, '$.command[1]') FROM control")
with open(found, "w") as file:
    file.write(repr(rows.fetchall()))
"""
"""A command that finds out what the journal has at its start."""


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
    mark = mark_in(result)
    assert re.fullmatch(r"ada#[0-9a-f]{16}", mark)
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
            *("--by", mark, "--note", "well done"),
        ],
        "exitCode": 0,
        "timedOut": False,
        "output": f"approved by {mark}\n",
        "startedAt": "",
        "finishedAt": "",
        "confirmation": {},
        "journal": {},
    }
    assert approval(loop)["decision"]["by"] == mark
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
    # The documents are read just before the log, which can say in between that the run is complete.
    assert result["confirmation"]["observedStatus"] in {"complete", "idle", "running"}


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
    assert approval(loop)["decision"]["by"].startswith("ada#")


def test_whoever_asks_is_taken_by_their_word_whatever_it_looks_like(repo: Repo, loop: LoopFiles) -> None:
    repo.execute(request(requestedBy="--reject"))

    by, _, execution = approval(loop)["decision"]["by"].rpartition("#")
    assert (approval(loop)["status"], by, len(execution)) == ("approved", "--reject", 16)


# What becomes of a command.


def test_a_command_that_fails_is_reported_with_its_exit_code_and_output(repo: Repo, loop: LoopFiles) -> None:
    """I5: an answer, the same whenever it is asked for again, and no error to be retried."""
    turn(loop, exit_code=7, output="no such thing\n", skip_effect=True)

    result = repo.execute(request(confirmation=WAITS))

    check_result(result)
    assert (result["state"], result["status"], result["reason"]) == ("done", "failed_command", "command_failed")
    assert (result["executed"], result["exitCode"], result["output"]) == (True, 7, "no such thing\n")
    assert (result["detail"], result["effect"], result["confirmation"]) == ("the command exited with 7", "none", None)
    assert repo.execute(request(confirmation=WAITS)) == again(result)
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
    assert repo.get_control(LOOP, "key-1") == again(result)


@pytest.mark.parametrize("runtime", [None, "gone", "."])
def test_without_a_runtime_nothing_is_recorded(make_repo: MakeRepo, tmp_path: Path, runtime: str | None) -> None:
    repo = make_repo(runtime and str(tmp_path / runtime))

    with pytest.raises(RuntimeMissing):
        repo.execute(request())
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, "key-1")


def test_a_runtime_that_is_not_the_configured_file_is_not_run(loop: LoopFiles, state: Path) -> None:
    repo = Repo(loop.repo, state_folder=state, runtime=str(STANDIN), runtime_sha256="0" * 64)

    with pytest.raises(RuntimeUntrusted, match="is not the one that was configured"):
        repo.execute(request())
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, "key-1")
    repo.close()
    assert executions(loop) == []


def test_a_command_whose_executor_cannot_be_started_was_not_run_and_its_key_is_free(
    repo: Repo, loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprite_agent.control.executors.EXECUTOR", ("/nowhere/python",))

    with pytest.raises(NotExecuted) as error:
        repo.execute(request())
    assert (error.value.executed, error.value.retryable, error.value.retry_after) == (False, True, 1.0)
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, "key-1")
    assert list((state / "executions").iterdir()) == []
    monkeypatch.setattr("sprite_agent.control.executors.EXECUTOR", EXECUTOR)

    result = repo.execute(request())
    assert (result["executed"], result["replayed"], result["journal"]["sequence"]) == (True, False, 1)
    assert len(executions(loop)) == 1


def time_limit(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Has the repos made from now on end commands after so many seconds."""
    monkeypatch.setattr(repo_module, "Executions", functools.partial(Executions, timeout=seconds))


def test_a_command_over_its_time_is_reported_as_ended(
    make_repo: MakeRepo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I13: nothing is held for ever."""
    turn(loop, sleep_before=1000, ignore_sigterm=True)
    time_limit(monkeypatch, 1.0)

    result = make_repo().execute(request(confirmation=WAITS))

    check_result(result)
    assert (result["status"], result["timedOut"], result["exitCode"]) == ("failed_command", True, -9)
    assert result["detail"] == "the command ran over its time limit and was ended"
    repo = os.fsencode(loop.repo)  # it may not even have come to say that it was started
    assert not [words for _, words in commands() if repo in words]


def test_the_effect_of_a_command_over_its_time_counts(
    make_repo: MakeRepo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I13: its effect is looked for all the same."""
    turn(loop, sleep_after=1000, ignore_sigterm=True)
    time_limit(monkeypatch, 2.0)

    result = make_repo().execute(request("reject", confirmation=WAITS))

    check_result(result)
    assert (result["status"], result["reason"], result["timedOut"]) == ("confirmed", "rejection_observed", True)
    assert result["detail"] == (
        "PARTIAL_EFFECT: the effect shows, but the command ran over its time limit and was ended"
    )


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


# One at a time.


def test_commands_of_different_keys_run_one_after_the_other(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    repo = make_repo(script(tmp_path / "superloop", f"echo begin >> {marks}; sleep 0.1; echo end >> {marks}"))
    other = make_repo(str(tmp_path / "superloop"))
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(patient, which, request(idempotencyKey=f"key-{number}", confirmation=SKIPS))
            for number, which in enumerate([repo, other, repo, other])
        ]
        assert {each.result()["status"] for each in asked} == {"executed_unconfirmed"}

    assert marks.read_text().split() == ["begin", "end"] * 4


def test_of_an_approve_and_a_reject_at_once_one_is_run_and_the_other_refused(repo: Repo, loop: LoopFiles) -> None:
    """C1: the second finds the request decided, and nothing is spawned for it."""
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

    with made_folder(state, loop).lane(0), pytest.raises(ControlBusy) as busy:
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
        until(lambda: state_of(repo) == "executing", "the command runs")
        others = [pool.submit(repo.execute, request()) for _ in range(MAX_CONTROLS - 1)]
        try:
            until(lambda: is_busy(repo), "no more are taken on")
        finally:
            gate.write_text("go\n")
        assert [each.result()["replayed"] for each in [first, *others]] == [False] + [True] * (MAX_CONTROLS - 1)
    assert MAX_CONTROLS == 64
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
        ({"requestedAt": "yesterday"}, RequestInvalid),
        ({"requestedAt": "2026-01-02T03:04:05"}, RequestInvalid),
        ({"unknown": 1}, RequestInvalid),
    ],
)
def test_a_request_that_is_none_is_refused_by_its_first_field_at_fault(
    repo: Repo, loop: LoopFiles, members: dict[str, Any], refusal: type[OpsError]
) -> None:
    """I11, C8: a key is needed, and no line break gets into what is recorded."""
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
