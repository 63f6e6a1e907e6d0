"""A key whose agent was killed is looked into and finished, never run again; and free where it was provably not run."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprite_agent.control import engine as control
from sprite_agent.control import executor
from sprite_agent.control.evidence import take_baseline
from sprite_agent.control.executions import CommandOutcome
from sprite_agent.control.results import executed_result
from sprite_agent.errors import ControlBusy, InternalError
from support.journals import begun, opened
from support.repos import LOOP, STANDIN
from support.runtime import (
    AGENT,
    LOOKS_ONCE,
    SKIPS,
    WAITS,
    again,
    executions,
    made_folder,
    patient,
    request,
    script,
    state_of,
    turn,
)
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.control.journal_rows import Entry
    from sprite_agent.repo import Repo
    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo()


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


def settled(repo: Repo) -> ControlResult:
    """What has become of the key, once that is known."""
    until(lambda: state_of(repo) == "done", "the key is settled")
    return repo.get_control(LOOP, "key-1")


RECOVER: dict[str, Callable[[Repo], Any]] = {
    "recovery": lambda repo: repo.recover(),
    "the same request": lambda repo: repo.execute(request(confirmation=LOOKS_ONCE)),
}


@pytest.mark.parametrize("recover", RECOVER.values(), ids=RECOVER.keys())
def test_a_key_whose_agent_was_killed_while_the_command_ran_has_its_true_outcome_and_is_never_run_again(
    make_repo: MakeRepo, agent: Any, *, gated: str, gate: Path, marks: Path, recover: Callable[[Repo], Any]
) -> None:
    """I3: the command's executor outlives the agent, and records how it ended."""
    process = agent(gated, request(confirmation=LOOKS_ONCE))
    until(lambda: marks.read_text() == "began\n", "the command runs")
    kill(process)
    gate.write_text("go\n")
    until(lambda: marks.read_text() == "began\nended\n", "the command has ended")

    repo = make_repo(gated)
    recover(repo)

    result = settled(repo)
    assert (result["status"], result["reason"], result["effect"]) == ("ambiguous", "timeout", "none")
    assert (result["executed"], result["exitCode"], result["output"]) == (True, 0, "told\n")
    assert result["finishedAt"] is not None
    assert repo.execute(request(confirmation=LOOKS_ONCE)) == again(result)
    assert marks.read_text() == "began\nended\n"


@pytest.mark.parametrize("recover", RECOVER.values(), ids=RECOVER.keys())
def test_a_key_whose_agent_was_killed_while_it_looked_for_the_effect_is_looked_into_again(
    make_repo: MakeRepo, loop: LoopFiles, agent: Any, recover: Callable[[Repo], Any]
) -> None:
    turn(loop, skip_effect=True, output="done\n")
    repo = make_repo()
    process = agent(str(STANDIN), request("reject", confirmation={"mode": "wait", "timeoutSeconds": 1}))
    until(lambda: state_of(repo) == "executed", "the effect is looked for")
    kill(process)

    if recover is RECOVER["recovery"]:
        recover(repo)
    else:
        repo.execute(request("reject", confirmation=LOOKS_ONCE))

    result = settled(repo)
    assert (result["status"], result["reason"]) == ("ambiguous", "timeout")
    assert (result["executed"], result["exitCode"], result["output"]) == (True, 0, "done\n")
    assert len(executions(loop)) == 1


def test_an_effect_that_shows_after_its_agent_was_killed_is_confirmed_by_the_next_one(
    make_repo: MakeRepo, loop: LoopFiles, agent: Any
) -> None:
    turn(loop, sleep_before=0.3)
    repo = make_repo()
    process = agent(str(STANDIN), request("reject", confirmation=WAITS))
    until(lambda: executions(loop), "the command runs")
    kill(process)

    repo.recover()

    result = settled(repo)
    assert (result["status"], result["reason"], result["exitCode"]) == ("confirmed", "rejection_observed", 0)
    assert len(executions(loop)) == 1


def test_a_look_at_a_key_tells_how_far_it_has_got_and_changes_nothing(repo: Repo, loop: LoopFiles, state: Path) -> None:
    made_folder(state, loop)
    with opened(state) as journal:
        entry = begun(journal)

        assert repo.get_control(LOOP, "key-1") == again(entry.result)
        assert journal.find(LOOP, "key-1") == entry


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
        for key in ("key-2", "key-1"):
            with pytest.raises(ControlBusy):
                repo.execute(request(idempotencyKey=key, confirmation=SKIPS))
    finally:
        gate.write_text("go\n")
        until(lambda: "ended" in marks.read_text(), "the command has ended")

    assert marks.read_text() == "began\nended\n"
    assert patient(repo, request(confirmation=SKIPS))["status"] == "executed_unconfirmed"


# Left behind: rows as a killed agent leaves them, at each point of its way.


def left_behind(repo: Repo, state: Path, *, result: dict[str, Any] | None = None, **members: Any) -> Entry:
    """A row whose agent is gone, with another result if its command had ended."""
    baseline = take_baseline(repo.read_loop(LOOP)).document()
    with opened(state) as journal:
        entry = begun(journal, baseline=baseline, **members)
        return entry if result is None else journal.record(entry, cast("ControlResult", {**entry.result, **result}))


def folder_of(state: Path, entry: Entry) -> Path:
    """The folder of an execution."""
    folder = state / "executions" / entry.execution_id
    folder.mkdir(mode=0o700, parents=True)
    return folder


@pytest.mark.parametrize("far", ["no folder", "an empty folder", "a plan"])
def test_a_key_whose_command_was_provably_never_run_is_free_and_can_be_run(
    repo: Repo, loop: LoopFiles, state: Path, far: str
) -> None:
    entry = left_behind(repo, state)
    if far != "no folder":
        folder = folder_of(state, entry)
        if far == "a plan":
            (folder / "plan.json").write_text("{}")

    repo.recover()

    until(lambda: state_of(repo) is None, "the key is free")
    until(lambda: not any((state / "executions").glob("*")), "nothing is left of the execution")
    assert executions(loop) == []
    result = repo.execute(request("reject"))
    assert (result["status"], result["replayed"], result["journal"]["sequence"]) == ("confirmed", False, 1)
    assert len(executions(loop)) == 1


def test_a_key_that_is_free_is_run_by_the_very_call_that_found_it_so(repo: Repo, loop: LoopFiles, state: Path) -> None:
    left_behind(repo, state)

    result = repo.execute(request())

    assert (result["executed"], result["replayed"]) == (True, False)
    assert len(executions(loop)) == 1


def marked(folder: Path) -> None:
    (folder / "started").touch()


def of_another_process(folder: Path) -> None:
    (folder / "started").touch()
    (folder / "process").write_text(f"{2**22 + 1} (gone) S " + "1 " * 40)


@pytest.mark.parametrize("far", [marked, of_another_process])
def test_a_key_whose_command_may_have_run_is_looked_into_and_never_run_again(
    repo: Repo, loop: LoopFiles, state: Path, far: Callable[[Path], None]
) -> None:
    far(folder_of(state, left_behind(repo, state)))

    result = repo.execute(request())

    assert (result["status"], result["reason"], result["effect"]) == ("ambiguous", "interrupted", "none")
    assert (result["executed"], result["exitCode"]) == (True, None)
    assert result["detail"] == (
        "the command was interrupted: it may have run to its end or not; the decision does not show: approval status"
        " pending, last event approval_requested"
    )
    assert repo.execute(request()) == again(result)
    assert executions(loop) == []
    assert list((state / "executions").iterdir()) == []


def test_a_key_of_an_earlier_boot_may_have_run_whatever_is_left_of_it(repo: Repo, loop: LoopFiles, state: Path) -> None:
    """What tells that it was not run may be lost with the power."""
    left_behind(repo, state, boot_id="another boot")

    result = repo.execute(request())

    assert (result["status"], result["reason"], result["executed"]) == ("ambiguous", "interrupted", True)
    assert executions(loop) == []


def test_a_key_that_was_interrupted_after_its_effect_is_confirmed_by_the_mark(
    repo: Repo, loop: LoopFiles, state: Path
) -> None:
    entry = left_behind(repo, state, intent="reject")
    marked(folder_of(state, entry))
    loop.ask_approval(status="rejected", decision={"by": f"ada#{entry.execution_id}"})

    result = repo.execute(request("reject"))

    assert (result["status"], result["reason"], result["exitCode"]) == ("confirmed", "rejection_observed", None)
    assert result["detail"] is not None
    assert result["detail"].startswith("PARTIAL_EFFECT: the effect shows, but the command was interrupted")


def test_a_key_that_was_interrupted_is_not_confirmed_by_what_somebody_else_did(
    repo: Repo, loop: LoopFiles, state: Path
) -> None:
    """C11: sandbox code can decide under any name, and does not know the mark."""
    marked(folder_of(state, left_behind(repo, state, intent="reject")))
    loop.ask_approval(status="rejected", decision={"by": "ada#0123456789abcdef"})

    result = repo.execute(request("reject"))

    assert (result["status"], result["reason"]) == ("ambiguous", "interrupted")


@pytest.mark.parametrize(("exit_code", "executed"), [(7, True), (None, False)])
def test_a_key_whose_command_was_known_to_have_failed_is_ended_as_failed(
    repo: Repo, loop: LoopFiles, state: Path, *, exit_code: int | None, executed: bool
) -> None:
    entry = left_behind(repo, state)
    outcome = CommandOutcome(exit_code=exit_code, timed_out=False, output="no\n")
    with opened(state) as journal:
        journal.record(entry, executed_result(entry.result, outcome))

    found = repo.execute(request())

    assert (found["status"], found["reason"]) == ("failed_command", "command_failed")
    assert (found["exitCode"], found["executed"], found["output"]) == (exit_code, executed, "no\n")
    assert executions(loop) == []


def test_what_an_executor_has_recorded_is_the_outcome(repo: Repo, loop: LoopFiles, state: Path) -> None:
    folder = folder_of(state, left_behind(repo, state))
    marked(folder)
    (folder / "result.json").write_text('{"exitCode": 7, "timedOut": false, "output": "no\\n"}')

    result = repo.execute(request())

    assert (result["status"], result["exitCode"], result["output"]) == ("failed_command", 7, "no\n")
    assert executions(loop) == []


def test_a_key_that_was_run_is_finished_though_its_loop_is_gone(
    make_repo: MakeRepo, loop: LoopFiles, state: Path
) -> None:
    baseline = take_baseline(make_repo().read_loop(LOOP)).document()
    with opened(state) as journal:
        entry = begun(journal, baseline=baseline)
        journal.record(entry, executed_result(entry.result, CommandOutcome(exit_code=0, timed_out=False, output="")))
    shutil.rmtree(loop.folder)

    result = make_repo().execute(request(confirmation=LOOKS_ONCE))

    assert (result["state"], result["executed"], result["replayed"]) == ("done", True, True)
    assert result["status"] == "ambiguous"
    assert "can't be read" in (result["detail"] or "")


def test_the_time_that_a_killed_agent_has_looked_is_not_waited_again(repo: Repo, state: Path) -> None:
    document: dict[str, Any] = {"confirmation": {"mode": "wait", "timeoutSeconds": 60}}
    left_behind(repo, state, result={"state": "executed", "executed": True, "exitCode": 0}, **document)
    moment = time.time
    began = time.monotonic()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: moment() + 60)
        result = repo.execute(request(**document))

    assert time.monotonic() - began < 5
    assert (result["status"], result["reason"]) == ("ambiguous", "timeout")


def test_a_key_whose_repo_was_closed_while_its_command_ran_is_finished_by_the_next_one_of_the_process(
    make_repo: MakeRepo, monkeypatch: pytest.MonkeyPatch, *, gated: str, gate: Path, marks: Path
) -> None:
    """The process lives on, but nobody there records what becomes of it."""
    monkeypatch.setattr(control, "LANE_WAIT", 0.1)
    first, second = make_repo(gated), make_repo(gated)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(first.execute, request(confirmation=SKIPS))
        until(lambda: marks.read_text() == "began\n", "the command runs")
        first.close()
        with pytest.raises(ControlBusy):
            second.execute(request(confirmation=SKIPS), deadline=time.monotonic() + 0.1)
        gate.write_text("go\n")

        with pytest.raises(InternalError):
            asked.result()
        result = second.execute(request(confirmation=SKIPS))

    assert (result["status"], result["exitCode"], result["output"]) == ("executed_unconfirmed", 0, "told\n")
    assert marks.read_text() == "began\nended\n"


def test_a_key_whose_repo_was_closed_while_it_looked_for_the_effect_is_looked_into_by_the_next_one_of_the_process(
    make_repo: MakeRepo, loop: LoopFiles
) -> None:
    turn(loop, skip_effect=True)
    first, second = make_repo(), make_repo()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(first.execute, request("reject", confirmation={"mode": "wait", "timeoutSeconds": 1}))
        until(lambda: state_of(second) == "executed", "the effect is looked for")
        first.close()
        result = second.execute(request("reject", confirmation=LOOKS_ONCE), deadline=time.monotonic())

        with pytest.raises(InternalError):
            asked.result()

    assert (result["state"], result["status"], result["reason"]) == ("done", "ambiguous", "timeout")
    assert len(executions(loop)) == 1


def test_recovery_waits_for_the_lane_and_then_finishes(repo: Repo, loop: LoopFiles, state: Path) -> None:
    """Whoever has it may be the very command that is to be looked into."""
    marked(folder_of(state, left_behind(repo, state)))

    with made_folder(state, loop).lane(0):
        repo.recover()
        with pytest.raises(ControlBusy):
            repo.execute(request(), deadline=time.monotonic() + 0.2)
        assert state_of(repo) == "executing"

    assert settled(repo)["reason"] == "interrupted"


def test_recovery_leaves_for_later_what_it_cannot_finish(
    repo: Repo, loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ORPHAN_WAIT", 0.1)
    marked(folder_of(state, left_behind(repo, state)))

    with made_folder(state, loop).lane(0):
        repo.recover()
        until(lambda: not any(thread.name == "recovery" for thread in threading.enumerate()), "recovery has ended")
        assert state_of(repo) == "executing"

    assert repo.execute(request())["reason"] == "interrupted"


def test_recovery_removes_what_executions_have_left_that_nobody_asks_for(repo: Repo, state: Path) -> None:
    entry = left_behind(repo, state)
    folder = folder_of(state, entry)
    marked(folder)
    (state / "executions" / "0123456789abcdef").mkdir()

    repo.recover()

    settled(repo)
    until(lambda: not any((state / "executions").iterdir()), "both are gone")


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
    assert result["status"] == "confirmed"


def test_a_process_of_this_boot_is_no_orphan_of_an_earlier_one(make_repo: MakeRepo, state: Path) -> None:
    repo = make_repo()
    with opened(state) as journal:
        entry = begun(journal, boot_id="another boot")
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        place = state / "executions" / entry.execution_id
        place.mkdir(parents=True)
        (place / executor.PROCESS).write_bytes(Path(f"/proc/{other.pid}/stat").read_bytes())
        (place / executor.STARTED).touch()
        try:
            assert repo.execute(request())["reason"] == "interrupted"
            assert other.poll() is None
        finally:
            other.kill()


def test_a_key_that_is_begun_while_the_journal_is_closed_is_nobodys(
    make_repo: MakeRepo, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = make_repo(script(tmp_path / "superloop", f"touch {tmp_path}/ran"))
    journal = repo._engine.journal  # noqa: SLF001  # nothing else comes between two of its steps
    unfinished = journal.unfinished
    with ThreadPoolExecutor() as pool:

        def with_another() -> Any:
            found = unfinished()
            pool.submit(repo.execute, request(confirmation=SKIPS))
            time.sleep(0.2)  # it waits for its turn; without that it would have begun by now
            return found

        monkeypatch.setattr(journal, "unfinished", with_another)
        repo.close()

    with opened(state) as left:
        assert left.unfinished() == []
    assert not (tmp_path / "ran").exists()
