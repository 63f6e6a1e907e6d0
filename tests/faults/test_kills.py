"""T1, T2, T6: agent, executor and command are killed at every place and at random moments; nothing is run twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import pytest

from opsmgr.errors import NoAnswer
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.control import executor
from sprite_agent.control.journal_file import read_audit
from sprite_agent.control.processes import is_alive, name_from_stat, pid_of
from sprite_agent.errors import OpsError
from sprite_agent.repo import Repo
from support.control_history import ControlHistory
from support.driving import EXIT_CODE, RUNTIME, Controlled, Driver, add_waiting_loop, decision
from support.figures import found, scaled
from support.repos import event, line, put
from support.runtime import SKIPS, script, this_python_first, turn
from support.supervised import Supervised
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from support.repos import Json, LoopFiles

LONG = pytest.mark.timeout(scaled(240, 7200))

# T1

AGENT = ("before_insert", "recorded", "prepared", "spawned", "released", "finished", "done")
EXECUTOR = ("entered", "gated", "marked", "running", "ran", "drafted", "recorded")
LOSES = ("marked", "running", "ran", "drafted")
"""An executor killed there takes its knowledge of how the command ended with it."""
PAIRS = [(agent, executor) for agent in (None, *AGENT) for executor in (None, *EXECUTOR)]


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver() as driver:
        yield driver


def decided_by(controlled: Controlled) -> str:
    """Under which mark the approval request was decided; empty: it was not."""
    decision = json.loads(controlled.loop.approval.read_bytes()).get("decision", {"by": ""})
    return str(decision["by"])


def kill_at(
    place: Path, driver: Driver, agent: str | None, executor: str | None, *, recover: bool, ahead: bool
) -> set[str]:
    """Asks for one decision until it is answered, with these two killed once; which of them were."""
    controlled = Controlled(place, driver)
    document = decision()
    places = [f"agent.{agent}"] * (agent is not None) + [f"executor.{executor}"] * (executor is not None)

    answer = controlled.settle(document, failpoints=",".join(places), recover=recover, ahead=ahead)
    controlled.ask(document, document, document)

    ran = controlled.ran()
    controlled.check(lost=executor in LOSES)
    assert len(ran) == (executor != "marked")
    assert (answer["effect"] == "decision_recorded") == (decided_by(controlled) in answer["command"])
    return {file.name for file in controlled.fired.iterdir()}


@LONG
@pytest.mark.parametrize("ahead", [False, True], ids=["started for it", "waiting"])
def test_wherever_agent_and_executor_are_killed_a_key_is_run_once_and_has_one_answer(
    tmp_path: Path, *, ahead: bool
) -> None:
    rounds = scaled(1, 20)
    cases = [(number, *pair) for number in range(rounds) for pair in PAIRS]

    def work(share: int) -> list[set[str]]:
        killed = []
        with Driver() as driver:
            for number, agent, executor in cases[share::2]:
                place = tmp_path / f"{number}-{agent}-{executor}"
                place.mkdir()
                killed.append(kill_at(place, driver, agent, executor, recover=number % 2 == share, ahead=ahead))
        return killed

    with ThreadPoolExecutor(2) as pool:
        killed = [each for share in pool.map(work, range(2)) for each in share]

    every = {f"agent.{place}" for place in AGENT} | {f"executor.{place}" for place in EXECUTOR}
    assert set.union(*killed) == every
    both = sum(len(each) == 2 for each in killed)
    kind = "an executor that waited" if ahead else "an executor started for it"
    found("T1", f"{len(cases)} cases with {kind}, both killed in {both}: 1 execution, 1 answer, 3 repeats equal")


@pytest.mark.parametrize("place", [place for place in AGENT if place != "done"])
def test_wherever_the_agent_is_killed_a_key_whose_effect_nobody_looks_for_is_run_once_and_has_one_answer(
    driver: Driver, tmp_path: Path, place: str
) -> None:
    """Of these it never is at `done`: that it was executed and that it is done is one commit."""
    controlled = Controlled(tmp_path, driver)
    turn(controlled.loop)
    document = decision(confirmation=SKIPS)

    answer = controlled.settle(document, failpoints=f"agent.{place}", ahead=True)

    controlled.ask(document, document)
    ran = controlled.ran()
    assert [file.name for file in controlled.fired.iterdir()] == [f"agent.{place}"]
    assert (answer["status"], answer["exitCode"], len(ran)) == ("executed_unconfirmed", 0, 1)
    controlled.history.check(ran, read_audit(controlled.state / "journal.sqlite3"), exit_code=0)


def test_a_command_whose_executor_was_killed_keeps_others_out_until_it_has_ended(
    driver: Driver, tmp_path: Path
) -> None:
    controlled = Controlled(tmp_path, driver)
    turn(controlled.loop, sleep_before=0.3)

    (first,) = controlled.ask(decision("approve"), failpoints="executor.running")
    (second,) = controlled.ask(decision("reject"))

    assert (first["answer"]["effect"], second["error"]["reason"]) == ("decision_recorded", "APPROVAL_NOT_PENDING")
    assert len(controlled.ran()) == 1


@pytest.mark.parametrize("killed", ["", "agent.released"], ids=["nobody", "the agent"])
def test_what_a_command_leaves_running_keeps_nobody_out(tmp_path: Path, driver: Driver, killed: str) -> None:
    controlled = Controlled(tmp_path, driver)
    left = tmp_path / "left"
    controlled.runtime = script(tmp_path / "superloop", f"sleep 60 & echo $! >> {left}; exit {EXIT_CODE}")
    try:
        controlled.settle(decision(), failpoints=killed)
        (other,) = controlled.ask(decision())
    finally:
        for pid in left.read_text().split():
            os.kill(int(pid), signal.SIGKILL)

    assert other["answer"]["exitCode"] == EXIT_CODE


# T2

TOKEN = "token-of-the-tests"  # noqa: S105  # of no use elsewhere


async def ask_until_answered(address: str, history: ControlHistory, document: Json) -> None:
    """Asks with the same key until there is an answer: each attempt a call and a connection of its own."""
    answered = False
    while not answered:
        transport = SpriteServiceTransport(address, token=TOKEN, policy=RetryPolicy(attempts=1))
        attempt = history.attempt(document)
        try:
            history.answered(attempt, await transport.execute(cast("ControlRequest", attempt)))
            answered = True
        except NoAnswer:
            history.unanswered(attempt)
        except OpsError as error:
            history.refused(attempt, error.reason, executed=error.executed)
            if not error.retryable:
                raise
        finally:
            await transport.close()
        await asyncio.sleep(0 if answered else random.uniform(0.1, 0.4))  # noqa: S311  # as a client has to


async def kill_again_and_again(agent: Supervised, kills: int, release: Callable[[int], None], ran: Path) -> None:
    """Kills the agent at random moments, when it starts or when it works."""
    chance = random.Random(2)  # noqa: S311  # the same moments each time
    for number in range(kills):
        before = ran.stat().st_size  # noqa: ASYNC240  # takes no time
        release(number)
        if number % 3:
            await asyncio.to_thread(until, lambda: ran.stat().st_size > before, "a command was started")  # noqa: B023  # now
            await asyncio.sleep(chance.uniform(0, 0.1))
        else:
            await asyncio.sleep(chance.uniform(0, 0.7))
        agent.kill()


@LONG
async def test_whenever_the_agent_is_killed_a_key_is_run_once_and_has_one_answer(
    repo: LoopFiles, tmp_path: Path
) -> None:
    keys, kills = scaled(80, 2_000), scaled(18, 500)
    loops = [f"loop-{number}" for number in range(keys)]  # one decision each
    for loop in loops:
        add_waiting_loop(repo, loop)
    ran = tmp_path / "ran"
    put(ran, b"")
    runtime = script(tmp_path / "superloop", f'echo "$@" >> {ran}; exit {EXIT_CODE}')
    history = ControlHistory()
    ready = asyncio.Semaphore(0)

    def release(number: int) -> None:
        """Lets the next keys be asked for, so that there is work until the last kill."""
        for _ in range(keys * number // kills, keys * (number + 1) // kills):
            ready.release()

    with Supervised(tmp_path, repo.repo, runtime=runtime, token=TOKEN) as agent:

        async def decide(document: Json) -> None:
            await ready.acquire()
            await asyncio.gather(*[ask_until_answered(agent.address, history, document) for _ in range(2)])

        documents = [decision(loopId=loop) for loop in loops]
        await asyncio.gather(kill_again_and_again(agent, kills, release, ran), *map(decide, documents))
        for document in documents:  # the last one that is started knows them all
            await ask_until_answered(agent.address, history, document)

    executions = [{"argv": words.split()} for words in ran.read_text().splitlines()]
    assert len(executions) == keys
    killed = agent.starts - 1
    assert kills / 2 < killed <= kills  # there may have been none to kill at one moment or another
    history.check(executions, read_audit(agent.state / "journal.sqlite3"), exit_code=EXIT_CODE)
    told_first = sum(call.answer is not None and not call.answer["replayed"] for call in history.calls)
    found(
        "T2",
        f"{keys} keys, {killed} kills, of {keys - told_first} keys while they were worked on,"
        f" {len(history.calls)} calls: {keys} executions, 1 answer each",
    )


# T6


def started_command(state: Path) -> tuple[str, int]:
    """Name and descriptor of the command that is about to be started, once it is."""
    notes = until(
        lambda: [note for path in state.glob(f"executions/*/{executor.PROCESS}") if (note := path.read_bytes())],
        "the command has been started",
    )
    name = name_from_stat(notes[0])
    assert name is not None
    return name, os.pidfd_open(pid_of(name))


def kill_at_some_moment(loop: LoopFiles, state: Path, life: float) -> None:
    """Kills the command that is about to be started: at any moment of its life, or soon after it has decided."""
    before = loop.approval.stat().st_ino
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        name, process = started_command(state)
        try:
            wait = random.uniform(0, life)  # noqa: S311  # any moment will do
            if wait > life / 2:
                wait = random.uniform(0, 0.001)  # noqa: S311  # likewise
                while loop.approval.stat().st_ino == before and is_alive(name):
                    pass  # what follows takes a fraction of a millisecond
            time.sleep(wait)
            signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def how_far_it_got(loop: LoopFiles, result: ControlResult) -> str:
    """What a killed command has done; fails unless the result says so."""
    by = json.loads(loop.approval.read_bytes()).get("decision", {"by": None})["by"]
    decided = by in result["command"]
    assert (by is None) != decided
    assert (result["effect"] == "decision_recorded") == decided
    assert (result["status"] == "confirmed") == decided
    assert result["exitCode"] in {0, -signal.SIGKILL}
    if result["exitCode"] == 0:
        return "to its end"
    logged = decided and by.encode() in loop.log.read_bytes()
    return "logged" if logged else "decided" if decided else "undecided"


@LONG
def test_what_is_said_of_a_killed_command_agrees_with_what_it_did(repo: LoopFiles, tmp_path: Path) -> None:
    kills, state = scaled(40, 1_000), tmp_path / "state"
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    got: Counter[str] = Counter()
    with (
        contextlib.closing(Repo(repo.repo, state_folder=state, runtime=RUNTIME)) as core,
        ThreadPoolExecutor(1) as pool,
    ):
        began = time.monotonic()
        core.execute(decision())
        life = time.monotonic() - began
        while got.total() - got["to its end"] < kills:
            repo.ask_approval(iteration=got.total() + 2)
            asked = pool.submit(core.execute, decision())
            kill_at_some_moment(repo, state, life)
            got[how_far_it_got(repo, asked.result())] += 1

    assert got["undecided"]
    assert got["decided"] + got["logged"]
    reached = (
        f"{got['undecided']} before it had decided, {got['decided']} before that was logged, {got['logged']} later"
    )
    found("T6", f"{kills} kills of the command, {reached}: what was said of each was so")
