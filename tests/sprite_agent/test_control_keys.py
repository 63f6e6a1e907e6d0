"""A key is run at most once: who repeats it, at once or later, after a restart or a kill, gets what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprite_agent import control
from sprite_agent.contract.requests import check_request, fingerprint
from sprite_agent.control_results import executing_result
from sprite_agent.errors import ControlBusy, ControlNotFound, IdempotencyKeyReused, OpsError
from sprite_agent.journal import Journal
from sprite_agent.repo import Repo
from sprite_agent.state_folder import StateFolder
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.runtime import LOOKS_ONCE, SKIPS, WAITS, executions, request, script, this_python_first, turn
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlResult

    MakeRepo = Callable[..., Repo]

AGENT = """
import json, sys
from pathlib import Path
from sprite_agent.repo import Repo

repo = Repo(Path(sys.argv[1]), state_folder=Path(sys.argv[2]), runtime=sys.argv[3])
print(json.dumps(repo.execute(json.loads(sys.argv[4])) if len(sys.argv) > 4 else repo.recover()))
"""
"""A process of its own that runs a request, or without one recovers."""


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


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A file in which scripts leave a line when they start and when they end."""
    marks = tmp_path / "marks"
    marks.touch()
    return marks


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """What a gated command waits at until something is written to it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    yield gate
    # Lets through whoever still waits; nobody may.
    with contextlib.suppress(OSError):
        os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def gated(tmp_path: Path, marks: Path, gate: Path) -> str:
    """A runtime that waits at the gate."""
    return script(tmp_path / "gated", f"echo began >> {marks}; read line < {gate}; echo ended >> {marks}")


def again(result: ControlResult) -> ControlResult:
    """The result as it is answered later."""
    return {**result, "replayed": True}


def state_of(repo: Repo, key: str = "key-1") -> str | None:
    """How far a key has got."""
    try:
        return repo.get_control(LOOP, key)["state"]
    except ControlNotFound:
        return None


# Asked again.


@pytest.mark.parametrize("intent", ["approve", "reject", "cancel"])
def test_a_key_asked_again_is_answered_without_running_it(repo: Repo, loop: LoopFiles, intent: str) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    first = repo.execute(request(intent))

    assert first["replayed"] is False
    assert repo.execute(request(intent)) == again(first)
    assert repo.get_control(LOOP, "key-1") == again(first)
    assert len(executions(loop)) == 1


def test_a_key_asked_again_after_a_restart_is_answered_without_running_it(make_repo: MakeRepo, loop: LoopFiles) -> None:
    first = make_repo().execute(request())

    later = make_repo()
    later.recover()

    assert later.get_control(LOOP, "key-1") == again(first)
    assert later.execute(request()) == again(first)
    assert len(executions(loop)) == 1


def test_an_answer_needs_neither_runtime_nor_loop(make_repo: MakeRepo, loop: LoopFiles) -> None:
    first = make_repo().execute(request())
    shutil.rmtree(loop.folder)

    assert make_repo(None).execute(request()) == again(first)


def test_a_key_nobody_has_used_is_not_found(repo: Repo) -> None:
    with pytest.raises(ControlNotFound, match="nothing was run for it") as missing:
        repo.get_control(LOOP, "key-1")

    assert missing.value.details == {"loopId": LOOP, "idempotencyKey": "key-1"}


def test_a_key_is_scoped_by_its_loop(repo: Repo, loop: LoopFiles) -> None:
    shutil.copytree(loop.folder, loop.folder.parent / "other")

    first = repo.execute(request())
    second = repo.execute(request(loopId="other"))

    assert (first["replayed"], second["replayed"]) == (False, False)
    assert second["journal"]["sequence"] == first["journal"]["sequence"] + 1
    assert len(executions(loop)) == 2


MEANING: dict[str, dict[str, Any]] = {
    "intent": {"intent": "reject"},
    "requestedBy": {"requestedBy": "eve"},
    "note": {"note": "other"},
    "expectedRunId": {"expectedRunId": "run-2"},
    "expectedIteration": {"expectedIteration": 2},
    "expectedApprovalDigest": {"expectedApprovalDigest": "0" * 64},
    "mode": {"confirmation": {**SKIPS, "requiredEffect": "decision_recorded"}},
    "requiredEffect": {"confirmation": {**LOOKS_ONCE, "requiredEffect": "completed"}},
    "confirmation": {"confirmation": {"mode": "wait"}},
}
"""For each part of a request's meaning another value than in `full`."""


def full(loop: LoopFiles) -> dict[str, Any]:
    """A request with everything in it."""
    digest = str(
        Repo(loop.repo, state_folder=loop.repo.with_name("none"), runtime=None)
        .read_loop(LOOP)
        .snapshot["artifacts"]["approval"]["sha256"]
    )
    return request(
        note="why",
        expectedRunId="run-1",
        expectedIteration=1,
        expectedApprovalDigest=digest,
        confirmation={**LOOKS_ONCE, "requiredEffect": "decision_recorded"},
        traceId="trace-1",
        provenance={"managerId": "m", "host": "h", "attempt": 1},
    )


@pytest.mark.parametrize("other", MEANING.values(), ids=MEANING.keys())
def test_a_key_used_for_another_request_is_refused_and_not_run(
    repo: Repo, loop: LoopFiles, other: dict[str, Any]
) -> None:
    document = full(loop)
    first = repo.execute(document)

    with pytest.raises(IdempotencyKeyReused) as refused:
        repo.execute({**document, **other})

    assert refused.value.details == {"idempotencyKey": "key-1", "loopId": LOOP}
    assert refused.value.executed is False
    assert len(executions(loop)) == 1
    assert repo.get_control(LOOP, "key-1") == again(first)


@pytest.mark.parametrize("left_out", ["note", "expectedRunId", "expectedIteration", "expectedApprovalDigest"])
def test_a_key_used_for_a_request_that_says_less_is_refused(repo: Repo, loop: LoopFiles, left_out: str) -> None:
    document = full(loop)
    repo.execute(document)

    with pytest.raises(IdempotencyKeyReused):
        repo.execute({name: value for name, value in document.items() if name != left_out})


@pytest.mark.parametrize(
    "other",
    [
        {"traceId": "trace-2"},
        {"provenance": {"managerId": "other", "host": "other", "attempt": 2}},
        {"confirmation": {"mode": "wait", "timeoutSeconds": 5, "requiredEffect": "decision_recorded"}},
        {"confirmation": {"requiredEffect": "decision_recorded", "mode": "wait"}},
    ],
    ids=["traceId", "provenance", "timeoutSeconds", "no timeout"],
)
def test_a_key_used_for_the_same_request_in_another_way_is_answered(
    repo: Repo, loop: LoopFiles, other: dict[str, Any]
) -> None:
    document = full(loop)
    first = repo.execute(document)

    assert repo.execute({**document, **other}) == again(first)
    assert len(executions(loop)) == 1


@pytest.mark.parametrize("left_out", ["traceId", "provenance"])
def test_a_key_used_for_the_same_request_with_less_around_it_is_answered(
    repo: Repo, loop: LoopFiles, left_out: str
) -> None:
    document = full(loop)
    first = repo.execute(document)

    assert repo.execute({name: value for name, value in document.items() if name != left_out}) == again(first)


def test_a_confirmation_that_is_not_given_is_to_wait_for_completion() -> None:
    plain = request()
    del plain["confirmation"]

    assert fingerprint(check_request(plain)) == fingerprint(check_request(request(confirmation={"mode": "wait"})))
    explicit = {"mode": "wait", "timeoutSeconds": 30, "requiredEffect": "completed"}
    assert fingerprint(check_request(plain)) == fingerprint(check_request(request(confirmation=explicit)))


# Asked at once.


def patient(repo: Repo, document: dict[str, Any]) -> ControlResult:
    """Asks until it is not told to come back later."""
    while True:
        try:
            return repo.execute(document)
        except ControlBusy as busy:
            time.sleep((busy.retry_after or 0) / 20)


def test_a_key_asked_by_sixteen_at_once_is_run_once_and_all_get_its_result(repo: Repo, loop: LoopFiles) -> None:
    turn(loop, sleep_before=0.1)
    together = threading.Barrier(16)

    def ask(_: int) -> ControlResult:
        together.wait()
        return patient(repo, request("reject", confirmation=WAITS))

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(ask, range(16)))

    assert len(executions(loop)) == 1
    assert sorted(result["replayed"] for result in results) == [False] + [True] * 15
    assert all(again(result) == again(results[0]) for result in results)
    assert results[0]["status"] == "confirmed"


def test_a_key_asked_by_several_processes_at_once_is_run_once(loop: LoopFiles, state: Path) -> None:
    turn(loop, sleep_before=0.2)
    words = [sys.executable, "-c", AGENT, str(loop.repo), str(state), str(STANDIN)]
    with contextlib.ExitStack() as started:
        processes = [
            started.enter_context(
                subprocess.Popen([*words, json.dumps(request("reject", confirmation=WAITS))], stdout=subprocess.PIPE)
            )
            for _ in range(3)
        ]
        results = [json.loads(process.communicate(timeout=20)[0]) for process in processes]

    assert len(executions(loop)) == 1
    assert sorted(result["replayed"] for result in results) == [False, True, True]
    assert all(again(result) == again(results[0]) for result in results)


def test_who_asks_while_the_command_runs_waits_for_its_result(
    make_repo: MakeRepo, gated: str, gate: Path, marks: Path
) -> None:
    repo = make_repo(gated)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(repo.execute, request(confirmation=SKIPS))
        until(lambda: state_of(repo) == "executing", "the command runs")
        second = pool.submit(repo.execute, request(confirmation=SKIPS))
        gate.write_text("go\n")

        assert second.result() == again(first.result())
    assert marks.read_text().split() == ["began", "ended"]


def test_who_asks_while_the_command_runs_is_told_to_come_back_at_the_deadline(
    make_repo: MakeRepo, gated: str, gate: Path, marks: Path
) -> None:
    repo = make_repo(gated)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(repo.execute, request(confirmation=SKIPS))
        until(lambda: state_of(repo) == "executing", "the command runs")

        with pytest.raises(ControlBusy, match="still being worked on; ask again with the same key"):
            repo.execute(request(confirmation=SKIPS), deadline=time.monotonic() + 0.1)

        gate.write_text("go\n")
        assert repo.execute(request(confirmation=SKIPS)) == again(first.result())
    assert first.result()["status"] == "executed_unconfirmed"
    assert marks.read_text().split() == ["began", "ended"]


def another_request(repo: Repo, _: MakeRepo, __: list[str]) -> None:
    with pytest.raises(IdempotencyKeyReused):
        repo.execute(request("reject", note="another", confirmation=WAITS))


def a_short_deadline(repo: Repo, _: MakeRepo, __: list[str]) -> None:
    with pytest.raises(ControlBusy):
        repo.execute(request("reject", confirmation=WAITS), deadline=0.0)


def a_look(repo: Repo, _: MakeRepo, __: list[str]) -> None:
    assert repo.get_control(LOOP, "key-1")["state"] == "executed"


def recovery(repo: Repo, _: MakeRepo, __: list[str]) -> None:
    repo.recover()


def a_look_through_another_repo_object(_: Repo, make_repo: MakeRepo, __: list[str]) -> None:
    make_repo().get_control(LOOP, "key-1")


def recovery_through_another_repo_object(_: Repo, make_repo: MakeRepo, __: list[str]) -> None:
    make_repo().recover()


def recovery_in_another_process(_: Repo, __: MakeRepo, words: list[str]) -> None:
    subprocess.run([sys.executable, "-c", AGENT, *words], check=True, timeout=20, capture_output=True)


@pytest.mark.parametrize(
    "disturb",
    [
        another_request,
        a_short_deadline,
        a_look,
        recovery,
        a_look_through_another_repo_object,
        recovery_through_another_repo_object,
        recovery_in_another_process,
    ],
)
def test_nobody_ends_a_key_that_its_caller_still_works_on(
    make_repo: MakeRepo, loop: LoopFiles, state: Path, tmp_path: Path, disturb: Callable[..., None]
) -> None:
    runtime = script(tmp_path / "superloop", "exit 0")
    repo = make_repo(runtime)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(repo.execute, request("reject", confirmation=WAITS))
        until(lambda: state_of(repo) == "executed", "the effect is being looked for")
        try:
            disturb(repo, make_repo, [str(loop.repo), str(state), runtime])
            seen = repo.get_control(LOOP, "key-1")
        finally:
            loop.ask_approval(status="rejected")
        result = asked.result()

    assert (seen["state"], seen["status"]) == ("executed", None)
    assert (result["status"], result["reason"]) == ("confirmed", "rejection_observed")
    assert repo.get_control(LOOP, "key-1") == again(result)


# Killed.


@pytest.fixture
def agent(loop: LoopFiles, state: Path) -> Iterator[Callable[[str, dict[str, Any]], subprocess.Popen[bytes]]]:
    """Starts an agent's process that runs a request with a runtime."""
    with contextlib.ExitStack() as started:

        def start(runtime: str, document: dict[str, Any]) -> subprocess.Popen[bytes]:
            words = [sys.executable, "-c", AGENT, str(loop.repo), str(state), runtime, json.dumps(document)]
            process = started.enter_context(subprocess.Popen(words))
            started.callback(process.kill)
            return process

        yield start


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process as the kernel would."""
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)


Recover = dict[str, "Callable[[Repo], Any]"]
RECOVER: Recover = {
    "recovery": lambda repo: repo.recover(),
    "a look": lambda repo: repo.get_control(LOOP, "key-1"),
    "the same request": lambda repo: repo.execute(request(confirmation=WAITS)),
}


@pytest.mark.parametrize("recover", RECOVER.values(), ids=RECOVER.keys())
def test_a_key_whose_agent_was_killed_while_the_command_ran_is_ended_and_never_run_again(
    make_repo: MakeRepo, agent: Any, *, gated: str, gate: Path, marks: Path, recover: Callable[[Repo], Any]
) -> None:
    process = agent(gated, request(confirmation=WAITS))
    until(lambda: marks.read_text() == "began\n", "the command runs")
    kill(process)
    gate.write_text("go\n")
    until(lambda: marks.read_text() == "began\nended\n", "the command has ended")

    repo = make_repo(gated)
    recover(repo)

    result = repo.get_control(LOOP, "key-1")
    assert (result["state"], result["status"], result["reason"]) == ("done", "ambiguous", "interrupted")
    assert (result["executed"], result["exitCode"], result["replayed"]) == (True, None, True)
    assert result["finishedAt"] is not None
    assert repo.execute(request(confirmation=WAITS)) == result
    assert marks.read_text() == "began\nended\n"


@pytest.mark.parametrize("recover", RECOVER.values(), ids=RECOVER.keys())
def test_a_key_whose_agent_was_killed_while_it_looked_for_the_effect_is_ended_with_what_was_known(
    make_repo: MakeRepo, loop: LoopFiles, agent: Any, recover: Callable[[Repo], Any]
) -> None:
    turn(loop, skip_effect=True, output="done\n")
    repo = make_repo()
    process = agent(str(STANDIN), request(confirmation=WAITS))
    until(lambda: state_of(repo) == "executed", "the effect is looked for")
    kill(process)

    recover(repo)

    result = repo.get_control(LOOP, "key-1")
    assert (result["state"], result["status"], result["reason"]) == ("done", "ambiguous", "interrupted")
    assert (result["executed"], result["exitCode"], result["output"]) == (True, 0, "done\n")
    assert len(executions(loop)) == 1


def test_while_the_command_of_a_killed_agent_still_runs_no_other_is_started(
    make_repo: MakeRepo,
    agent: Any,
    *,
    gated: str,
    gate: Path,
    marks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "LANE_WAIT", 0.2)
    process = agent(gated, request(confirmation=SKIPS))
    until(lambda: marks.read_text() == "began\n", "the command runs")
    kill(process)

    repo = make_repo(script(tmp_path / "other", f"echo another >> {marks}"))
    try:
        with pytest.raises(ControlBusy):
            repo.execute(request(idempotencyKey="key-2", confirmation=SKIPS))
    finally:
        gate.write_text("go\n")
        until(lambda: "ended" in marks.read_text(), "the command has ended")

    assert marks.read_text() == "began\nended\n"


@pytest.mark.parametrize(("exit_code", "executed"), [(7, True), (None, False)])
def test_a_key_whose_agent_was_killed_when_the_command_was_known_to_have_failed_is_ended_as_failed(
    repo: Repo, loop: LoopFiles, state: Path, *, exit_code: int | None, executed: bool
) -> None:
    StateFolder(state, loop.repo).make()
    document = check_request(request())
    journal = Journal(state / "journal.sqlite3")
    result = journal.begin(document, fingerprint(document), "gone:1:1", executing_result(document, ["superloop"]))
    journal.record({**result, "state": "executed", "exitCode": exit_code, "executed": executed})
    journal.close()

    found = repo.get_control(LOOP, "key-1")

    assert (found["status"], found["reason"]) == ("failed_command", "command_failed")
    assert (found["exitCode"], found["executed"]) == (exit_code, executed)


def test_recovery_leaves_for_later_what_it_cannot_finish_while_another_process_runs_a_command(
    repo: Repo, loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LANE_WAIT", 0.1)
    folder = StateFolder(state, loop.repo)
    folder.make()
    document = check_request(request())
    journal = Journal(folder.journal)
    journal.begin(document, fingerprint(document), "gone:1:1", executing_result(document, ["superloop"]))
    journal.close()

    with folder.lane(0):
        repo.recover()

    assert repo.get_control(LOOP, "key-1")["reason"] == "interrupted"


def test_recovery_leaves_what_is_done_as_it_is(make_repo: MakeRepo, loop: LoopFiles) -> None:
    first = make_repo().execute(request())
    later = make_repo()

    later.recover()

    assert later.get_control(LOOP, "key-1") == again(first)
    assert len(executions(loop)) == 1


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_key_is_run_at_most_once_whenever_the_agent_is_killed(
    make_repo: MakeRepo, loop: LoopFiles, agent: Any, moment: float
) -> None:
    turn(loop, sleep_after=0.1)
    process = agent(str(STANDIN), request("reject", confirmation=WAITS))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.15 + moment)
    kill(process)
    before = len(executions(loop))

    result = patient(make_repo(), request("reject", confirmation=WAITS))

    assert result["state"] == "done"
    assert len(executions(loop)) <= 1
    assert result["executed"]
    assert result["replayed"] or before == 0


def test_an_error_means_that_this_attempt_ran_nothing(make_repo: MakeRepo, loop: LoopFiles) -> None:
    repo = make_repo()
    documents = [
        request(expectedRunId="run-2"),
        request(loopId="other"),
        request(loopId="../x"),
        request(note="\n"),
        request(idempotencyKey=""),
    ]
    for document in documents:
        with pytest.raises(OpsError) as refused:
            repo.execute(document)
        assert refused.value.executed is False

    assert executions(loop) == []
    assert cast("dict[str, Any]", repo.execute(request()))["executed"]
