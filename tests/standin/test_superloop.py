"""The stand-in behaves as the contract says the real `superloop.sh` does: artifacts, decisions, cancel."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

STANDIN = Path(__file__).with_name("superloop")
LOOP = "demo"
DEADLINE = 40.0  # seconds until a fact waited for counts as missing
HELD = 3600.0  # seconds a command is held up for; its test ends it long before
NOTHING_RUNS = 2**22 + 1  # above the highest pid Linux gives

# What the recorded real runs have, written out: the project's tests need nothing outside it.
EVENT_NAMES = [
    "loop_start",
    "iteration_start",
    *["role_start", "role_end"] * 4,
    "usage_check",
    "promise_checked",
    *("checklist_start", "checklist_end", "tests_start", "tests_end", "validation_start", "validation_end"),
    *("prerequisites_start", "prerequisites_end", "evidence_start", "evidence_end", "lifecycle_start", "lifecycle_end"),
    "gates_evaluated",
    "iteration_end",
    "approval_requested",
]
EVENT_KEYS = {"timestamp", "event", "loop_id", "run_id", "iteration", "data"}
STATE_KEYS = {"active", "loop_index", "iteration", "current_loop_id", "updated_at"}
ACTIVE_RUN_KEYS = {"repo", "pid", "pgid", "loop_id", "iteration", "stage", "updated_at"}
SUMMARY_KEYS = {"version", "loop_id", "updated_at", "entries"}
ENTRY_KEYS = {"run_id", "iteration", "started_at", "ended_at", "promise", "gates", "tests_mode", "stuck", "delegation"}
ENTRY_KEYS |= {"completion_ok", "artifacts"}
GATE_KEYS = {"tests", "validation", "prerequisites", "checklist", "evidence", "lifecycle", "approval"}
APPROVAL_KEYS = {"status", "loop_id", "run_id", "iteration", "requested_at", "iteration_started_at"}
APPROVAL_KEYS |= {"iteration_ended_at", "candidate", "files"}
DECISION_KEYS = {"status", "by", "note", "at"}

Json = dict[str, Any]


class _Repo:
    """A repo the stand-in works in, for one test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runtime = path / ".superloop"
        self.loop = self.runtime / "loops" / LOOP

    def command(self, command: str, *words: str) -> list[str]:
        loop = [] if command == "cancel" else ["--loop", LOOP]
        return [str(STANDIN), command, "--repo", str(self.path), *loop, *words]

    def superloop(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            check=False,
            env=env,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=DEADLINE,
        )

    def turn(self, **knobs: object) -> None:
        self.runtime.mkdir(exist_ok=True)
        (self.runtime / "standin.json").write_text(json.dumps(knobs))

    @property
    def log(self) -> str:
        return (self.loop / "events.jsonl").read_text()

    @property
    def events(self) -> list[Json]:
        """The log's events, also those that stand on several lines."""
        decoder, text, events = json.JSONDecoder(), self.log, []
        while text:
            event, end = decoder.raw_decode(text)
            events.append(event)
            text = text[end:].lstrip()
        return events

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    @property
    def approval(self) -> Json:
        return load(self.loop / "approval.json")

    @property
    def entries(self) -> list[Json]:
        entries: list[Json] = load(self.loop / "run-summary.json")["entries"]
        return entries

    @property
    def executions(self) -> list[Json]:
        log = self.runtime / "standin-executions.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def load(path: Path) -> Json:
    document: Json = json.loads(path.read_text())
    return document


def wait_until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not fact():
        assert time.monotonic() < deadline, "the fact did not come about"
        time.sleep(0.01)


class _Start(Protocol):
    """Starts a program that is still going when this returns; what is left of it ends with the test."""

    def __call__(self, command: list[str], *, process_group: int | None = None) -> subprocess.Popen[bytes]: ...


@pytest.fixture(autouse=True)
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in runs by the interpreter of these tests, with its own habits of buffering."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def repo(tmp_path: Path) -> _Repo:
    return _Repo(tmp_path)


@pytest.fixture
def pending(repo: _Repo) -> _Repo:
    """A repo whose run has ended and waits for approval."""
    ran = repo.superloop("run")
    assert ran.returncode == 0, ran.stderr
    return repo


@pytest.fixture
def start() -> Iterator[_Start]:
    with ExitStack() as started:

        def start(command: list[str], *, process_group: int | None = None) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, process_group=process_group, stdout=subprocess.PIPE)
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start


@pytest.fixture
def hung_run(repo: _Repo, start: _Start) -> subprocess.Popen[bytes]:
    """A run in the middle of its first iteration, where it stays."""
    run = start(repo.command("run", "--hang"))
    wait_until(lambda: (repo.loop / "events.jsonl").exists() and "role_start" in repo.log)
    return run


def test_a_run_writes_the_events_of_a_real_run_in_their_order(pending: _Repo) -> None:
    assert pending.names == EVENT_NAMES
    roles = [event["role"] for event in pending.events if event["event"] == "role_end"]
    assert roles == ["planner", "implementer", "tester", "reviewer"]
    for event in pending.events:
        assert event.keys() == EVENT_KEYS | ({"role"} if event["event"].startswith("role_") else set())


def test_only_usage_check_takes_several_lines_of_the_log(pending: _Repo) -> None:
    lines = pending.log.splitlines()
    first = lines.index("{")
    last = lines.index("}")
    assert json.loads("".join(lines[first : last + 1]))["event"] == "usage_check"
    assert [json.loads(line)["event"] for line in lines[:first] + lines[last + 1 :]] == [
        name for name in EVENT_NAMES if name != "usage_check"
    ]


def test_a_run_ends_waiting_for_approval_with_the_keys_of_a_real_run(pending: _Repo) -> None:
    summary, state = load(pending.loop / "run-summary.json"), load(pending.runtime / "state.json")
    [entry] = pending.entries
    assert summary.keys() == SUMMARY_KEYS
    assert entry.keys() == ENTRY_KEYS
    assert entry["gates"].keys() == GATE_KEYS
    assert entry["gates"]["approval"] == "pending"
    assert entry["stuck"] == {"streak": 0, "threshold": 3}
    assert entry["promise"] == {"expected": "SUPERLOOP_COMPLETE", "text": "SUPERLOOP_COMPLETE", "matched": True}
    assert entry["completion_ok"] is False
    assert pending.approval.keys() == APPROVAL_KEYS
    assert pending.approval["status"] == "pending"
    assert pending.approval["run_id"] == entry["run_id"]
    assert state.keys() == STATE_KEYS
    assert (state["active"], state["current_loop_id"]) == (False, LOOP)
    assert not (pending.runtime / "active-run.json").exists()


def test_a_live_run_is_named_in_active_run_json(repo: _Repo, hung_run: subprocess.Popen[bytes]) -> None:
    active, state = load(repo.runtime / "active-run.json"), load(repo.runtime / "state.json")
    assert active.keys() == ACTIVE_RUN_KEYS
    assert (active["repo"], active["loop_id"], active["iteration"]) == (str(repo.path), LOOP, 1)
    assert active["pid"] == active["pgid"] == hung_run.pid
    assert active["pgid"] != os.getpgrp()
    assert state["active"] is True
    assert repo.names == ["loop_start", "iteration_start", "role_start"]


def test_a_run_without_approval_completes_the_loop(repo: _Repo) -> None:
    repo.superloop("run", "--no-approval", "--run-id", "run-7")
    assert repo.names == [*EVENT_NAMES[:-1], "loop_complete"]
    assert {event["run_id"] for event in repo.events} == {"run-7"}
    assert repo.entries[-1]["completion_ok"] is True
    assert not (repo.loop / "approval.json").exists()


def test_only_the_last_of_several_iterations_asks_for_approval(repo: _Repo) -> None:
    repo.superloop("run", "--iterations", "3")
    assert [entry["iteration"] for entry in repo.entries] == [1, 2, 3]
    assert [entry["promise"]["matched"] for entry in repo.entries] == [False, False, True]
    assert repo.names.count("approval_requested") == 1
    assert repo.approval["iteration"] == 3


def test_a_paced_run_takes_its_time_between_events(repo: _Repo) -> None:
    started = time.monotonic()
    repo.superloop("run", "--pace", "0.02")
    assert time.monotonic() - started >= 0.02 * (len(EVENT_NAMES) - 1)
    assert repo.names == EVENT_NAMES


def test_a_terminated_run_ends_and_writes_no_event(repo: _Repo, hung_run: subprocess.Popen[bytes]) -> None:
    log = repo.log
    hung_run.terminate()
    assert hung_run.wait(DEADLINE) == -signal.SIGTERM
    assert repo.log == log


@pytest.mark.parametrize(("words", "status"), [((), "approved"), (("--reject",), "rejected")])
def test_a_decision_is_recorded_and_starts_nothing(pending: _Repo, words: tuple[str, ...], status: str) -> None:
    asked, state = pending.approval, (pending.runtime / "state.json").read_text()
    decided = pending.superloop("approve", "--by", "ops", "--note", "ship it", *words)
    assert decided.returncode == 0, decided.stderr

    decision = pending.approval["decision"]
    assert pending.approval == asked | {"status": status, "decision": decision}
    assert decision == {"by": "ops", "note": "ship it", "decided_at": decision["decided_at"], "status": status}
    [line] = (pending.loop / "decisions.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == status

    *earlier, event = pending.events
    assert [each["event"] for each in earlier] == EVENT_NAMES
    assert event.keys() == EVENT_KEYS | {"role", "status"}
    assert (event["event"], event["role"], event["status"]) == ("approval_decision", "human", status)
    assert event["data"].keys() == DECISION_KEYS
    assert event["data"]["by"] == "ops"
    assert (pending.runtime / "state.json").read_text() == state
    assert not (pending.runtime / "active-run.json").exists()


def test_a_note_that_looks_like_an_option_is_a_note(pending: _Repo) -> None:
    pending.superloop("approve", "--by", "ops", "--note", "--reject")
    assert pending.approval["status"] == "approved"
    assert pending.approval["decision"]["note"] == "--reject"


@pytest.mark.parametrize("words", [(), ("--reject",)])
def test_a_second_decision_is_refused_and_changes_nothing(pending: _Repo, words: tuple[str, ...]) -> None:
    pending.superloop("approve", "--by", "first")
    approval, log = pending.approval, pending.log
    second = pending.superloop("approve", "--by", "second", *words)
    assert second.returncode == 1
    assert "no pending approval (status: approved)" in second.stderr
    assert (pending.approval, pending.log) == (approval, log)


def test_a_decision_on_nothing_is_refused(repo: _Repo) -> None:
    refused = repo.superloop("approve", "--by", "ops")
    assert refused.returncode == 1
    assert "no pending approval (status: none)" in refused.stderr
    assert not repo.loop.exists()


def test_the_next_run_consumes_an_approval_and_completes_the_asking_run(repo: _Repo) -> None:
    repo.superloop("run", "--run-id", "asking")
    repo.superloop("approve", "--by", "ops")
    repo.superloop("run", "--run-id", "consuming")
    start, consumed, complete = repo.events[-3:]
    assert (start["event"], start["run_id"]) == ("loop_start", "consuming")
    assert (consumed["event"], consumed["run_id"]) == ("approval_consumed", "asking")
    assert consumed["data"].keys() == DECISION_KEYS
    assert (complete["event"], complete["run_id"]) == ("loop_complete", "asking")
    assert complete["data"] == {"iteration": 1, "run_id": "asking", "approval": True}
    assert [entry["completion_ok"] for entry in repo.entries] == [False, True]
    assert (repo.entries[-1]["run_id"], repo.entries[-1]["gates"]["approval"]) == ("asking", "approved")
    assert not (repo.loop / "approval.json").exists()
    assert load(repo.runtime / "state.json")["active"] is False


def test_the_next_run_takes_a_rejection_and_asks_again_after_another_iteration(repo: _Repo) -> None:
    repo.superloop("run", "--run-id", "asking")
    repo.superloop("approve", "--by", "ops", "--reject")
    repo.superloop("run", "--run-id", "next")
    second = repo.events[len(EVENT_NAMES) + 1 :]
    assert [event["event"] for event in second] == [EVENT_NAMES[0], "approval_rejected", *EVENT_NAMES[1:]]
    assert (second[1]["run_id"], second[1]["iteration"], second[1]["data"]["by"]) == ("asking", 1, "ops")
    assert (second[2]["run_id"], second[2]["iteration"]) == ("next", 2)
    assert (repo.approval["status"], repo.approval["run_id"], repo.approval["iteration"]) == ("pending", "next", 2)


def test_a_run_does_not_start_over_a_pending_approval(pending: _Repo) -> None:
    approval, log = pending.approval, pending.log
    assert pending.superloop("run").returncode == 1
    assert (pending.approval, pending.log) == (approval, log)


def test_cancel_ends_a_hung_run_and_writes_no_event(repo: _Repo, hung_run: subprocess.Popen[bytes]) -> None:
    log = repo.log
    assert repo.superloop("cancel").returncode == 0
    assert hung_run.wait(DEADLINE) == -signal.SIGTERM
    assert not Path(f"/proc/{hung_run.pid}").exists()
    assert not (repo.runtime / "state.json").exists()
    assert not (repo.runtime / "active-run.json").exists()
    assert repo.log == log


def test_cancel_kills_a_run_that_does_not_answer_sigterm(repo: _Repo, hung_run: subprocess.Popen[bytes]) -> None:
    hung_run.send_signal(signal.SIGSTOP)
    assert repo.superloop("cancel").returncode == 0
    assert hung_run.wait(DEADLINE) == -signal.SIGKILL


@pytest.mark.parametrize("is_superloop", [True, False])
def test_cancel_leaves_a_process_alone_that_is_no_run(repo: _Repo, start: _Start, *, is_superloop: bool) -> None:
    repo.turn(sleep_before=HELD)
    approve, sleep = repo.command("approve", "--by", "ops"), ["sleep", str(HELD)]
    bystander = start(approve if is_superloop else sleep, process_group=0)
    wait_until(lambda: len(repo.executions) == is_superloop)
    repo.turn()
    entry = {"pid": bystander.pid, "pgid": bystander.pid}
    (repo.runtime / "active-run.json").write_text(json.dumps(entry))
    assert repo.superloop("cancel").returncode == 0
    assert bystander.poll() is None
    assert not (repo.runtime / "active-run.json").exists()


def test_cancel_leaves_a_group_alone_that_is_not_the_runs(
    repo: _Repo, start: _Start, hung_run: subprocess.Popen[bytes]
) -> None:
    bystander = start(["sleep", str(HELD)], process_group=0)
    active = load(repo.runtime / "active-run.json")
    (repo.runtime / "active-run.json").write_text(json.dumps(active | {"pgid": bystander.pid}))
    assert repo.superloop("cancel").returncode == 0
    assert (bystander.poll(), hung_run.poll()) == (None, None)


@pytest.mark.parametrize("content", [None, "", "{", json.dumps({"pid": NOTHING_RUNS, "pgid": NOTHING_RUNS})])
def test_cancel_with_nothing_alive_only_forgets(repo: _Repo, content: str | None) -> None:
    repo.runtime.mkdir()
    (repo.runtime / "state.json").write_text('{"active": true}')
    if content is not None:
        (repo.runtime / "active-run.json").write_text(content)
    assert repo.superloop("cancel").returncode == 0
    assert [path.name for path in repo.runtime.iterdir()] == ["standin-executions.jsonl"]


def test_each_approve_and_cancel_is_logged_with_what_it_was_given(pending: _Repo) -> None:
    assert pending.executions == []
    pending.superloop("approve", "--by", "ops", env={"PATH": os.environ["PATH"], "SECRET": "s"})
    pending.superloop("approve", "--by", "late")
    pending.superloop("cancel")
    assert [(each["argv"][0], each["argv"][1]) for each in pending.executions] == [
        (str(STANDIN), command) for command in ("approve", "approve", "cancel")
    ]
    first = pending.executions[0]
    assert first.keys() == {"argv", "pid", "at", "env_keys", "cwd", "stdin_is_tty"}
    assert first["argv"][1:] == ["approve", "--repo", str(pending.path), "--loop", LOOP, "--by", "ops"]
    assert first["env_keys"] == ["PATH", "SECRET"]
    assert first["cwd"] == str(Path.cwd())
    assert first["stdin_is_tty"] is False


def test_an_execution_is_logged_before_its_effect(pending: _Repo, start: _Start) -> None:
    pending.turn(sleep_before=HELD)
    approve = start(pending.command("approve", "--by", "ops"))
    wait_until(lambda: len(pending.executions) == 1)
    assert pending.executions[0]["pid"] == approve.pid
    approve.kill()
    approve.wait(DEADLINE)
    assert pending.approval["status"] == "pending"


def test_sleep_after_holds_the_command_once_its_effect_and_output_are_out(pending: _Repo, start: _Start) -> None:
    pending.turn(sleep_after=HELD, output="held")
    approve = start(pending.command("approve", "--by", "ops"))
    assert approve.stdout
    said = approve.stdout.readline() + approve.stdout.read(len("held"))
    assert said == b"approved by ops\nheld"
    assert approve.poll() is None
    assert pending.approval["status"] == "approved"


def test_a_command_told_to_ignore_sigterm_outlives_it(pending: _Repo, start: _Start) -> None:
    pending.turn(ignore_sigterm=True, sleep_before=0.5)
    approve = start(pending.command("approve", "--by", "ops"))
    wait_until(lambda: len(pending.executions) == 1)
    approve.terminate()
    assert approve.wait(DEADLINE) == 0
    assert pending.approval["status"] == "approved"


def test_skip_effect_output_and_exit_code_are_obeyed(pending: _Repo) -> None:
    pending.turn(skip_effect=True, output="no\n", output_bytes=100_000, exit_code=7)
    log = pending.log
    done = pending.superloop("approve", "--by", "ops")
    assert (done.returncode, done.stdout) == (7, "no\n" + "x" * 100_000)
    assert (pending.approval["status"], pending.log) == ("pending", log)
    assert len(pending.executions) == 1


def test_a_misspelt_knob_is_not_ignored(pending: _Repo) -> None:
    pending.turn(sleep_befor=1)
    assert pending.superloop("approve", "--by", "ops").returncode == 2
    assert pending.approval["status"] == "pending"


@pytest.mark.parametrize("words", [[], ["fly"], ["approve", "--loop", LOOP, "--by", "ops"], ["cancel", "--now"]])
def test_a_command_not_understood_exits_2(words: list[str]) -> None:
    done = subprocess.run([STANDIN, *words], capture_output=True, check=False, text=True, timeout=DEADLINE)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_it_tells_its_version() -> None:
    done = subprocess.run([STANDIN, "--version"], capture_output=True, check=True, text=True, timeout=DEADLINE)
    assert done.stdout == "superloop stand-in 1\n"
