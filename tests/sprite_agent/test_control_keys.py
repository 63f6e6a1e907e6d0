"""A key is run at most once: who repeats it, at once or later, after a restart or a kill, gets what became of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprite_agent.contract.requests import check_request, fingerprint
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import ControlBusy, ControlNotFound, IdempotencyKeyReused, OpsError
from sprite_agent.repo import Repo
from support.repos import LOOP, STANDIN, put
from support.runtime import (
    AGENT,
    LOOKS_ONCE,
    SKIPS,
    WAITS,
    again,
    executions,
    mark_in,
    patient,
    request,
    script,
    state_of,
    turn,
)
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlResult
    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo()


# Asked again.


@pytest.mark.parametrize("intent", ["approve", "reject", "cancel"])
def test_a_key_asked_again_is_answered_without_running_it(repo: Repo, loop: LoopFiles, intent: str) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    first = repo.execute(request(intent))

    assert first["replayed"] is False
    assert repo.execute(request(intent)) == again(first)
    assert repo.get_control(LOOP, "key-1") == again(first)
    assert len(executions(loop)) == 1


def test_different_keys_asked_at_once_are_each_answered_from_their_own_row(repo: Repo, loop: LoopFiles) -> None:
    """I2: no row is lost to another one."""
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    turn(loop, skip_effect=True)
    keys = [f"key-{number}" for number in range(6)]

    def ask(key: str) -> ControlResult:
        return patient(repo, request("cancel", idempotencyKey=key, confirmation=SKIPS))

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(ask, keys))
        repeated = list(pool.map(ask, keys))

    assert len({result["journal"]["sequence"] for result in results}) == 6
    assert repeated == [again(result) for result in results]
    assert len(executions(loop)) == 6


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
    """I4: whichever part of its meaning is another one."""
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
        {"requestedAt": "2026-01-02T03:04:05Z"},
    ],
    ids=["traceId", "provenance", "timeoutSeconds", "no timeout", "requestedAt"],
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


def test_a_key_asked_by_sixteen_at_once_is_run_once_and_all_get_its_result(repo: Repo, loop: LoopFiles) -> None:
    """I1: the others attach to the one that works on it."""
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


def test_who_waits_for_the_lane_while_another_process_runs_the_key_waits_for_its_result(
    make_repo: MakeRepo, loop: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = script(tmp_path / "superloop", "exit 0")
    first, second = make_repo(runtime), make_repo(runtime)
    document = request("reject", confirmation=WAITS)
    lane = StateFolder.lane
    with ThreadPoolExecutor() as pool:
        asked: list[Future[ControlResult]] = []

        def then_run(folder: StateFolder, timeout: float) -> AbstractContextManager[int]:
            monkeypatch.setattr(StateFolder, "lane", lane)
            asked.append(pool.submit(first.execute, document))
            until(lambda: state_of(first) == "executed", "the effect is being looked for")
            return lane(folder, timeout)

        monkeypatch.setattr(StateFolder, "lane", then_run)
        waiting = pool.submit(second.execute, document)
        until(lambda: state_of(first) == "executed", "the effect is being looked for")
        done, _ = wait([waiting], timeout=0.3)
        mark = mark_in(first.get_control(LOOP, "key-1"))
        loop.ask_approval(status="rejected", decision={"by": mark})

        assert not done
        assert waiting.result() == again(asked[0].result())


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
            mark = mark_in(repo.get_control(LOOP, "key-1"))
            loop.ask_approval(status="rejected", decision={"by": mark})
        result = asked.result()

    assert (seen["state"], seen["status"]) == ("executed", None)
    assert (result["status"], result["reason"]) == ("confirmed", "rejection_observed")
    assert repo.get_control(LOOP, "key-1") == again(result)


# Refused.


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
