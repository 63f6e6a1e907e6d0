"""What the agent sees of an effect is newer than its baseline, and tied to the run, the request and the process."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.artifacts import ArtifactFiles
from sprite_agent.contract.confirmation import Decision
from sprite_agent.control.evidence import Witness, baseline_from, decided_by, subject_of, take_baseline
from sprite_agent.control.processes import name_of, this_process
from sprite_agent.errors import ArtifactMalformed, EventsNotFound
from sprite_agent.event_log.log import EventLog
from support.repos import LOOP, event, line, put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprite_agent.control.evidence import Baseline
    from sprite_agent.repo import Repo
    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo()


def witness_of(repo: Repo, loop: LoopFiles, baseline: Baseline | None = None) -> Witness:
    """A witness from this moment on, or from an earlier one."""
    start = baseline or take_baseline(repo.read_loop(LOOP))
    log = EventLog(ArtifactFiles(loop.repo), LOOP)
    return Witness(lambda: repo.read_loop(LOOP), lambda: log, start)


@pytest.fixture
def witness(repo: Repo, loop: LoopFiles) -> Iterator[Witness]:
    """A witness from the start of the test on."""
    with witness_of(repo, loop) as witness:
        yield witness


def decision(by: str | None, name: str = "approval_decision", **members: Any) -> bytes:
    """An event that tells of a decision."""
    return line(event(name, data={"status": "approved", "by": by}, **members))


# The baseline.


def test_a_baseline_is_read_from_the_journal_as_it_was_taken(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize({"run_id": "run-1", "completion_ok": False})
    put(loop.active_run, {"loop_id": LOOP, "pid": os.getpid()})
    taken = take_baseline(repo.read_loop(LOOP))

    assert baseline_from(json.loads(json.dumps(taken.document()))) == taken
    assert taken.evidence.target == this_process()
    assert (taken.evidence.asking_run, taken.evidence.summary_run) == ("run-1", "run-1")
    assert taken.resume_token == repo.read_loop(LOOP).resume_token


def test_a_baseline_is_small_however_large_the_summary(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize({"run_id": "run-1", "note": "x" * 500_000})

    assert len(json.dumps(take_baseline(repo.read_loop(LOOP)).document())) < 2_000


# Decisions in the log.


def test_only_what_the_log_got_after_the_baseline_is_seen(repo: Repo, loop: LoopFiles) -> None:
    loop.append(decision("early"))
    with witness_of(repo, loop) as witness:
        assert witness.look().decisions == ()
        loop.append(decision("late", status="approved"))

        assert witness.look().decisions == (Decision("approval_decision", "approved", "late", "run-1"),)
        loop.append(decision("later", "approval_consumed"), line(event("loop_complete", run_id="run-2")))

        assert witness.look().decisions == (
            Decision("approval_decision", "approved", "late", "run-1"),
            Decision("approval_consumed", "approved", "later", "run-1"),
            Decision("loop_complete", None, None, "run-2"),
        )


def test_a_status_is_that_of_the_event_or_else_of_its_data(loop: LoopFiles, witness: Witness) -> None:
    loop.append(decision("ada", status="rejected"), decision("ada"))

    assert [found.status for found in witness.look().decisions] == ["rejected", "approved"]


@pytest.mark.parametrize(
    "text",
    [
        b"not json\n",
        b"[1]\n",
        b'{"event": {"name": "approval_decision"}}\n',
        b'{"event": "approval_decision", "data": 3}\n',
        b'{"event": "approval_decision", "data": {"by": ["ada"], "status": {}}, "run_id": 1}\n',
        b"\n\n",
        decision("x" * 2_000),
        b'{"event": "' + b"x" * 2_000_000 + b'"}\n',
        line(event("iteration_end", data={"by": "ada", "status": "approved"})),
    ],
    ids=[
        "no json",
        "no object",
        "odd name",
        "odd data",
        "odd values",
        "blank",
        "long name",
        "too long",
        "another event",
    ],
)
def test_what_is_no_decision_of_anybodys_holds_up_nothing(loop: LoopFiles, witness: Witness, text: bytes) -> None:
    loop.append(text, decision("ada"))

    decisions = witness.look().decisions

    assert decisions[-1] == Decision("approval_decision", "approved", "ada", "run-1")
    assert [found.by for found in decisions if found.by is not None] == ["ada"]
    assert {type(value) for found in decisions for value in found} <= {str, type(None)}


def test_no_more_decisions_are_kept_than_anybody_needs(loop: LoopFiles, witness: Witness) -> None:
    """Sandbox code may write any number of them."""
    loop.append(b"".join(decision(f"eve-{number}") for number in range(3_000)))

    assert len(witness.look().decisions) == 100


def test_a_decision_in_the_middle_of_being_written_is_seen_when_it_is_whole(loop: LoopFiles, witness: Witness) -> None:
    text = decision("ada")
    loop.append(text[:30])
    assert witness.look().decisions == ()

    loop.append(text[30:])

    assert len(witness.look().decisions) == 1


def replaced(loop: LoopFiles) -> None:
    loop.replace(line(event("loop_start", run_id="run-0")) + decision("eve") * 5)


def rewritten(loop: LoopFiles) -> None:
    loop.rewrite(line(event("loop_start", run_id="run-0")) + decision("eve") * 5)


def emptied(loop: LoopFiles) -> None:
    loop.truncate(0)


@pytest.mark.parametrize("disturb", [replaced, rewritten, emptied])
def test_a_log_that_is_no_longer_the_same_shows_nothing_more(
    loop: LoopFiles, witness: Witness, disturb: Callable[[LoopFiles], None]
) -> None:
    loop.append(decision("ada"))
    seen = witness.look().decisions

    disturb(loop)
    witness.look()
    loop.append(decision("eve"))

    assert witness.look().decisions == seen
    assert [found.by for found in seen] == ["ada"]


@pytest.mark.parametrize("disturb", [replaced, rewritten, emptied])
def test_a_log_that_is_the_same_again_shows_what_came(
    loop: LoopFiles, witness: Witness, disturb: Callable[[LoopFiles], None]
) -> None:
    loop.append(decision("ada"))
    witness.look()
    content = loop.log.read_bytes()

    disturb(loop)
    witness.look()
    loop.rewrite(content + decision("bob"))

    assert [found.by for found in witness.look().decisions] == ["ada", "bob"]


def test_a_baseline_of_another_log_shows_no_decision_and_the_rest(repo: Repo, loop: LoopFiles) -> None:
    baseline = take_baseline(repo.read_loop(LOOP))
    replaced(loop)

    with witness_of(repo, loop, baseline) as witness:
        found = witness.look()

    assert found.decisions == ()
    assert found.approval_status == "pending"


def test_a_baseline_of_an_earlier_version_shows_no_decision_and_the_rest(repo: Repo, loop: LoopFiles) -> None:
    """Its resume token may be none of this version's."""
    baseline = replace(take_baseline(repo.read_loop(LOOP)), resume_token="r0.1.2.3")  # noqa: S106  # a position

    with witness_of(repo, loop, baseline) as witness:
        loop.append(decision("ada"))
        found = witness.look()

    assert (found.decisions, found.last_event) == ((), "approval_decision")


def test_a_loop_that_cannot_be_read_is_told_and_looked_at_again(loop: LoopFiles, witness: Witness) -> None:
    put(loop.state, b"{")
    with pytest.raises(ArtifactMalformed):
        witness.look()
    loop.state.unlink()
    log = loop.log.rename(loop.log.with_name("kept"))
    with pytest.raises(EventsNotFound):
        witness.look()
    log.rename(loop.log)

    loop.append(decision("ada"))

    assert len(witness.look().decisions) == 1


def open_files() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_witness_that_is_done_holds_nothing_open(repo: Repo, loop: LoopFiles) -> None:
    before = open_files()

    with witness_of(repo, loop) as witness:
        witness.look()
        assert open_files() == before + 1
    with witness_of(repo, loop):
        pass

    assert open_files() == before


# The process of a run.


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_the_target_is_gone_when_its_process_is_and_no_run_is_named(
    repo: Repo, loop: LoopFiles, process: subprocess.Popen[bytes]
) -> None:
    put(loop.active_run, {"loop_id": LOOP, "pid": process.pid})
    with witness_of(repo, loop) as witness:
        assert (witness.look().target, witness.look().target_is_gone) == (name_of(process.pid), False)
        loop.active_run.unlink()
        assert (witness.look().target, witness.look().target_is_gone) == (None, False)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert witness.look().target_is_gone


def test_a_run_that_has_come_up_meanwhile_is_not_gone(
    repo: Repo, loop: LoopFiles, witness: Witness, process: subprocess.Popen[bytes]
) -> None:
    assert witness.look().target_is_gone

    put(loop.active_run, {"loop_id": LOOP, "pid": process.pid})

    assert not witness.look().target_is_gone


def test_another_process_under_the_pid_of_the_target_is_not_the_target(
    repo: Repo, loop: LoopFiles, process: subprocess.Popen[bytes]
) -> None:
    """C2: a pid is not who it was: it is named with its start."""
    taken = take_baseline(repo.read_loop(LOOP))
    boot, pid, start = str(name_of(process.pid)).split(":")
    earlier = replace(taken, evidence=replace(taken.evidence, target=f"{boot}:{pid}:{int(start) - 1}"))
    same = replace(taken, evidence=replace(taken.evidence, target=f"{boot}:{pid}:{start}"))

    with witness_of(repo, loop, earlier) as witness:
        assert witness.look().target_is_gone
    with witness_of(repo, loop, same) as witness:
        assert not witness.look().target_is_gone


@pytest.mark.parametrize("pid", [2**22 + 1, 0, -1, "1", True, None, 1.5, [1], 2**70])
def test_what_names_no_process_is_no_target(repo: Repo, loop: LoopFiles, pid: Any) -> None:
    put(loop.active_run, {"loop_id": LOOP, "pid": pid})

    assert take_baseline(repo.read_loop(LOOP)).evidence.target is None


# An approval request.

ASKED = {
    "status": "pending",
    "run_id": "run-1",
    "iteration": 1,
    "requested_at": "2026-01-02T03:04:05Z",
    "candidate": {},
}


@pytest.mark.parametrize(
    "other",
    [
        {"run_id": "run-2"},
        {"iteration": 2},
        {"iteration": "1"},
        {"requested_at": "2026-01-02T03:04:06Z"},
        {"candidate": {"promise": True}},
    ],
)
def test_the_subject_of_a_request_is_another_when_what_is_to_be_decided_is(other: dict[str, Any]) -> None:
    assert subject_of({**ASKED, **other}) != subject_of(ASKED)


@pytest.mark.parametrize(
    "other", [{"status": "approved"}, {"decision": {"by": "ada"}}, {"files": {}}, {"loop_id": LOOP}]
)
def test_the_subject_of_a_request_stays_the_same_when_it_is_decided(other: dict[str, Any]) -> None:
    assert subject_of({**ASKED, **other}) == subject_of(dict(reversed(ASKED.items())))


def test_where_nothing_was_asked_there_is_no_subject() -> None:
    assert subject_of(None) is None
    assert subject_of({}) is not None


@pytest.mark.parametrize(
    ("approval", "by"),
    [
        ({"decision": {"by": "ada#1"}}, "ada#1"),
        ({"decision": {"by": ["ada"]}}, None),
        ({"decision": "ada"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_request_was_decided_by_who_it_says(approval: Any, by: str | None) -> None:
    assert decided_by(approval) == by


def test_the_evidence_has_all_of_that(repo: Repo, loop: LoopFiles, witness: Witness) -> None:
    loop.ask_approval(status="approved", decision={"by": "ada#1"})
    loop.summarize({"run_id": "run-7", "completion_ok": True})

    found = witness.look()

    assert (found.decided_by, found.asking_run, found.summary_run) == ("ada#1", "run-1", "run-7")
    assert found.subject == take_baseline(repo.read_loop(LOOP)).evidence.subject
    assert isinstance(found.summary, str)
