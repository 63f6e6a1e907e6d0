"""The real program: what each command prints, writes and exits with, on real repos and over both transports."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr import __version__
from opsmgr.store import LoopStore, default_folder
from sprite_agent.contract.validation import validate
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = Path(sys.executable).parent
TOKEN = "t0p-s3cret-t0ken"  # noqa: S105  # of this test's own agent
COMMANDS = ["snapshot", "events", "project", "reconcile", "control", "confirm", "watch"]
NO_ANSWER_WITHIN = 40.0
"""Six attempts, with waits of at most 6.2 s in all."""

Json = dict[str, Any]
Ended = subprocess.CompletedProcess[str]


def run(*words: str | bytes | Path, env: dict[str, str], timeout: float = DEADLINE, **more: Any) -> Ended:
    """`opsmgr` with these words, to its end."""
    return subprocess.run(
        [PROGRAMS / "opsmgr", *words],
        capture_output="stdout" not in more,
        check=False,
        env=env,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """One loop in the repo of this module, and the words that say how it is reached."""

    repo: Path
    name: str
    via: list[str]
    env: dict[str, str]

    @property
    def words(self) -> list[str]:
        return ["--repo", str(self.repo), "--loop", self.name, *self.via]

    @property
    def log(self) -> Path:
        return self.repo / ".superloop" / "loops" / self.name / "events.jsonl"

    @property
    def lines(self) -> int:
        return self.log.read_bytes().count(b"\n")

    @property
    def store(self) -> LoopStore:
        return LoopStore(default_folder(self.repo, self.name))

    @property
    def intents(self) -> list[Json]:
        return [json.loads(entry) for entry in self.store.intents.read_text().splitlines()]

    @property
    def executions(self) -> int:
        """Commands that were run for this loop."""
        log = self.repo / ".superloop" / "standin-executions.jsonl"
        return sum(self.name in entry for entry in log.read_text().splitlines()) if log.exists() else 0

    def append(self, *texts: bytes) -> None:
        with self.log.open("ab", buffering=0) as log:
            for text in texts:
                log.write(text)

    def opsmgr(self, command: str, *words: str | bytes | Path, **more: Any) -> Ended:
        return run(command, *self.words, *words, env=more.pop("env", self.env), **more)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of every program here: state folders of its own, and the agent's token."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if name != "SUPERLOOP_BIN"}
    return {**kept, "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "OPS_MANAGER_SERVICE_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo whose loop `played` has come to its end and asks for approval."""
    repo = tmp_path_factory.mktemp("repo")
    subprocess.run([STANDIN, "run", "--repo", repo, "--loop", "played"], check=True, timeout=DEADLINE)
    return repo


@contextlib.contextmanager
def serving(repo: Path, env: dict[str, str], folder: Path) -> Iterator[str]:
    """A real agent that serves `repo`; gives its address. Its log is in `folder`."""
    address = folder / "a.sock"
    command: list[str | Path] = [PROGRAMS / "sprite-agent", "serve", "--repo", str(repo), "--listen", f"unix:{address}"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([*command, "--superloop-bin", str(STANDIN)], env=env, stderr=log) as process,
    ):
        try:
            until(lambda: accepts(address), "the agent listens")
            yield f"unix:{address}"
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def agent(repo: Path, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The agent of this module's repo; its log never has the token."""
    folder = tmp_path_factory.mktemp("agent")
    with serving(repo, env, folder) as address:
        yield address
    assert TOKEN not in (folder / "log").read_text()


def accepts(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(address)) == 0


@pytest.fixture(params=["local", "sprite_service"])
def via(request: pytest.FixtureRequest) -> list[str]:
    """The words for each transport."""
    if request.param == "local":
        return ["--superloop-bin", str(STANDIN)]
    return ["--transport", "sprite_service", "--service-target", request.getfixturevalue("agent")]


def copied(repo: Path, name: str) -> None:
    """Another loop like the played one."""
    loops = repo / ".superloop" / "loops"
    (loops / name).mkdir()
    for file in (loops / "played").iterdir():
        (loops / name / file.name).write_text(file.read_text().replace("played", name))


@pytest.fixture
def loop(repo: Path, via: list[str], env: dict[str, str], tmp_path: Path) -> _Loop:
    """A loop for one test, over each transport, that asks for approval."""
    name = re.sub("[^a-z0-9]", "-", tmp_path.name[:50])
    copied(repo, name)
    return _Loop(repo=repo, name=name, via=via, env=env)


@pytest.fixture
def otherwise(loop: _Loop, agent: str) -> _Loop:
    """The same loop, reached over the other transport."""
    remote = ["--transport", "sprite_service", "--service-target", agent]
    local = ["--superloop-bin", str(STANDIN)]
    return replace(loop, via=local if loop.via == remote else remote)


@pytest.fixture
def here(repo: Path, env: dict[str, str], tmp_path: Path) -> _Loop:
    """A loop for one test that needs no agent."""
    name = re.sub("[^a-z0-9]", "-", tmp_path.name[:50])
    copied(repo, name)
    return _Loop(repo=repo, name=name, via=["--superloop-bin", str(STANDIN)], env=env)


@pytest.fixture
def nowhere(tmp_path: Path, env: dict[str, str]) -> _Loop:
    """A loop of an agent that is not there."""
    via = ["--transport", "sprite_service", "--service-target", f"unix:{tmp_path}/no.sock"]
    (tmp_path / "repo").mkdir()
    return _Loop(repo=tmp_path / "repo", name="demo", via=via, env=env)


class _Watching:
    """A running `opsmgr watch`, whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self._lines.put(text)

    def next(self) -> Json:
        """The next line as an envelope."""
        return dict(json.loads(self._lines.get(timeout=DEADLINE)))

    def has_more(self) -> bool:
        return not self._lines.empty()

    def end(self) -> str:
        """What it said on stderr when it has ended by itself."""
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        self.process.wait(DEADLINE)
        return said


@contextlib.contextmanager
def watching(loop: _Loop, *words: str | Path) -> Iterator[_Watching]:
    command: list[str | Path] = [PROGRAMS / "opsmgr", "watch", *loop.words, *words]
    with subprocess.Popen(
        command, env=loop.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield _Watching(process)
        finally:
            process.kill()


def on_a_terminal(loop: _Loop, command: str, *words: str, lines: int) -> tuple[list[str], str, int]:
    """Runs a command on a terminal; a watch, up to so many lines. Its lines, stderr and exit code."""
    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the program has ended
            while True:
                seen.extend(os.read(master, 65536))

    with subprocess.Popen(
        [PROGRAMS / "opsmgr", command, *loop.words, *words],
        env=loop.env,
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(slave)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            if command == "watch":
                until(lambda: seen.count(b"\n") >= lines, f"{lines} lines")
                process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
            process.wait()
            reader.join(DEADLINE)
            os.close(master)
    shown = seen.decode().replace("\r\n", "\n").split("\n")[:-1]
    return shown, said, process.returncode


def documents(ended: Ended) -> list[Json]:
    """What was printed, a document a line; the command ended well and said nothing besides."""
    assert (ended.returncode, ended.stderr) == (0, "")
    return [json.loads(text) for text in ended.stdout.splitlines()]


def assert_one_line(ended: Ended, code: int, reason: str) -> str:
    """Asserts that a command failed with one line for people, and gives it."""
    assert "Traceback" not in ended.stderr
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.endswith(f"[{reason}]\n")
    said = ended.stderr.removesuffix("\n")
    assert said.startswith("opsmgr: ")
    assert said.isprintable(), said
    return said


def error_in(ended: Ended, code: int) -> Json:
    """The error document that a command with --json printed, and nothing else."""
    assert "Traceback" not in ended.stderr
    assert ended.returncode == code, ended.stderr
    [document] = [json.loads(text) for text in ended.stdout.splitlines()]
    validate("error", document)
    return dict(document["error"])


def untimed(envelope: Json) -> Json:
    return {**envelope, "emittedAt": None}


# snapshot


def test_a_snapshot_is_one_valid_envelope_on_one_line(loop: _Loop) -> None:
    ended = loop.opsmgr("snapshot", "--trace-id", "trace-1", "--run-id", "run-1")

    [envelope] = documents(ended)
    validate("loop_run_snapshot", envelope)
    assert ended.stdout.startswith('{"schemaVersion":"v1","envelopeType":"loop_run_snapshot",')
    assert envelope["source"] == {"repoPath": str(loop.repo), "loopId": loop.name}
    assert (envelope["traceId"], envelope["run"]["runId"]) == ("trace-1", "run-1")
    assert envelope["run"]["status"] == "awaiting_approval"


def test_a_pretty_snapshot_is_the_same_one_indented(here: _Loop) -> None:
    [compact] = documents(here.opsmgr("snapshot"))

    pretty = here.opsmgr("snapshot", "--pretty")

    assert pretty.stdout.startswith('{\n  "schemaVersion": "v1",\n')
    assert untimed(json.loads(pretty.stdout)) == untimed(compact)


def test_both_transports_print_the_same_snapshot_and_the_same_events(
    repo: Path, agent: str, env: dict[str, str]
) -> None:
    local = _Loop(repo=repo, name="played", via=[], env=env)
    remote = _Loop(repo=repo, name="played", via=["--transport", "sprite_service", "--service-target", agent], env=env)

    for command in ("snapshot", "events"):
        here, there = (documents(loop.opsmgr(command)) for loop in (local, remote))
        assert [untimed(envelope) for envelope in here] == [untimed(envelope) for envelope in there]


def test_a_loop_is_reached_without_naming_the_repo_over_the_service(agent: str, env: dict[str, str]) -> None:
    ended = run("snapshot", "--loop", "played", "--transport", "sprite_service", "--service-target", agent, env=env)

    [envelope] = documents(ended)
    assert envelope["source"]["loopId"] == "played"


# events


def test_events_are_valid_envelopes_a_line_each_and_move_the_cursor(loop: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"

    found = documents(loop.opsmgr("events", "--cursor-file", cursor, "--trace-id", "trace-1"))

    for envelope in found:
        validate("loop_run_event", envelope)
        assert envelope["traceId"] == "trace-1"
    assert found[0]["event"]["name"] == "loop_start"
    assert found[-1]["event"]["name"] == "approval_requested"
    offsets = [envelope["cursor"]["eventLineOffset"] for envelope in found]
    assert offsets == sorted(set(offsets))
    saved = json.loads(cursor.read_bytes())
    validate("manager_cursor", saved)
    assert (saved["eventLineOffset"], saved["eventLineCount"]) == (loop.lines, loop.lines)
    assert (saved["loopId"], saved["repoPath"]) == (loop.name, str(loop.repo))


def test_events_go_on_where_the_cursor_stands(loop: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"
    documents(loop.opsmgr("events", "--cursor-file", cursor))
    before = loop.lines

    assert documents(loop.opsmgr("events", "--cursor-file", cursor)) == []
    loop.append(line(event("tick", data={"big": 2**64})), b"\n", line(event("tock")))

    found = documents(loop.opsmgr("events", "--cursor-file", cursor))
    assert [(one["event"]["name"], one["cursor"]["eventLineOffset"]) for one in found] == [
        ("tick", before + 1),
        ("tock", before + 3),
    ]
    assert found[0]["event"]["payload"] == {"big": 2**64}


def test_no_more_events_are_printed_than_asked_for(loop: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"

    first = documents(loop.opsmgr("events", "--cursor-file", cursor, "--max-events", "2"))
    second = documents(loop.opsmgr("events", "--cursor-file", cursor, "--max-events", "1"))

    assert [one["cursor"]["eventLineOffset"] for one in first + second] == [1, 2, 3]
    assert json.loads(cursor.read_bytes())["eventLineOffset"] == 3


def test_from_the_start_all_events_are_printed_again_whatever_the_cursor_file_holds(
    here: _Loop, tmp_path: Path
) -> None:
    cursor = tmp_path / "cursor.json"
    cursor.write_text("broken")

    found = documents(here.opsmgr("events", "--cursor-file", cursor, "--from-start"))

    assert found[0]["cursor"]["eventLineOffset"] == 1
    assert json.loads(cursor.read_bytes())["eventLineOffset"] == here.lines


def test_a_malformed_line_ends_the_events_and_the_cursor_covers_those_before_it(loop: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"
    before = loop.lines
    loop.append(line(event("tick")), b"not json\n", line(event("tock")))

    ended = loop.opsmgr("events", "--cursor-file", cursor)

    assert f"line {before + 2} of the event log is malformed" in assert_one_line(ended, 1, "EVENT_MALFORMED")
    printed = [json.loads(text) for text in ended.stdout.splitlines()]
    assert printed[-1]["event"]["name"] == "tick"
    assert json.loads(cursor.read_bytes())["eventLineOffset"] == before + 1

    again = loop.opsmgr("events", "--cursor-file", cursor)
    assert (again.returncode, again.stdout) == (1, "")
    assert json.loads(cursor.read_bytes())["eventLineOffset"] == before + 1


def test_with_json_a_malformed_line_is_an_error_document_after_the_events(here: _Loop) -> None:
    here.append(b"not json\n")

    ended = here.opsmgr("events", "--json", "--trace-id", "trace-1")

    *printed, last = [json.loads(text) for text in ended.stdout.splitlines()]
    assert len(printed) > 10
    validate("error", last)
    assert (last["error"]["code"], last["error"]["traceId"]) == ("event_malformed", "trace-1")
    assert last["error"]["details"]["line"] == str(here.lines)


@pytest.mark.parametrize("offset", [9999, 2**64])
def test_a_cursor_beyond_the_log_is_refused_with_what_to_do(loop: _Loop, tmp_path: Path, offset: int) -> None:
    cursor = tmp_path / "cursor.json"
    put(cursor, {"schemaVersion": "v1", "loopId": loop.name, "eventLineOffset": offset})

    ended = loop.opsmgr("events", "--cursor-file", cursor)

    reason = "CURSOR_BEYOND_END" if "[CURSOR_BEYOND_END]" in ended.stderr or offset < 2**63 else "INPUT_INVALID"
    assert "reset it or" in assert_one_line(ended, 1, reason)
    assert ended.stdout == ""


def test_a_replaced_log_is_refused_with_what_to_do_and_the_cursor_stays(here: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"
    documents(here.opsmgr("events", "--cursor-file", cursor))
    saved = cursor.read_bytes()
    here.log.write_bytes(line(event("loop_start")) * 200)

    ended = here.opsmgr("events", "--cursor-file", cursor)

    assert "replay from the start" in assert_one_line(ended, 1, "LOG_REPLACED")
    assert cursor.read_bytes() == saved
    assert len(documents(here.opsmgr("events", "--cursor-file", cursor, "--from-start"))) == 200


# project


@dataclass(frozen=True, kw_only=True)
class _Files:
    """A snapshot and the events of one poll in files."""

    snapshot: Path
    events: Path

    @property
    def words(self) -> list[str]:
        return ["--snapshot-file", str(self.snapshot), "--events-file", str(self.events)]


@pytest.fixture
def taken(here: _Loop, tmp_path: Path) -> _Files:
    files = _Files(snapshot=tmp_path / "snapshot.json", events=tmp_path / "events.ndjson")
    files.snapshot.write_text(here.opsmgr("snapshot").stdout)
    files.events.write_text(here.opsmgr("events").stdout)
    return files


def project(loop: _Loop, taken: _Files, *words: str | Path) -> Ended:
    return run("project", "--repo", loop.repo, "--loop", loop.name, *taken.words, *words, env=loop.env)


def test_a_projection_is_printed_and_saved_where_the_manager_keeps_it(here: _Loop, taken: _Files) -> None:
    [state] = documents(project(here, taken))

    validate("manager_state", state)
    assert json.loads(here.store.state.read_bytes()) == state
    assert state["transition"]["previousState"] == "none"
    assert state["transition"]["triggeringSignal"] == "event:approval_requested"
    assert state["evidence"]["snapshotFile"] == str(taken.snapshot)
    assert state["evidence"]["eventsFile"] == str(taken.events)


def test_a_projection_replaces_the_state_file_it_is_given_and_starts_from_it(
    here: _Loop, taken: _Files, tmp_path: Path
) -> None:
    state_file = tmp_path / "state.json"
    put(state_file, {"transition": {"currentState": "running"}})

    [state] = documents(project(here, taken, "--state-file", state_file))

    assert state["transition"]["previousState"] == "running"
    assert json.loads(state_file.read_bytes()) == state
    assert not here.store.state.exists()


def test_a_projection_does_not_replace_the_state_of_a_manager_at_work(here: _Loop, taken: _Files) -> None:
    documents(project(here, taken))
    before = here.store.state.read_bytes()
    taken.events.write_text("")

    with here.store.locked():
        assert_one_line(project(here, taken), 1, "LOOP_LOCKED")

    assert here.store.state.read_bytes() == before


def test_a_projection_without_events_is_made_of_the_snapshot(here: _Loop, taken: _Files) -> None:
    taken.events.write_text("")

    [state] = documents(project(here, taken))

    assert state["transition"]["triggeringSignal"] == "snapshot_status:awaiting_approval"


def test_a_projection_of_another_loops_snapshot_is_refused_and_nothing_written(here: _Loop, taken: _Files) -> None:
    ended = run("project", "--repo", here.repo, "--loop", "another", *taken.words, env=here.env)

    assert_one_line(ended, 1, "INPUT_INVALID")
    assert not (here.repo / ".superloop" / "ops-manager" / "another").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_projection_of_a_broken_snapshot_is_refused(here: _Loop, taken: _Files, content: str) -> None:
    taken.snapshot.write_text(content)

    assert_one_line(project(here, taken), 1, "INPUT_INVALID")
    assert not here.store.state.exists()


def test_a_projection_onto_a_broken_state_is_refused_and_the_state_stays(
    here: _Loop, taken: _Files, tmp_path: Path
) -> None:
    for content in ("{", '{"transition": "running"}', '{"transition": {"currentState": 5}}', '{"cursor": 3}'):
        (tmp_path / "state.json").write_text(content)

        ended = project(here, taken, "--state-file", tmp_path / "state.json")

        if ended.returncode == 0:  # taken as absent
            validate("manager_state", json.loads(ended.stdout))
        else:
            assert_one_line(ended, 1, "INPUT_INVALID")
            assert (tmp_path / "state.json").read_text() == content


# reconcile


def test_a_reconcile_prints_the_state_and_writes_the_managers_files(loop: _Loop) -> None:
    [state] = documents(loop.opsmgr("reconcile", "--trace-id", "trace-1"))

    validate("manager_state", state)
    assert state["trace"] == {"reconcileTraceId": "trace-1"}
    assert json.loads(loop.store.state.read_bytes()) == state
    validate("manager_health", json.loads(loop.store.health.read_bytes()))
    validate("manager_cursor", json.loads(loop.store.cursor.read_bytes()))
    [telemetry] = loop.store.reconcile_telemetry.read_text().splitlines()
    expected = "sprite_service" if "--service-target" in loop.via else "local"
    assert json.loads(telemetry)["transport"] == expected


def test_a_second_reconcile_takes_only_what_is_new_over_either_transport(loop: _Loop, otherwise: _Loop) -> None:
    documents(loop.opsmgr("reconcile"))
    loop.append(line(event("loop_stop")))

    [state] = documents(otherwise.opsmgr("reconcile", "--max-events", "5"))

    assert state["transition"]["triggeringSignal"] == "event:loop_stop"
    telemetry = [json.loads(entry) for entry in loop.store.reconcile_telemetry.read_text().splitlines()]
    assert telemetry[1]["eventsIngested"] == 1


def test_a_reconcile_that_fails_exits_with_1_and_still_writes_health(loop: _Loop) -> None:
    loop.append(b"not json\n", line(event("tick")))

    assert_one_line(loop.opsmgr("reconcile"), 1, "EVENT_MALFORMED")

    health = json.loads(loop.store.health.read_bytes())
    assert health["transport"]["failureCode"] == "events_unavailable"
    assert not loop.store.state.exists()


def test_a_threshold_that_is_given_beats_the_profile(loop: _Loop) -> None:
    [state] = documents(
        loop.opsmgr("reconcile", "--threshold-profile", "strict", "--critical-ingest-lag-seconds", "4000")
    )

    thresholds = state["health"]["thresholds"]
    assert thresholds["profile"] == "strict"
    assert (thresholds["degradedIngestLagSeconds"], thresholds["criticalIngestLagSeconds"]) == (120, 4000)
    [telemetry] = loop.store.reconcile_telemetry.read_text().splitlines()
    assert json.loads(telemetry)["thresholdProfile"] == "strict"


def test_a_catalogue_of_thresholds_can_be_given_and_its_mistakes_are_named(here: _Loop, tmp_path: Path) -> None:
    catalogue = tmp_path / "thresholds.toml"
    catalogue.write_text("[profiles.night]\ningest_lag_seconds = 3\n")

    said = assert_one_line(
        here.opsmgr("reconcile", "--thresholds-file", str(catalogue), "--threshold-profile", "night"),
        1,
        "INPUT_INVALID",
    )

    assert f"{catalogue}: profiles.night.ingest_lag_seconds is not" in said


def test_a_mistyped_repo_gets_no_folders_over_either_transport(loop: _Loop, tmp_path: Path) -> None:
    mistyped = tmp_path / "mistyped"
    (tmp_path / "empty").mkdir()

    for repo in (mistyped, tmp_path / "empty"):
        words = ["--repo", str(repo), "--loop", loop.name, *loop.via]
        assert_one_line(run("reconcile", *words, env=loop.env), 1, "INPUT_INVALID")

    assert not mistyped.exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_reconcile_while_another_manager_is_at_work_is_refused(here: _Loop) -> None:
    here.store.folder.mkdir(parents=True)
    with (here.store.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        said = assert_one_line(here.opsmgr("reconcile"), 1, "LOOP_LOCKED")

    assert "another manager" in said


def test_without_a_repo_the_managers_files_are_in_the_users_state_folder(agent: str, env: dict[str, str]) -> None:
    words = ["--loop", "played", "--transport", "sprite_service", "--service-target", agent]

    documents(run("reconcile", *words, env=env))

    [state] = (Path(env["XDG_STATE_HOME"]) / "opsmgr").rglob("state.json")
    assert state.parent.name == "played"


# control


@pytest.fixture
def knobs(repo: Path) -> Iterator[Path]:
    """The file that tells the stand-in how to behave."""
    path = repo / ".superloop" / "standin.json"
    yield path
    path.unlink(missing_ok=True)


def test_a_reject_is_run_confirmed_and_recorded(loop: _Loop) -> None:
    ended = loop.opsmgr("control", "--intent", "reject", "--by", "ada", "--note", "not yet", "--trace-id", "trace-1")

    [result] = documents(ended)
    validate("control_result", result)
    assert (result["status"], result["reason"], result["replayed"]) == ("confirmed", "rejection_observed", False)
    [recorded] = loop.intents
    assert (recorded["status"], recorded["requestedBy"], recorded["note"]) == ("confirmed", "ada", "not yet")
    assert (recorded["traceId"], recorded["idempotencyKey"]) == ("trace-1", result["idempotencyKey"])
    assert recorded["transport"] == ("sprite_service" if "--service-target" in loop.via else "local")
    decision = json.loads((loop.log.parent / "approval.json").read_bytes())["decision"]
    assert (decision["by"].partition("#")[0], decision["note"]) == ("ada", "not yet")


def test_an_approve_whose_effect_does_not_show_exits_with_2_and_says_what_is_needed(loop: _Loop) -> None:
    ended = loop.opsmgr("control", "--intent", "approve", "--by", "ada", "--timeout-seconds", "0")

    assert (ended.returncode, ended.stderr) == (2, "")
    result = json.loads(ended.stdout)
    assert (result["status"], result["effect"]) == ("ambiguous", "decision_recorded")
    assert "start the run again" in result["detail"]
    assert loop.intents[0]["confirmExitCode"] == 2


def test_an_approve_is_confirmed_by_its_decision_where_that_is_to_count(loop: _Loop) -> None:
    words = ["--intent", "approve", "--by", "ada", "--confirm", "decision", "--timeout-seconds", "10"]

    [result] = documents(loop.opsmgr("control", *words))

    assert (result["status"], result["reason"]) == ("confirmed", "decision_observed")


def test_an_intent_that_is_not_to_be_confirmed_exits_with_0(here: _Loop) -> None:
    [result] = documents(here.opsmgr("control", "--intent", "reject", "--by", "ada", "--no-confirm"))

    assert result["status"] == "executed_unconfirmed"
    assert result["confirmation"] is None


def test_a_command_that_fails_exits_with_1_and_its_result_is_printed(here: _Loop, knobs: Path) -> None:
    put(knobs, {"exit_code": 5, "output": "no way", "skip_effect": True})

    ended = here.opsmgr("control", "--intent", "reject", "--by", "ada")

    assert (ended.returncode, ended.stderr) == (1, "")
    result = json.loads(ended.stdout)
    assert (result["status"], result["exitCode"]) == ("failed_command", 5)
    assert "no way" in here.intents[0]["commandOutput"]


def test_the_same_key_again_runs_nothing_and_gives_the_same_result(loop: _Loop) -> None:
    words = ["--intent", "reject", "--by", "ada", "--idempotency-key", f"{loop.name}-key"]

    [first] = documents(loop.opsmgr("control", *words))
    [again] = documents(loop.opsmgr("control", *words))

    assert again == {**first, "replayed": True}
    assert loop.executions == 1
    assert len(loop.intents) == 2


def test_the_same_key_over_the_other_transport_runs_nothing_either(loop: _Loop, otherwise: _Loop) -> None:
    words = ["--intent", "reject", "--by", "ada", "--idempotency-key", f"{loop.name}-key"]
    documents(loop.opsmgr("control", *words))

    [again] = documents(otherwise.opsmgr("control", *words))

    assert again["replayed"] is True
    assert loop.executions == 1


def test_a_key_of_another_request_is_refused(here: _Loop) -> None:
    words = ["--by", "ada", "--idempotency-key", f"{here.name}-key", "--timeout-seconds", "0"]
    here.opsmgr("control", "--intent", "approve", *words)

    ended = here.opsmgr("control", "--intent", "reject", *words)

    assert_one_line(ended, 1, "IDEMPOTENCY_KEY_REUSED")
    assert here.executions == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--expected-run-id", "another"], "RUN_MISMATCH"),
        (["--expected-iteration", "99"], "ITERATION_MISMATCH"),
        (["--expected-approval-digest", "0" * 64], "APPROVAL_CHANGED"),
        (["--by", "two\nlines"], "ACTOR_INVALID"),
        (["--note", "\x1b[2J"], "NOTE_INVALID"),
        (["--idempotency-key", "not a key"], "IDEMPOTENCY_KEY_INVALID"),
    ],
)
def test_what_is_refused_runs_nothing(here: _Loop, words: list[str], reason: str) -> None:
    ended = here.opsmgr("control", "--intent", "approve", "--by", "ada", *words)

    assert_one_line(ended, 1, reason)
    assert ended.stdout == ""
    assert here.executions == 0
    assert here.intents[0]["status"] == "failed_command"


def test_without_a_runtime_nothing_is_run(here: _Loop) -> None:
    ended = run("control", "--repo", here.repo, "--loop", here.name, "--intent", "reject", "--by", "ada", env=here.env)

    assert "--superloop-bin or set SUPERLOOP_BIN" in assert_one_line(ended, 1, "RUNTIME_MISSING")


def test_the_runtime_is_found_by_its_variable(here: _Loop) -> None:
    env = {**here.env, "SUPERLOOP_BIN": str(STANDIN)}

    ended = run("control", "--repo", here.repo, "--loop", here.name, "--intent", "reject", "--by", "ada", env=env)

    assert documents(ended)[0]["status"] == "confirmed"


def test_the_exit_code_of_an_intent_that_may_have_run_is_not_that_of_a_failed_one(here: _Loop, tmp_path: Path) -> None:
    state, runtime = tmp_path / "journal", tmp_path / "runtime"
    runtime.write_text(f"#!/bin/sh\nrm -rf {state}\n: > {state}\n")  # what it does can't be recorded after that
    runtime.chmod(0o755)
    words = ["--intent", "reject", "--by", "ada", "--state-dir", str(state), "--superloop-bin", str(runtime)]

    ended = run("control", "--repo", here.repo, "--loop", here.name, *words, env=here.env)

    assert "Traceback" not in ended.stderr
    [recorded] = here.intents
    assert recorded["status"] == "ambiguous"
    assert ended.returncode in {2, 3}
    assert recorded["idempotencyKey"] in ended.stderr


def test_a_cancel_ends_a_run_that_hangs(loop: _Loop) -> None:
    active = loop.repo / ".superloop" / "active-run.json"
    command: list[str | Path] = [STANDIN, "run", "--repo", str(loop.repo), "--loop", f"{loop.name}-x", "--hang"]
    with subprocess.Popen(command) as hanging:
        try:
            until(lambda: active.exists() and active.read_bytes().endswith(b"}\n"), "the run is active")
            ended = run(
                "control",
                *("--repo", str(loop.repo), "--loop", f"{loop.name}-x", *loop.via),
                *("--intent", "cancel", "--by", "ada"),
                env=loop.env,
            )
            assert hanging.wait(DEADLINE) == -signal.SIGTERM
        finally:
            hanging.kill()

    [result] = documents(ended)
    assert (result["status"], result["reason"]) == ("confirmed", "inactive_not_running")


def test_what_the_sandbox_wrote_reaches_the_terminal_without_its_control_characters(here: _Loop) -> None:
    state = here.repo / ".superloop" / "state.json"
    before = state.read_bytes() if state.exists() else None
    put(state, {"active": True, "current_loop_id": "x\x1b[2J\x9b31m\nopsmgr: cancelled\u202e"})
    try:
        ended = here.opsmgr("control", "--intent", "cancel", "--by", "ada")
    finally:
        state.unlink() if before is None else state.write_bytes(before)

    assert_one_line(ended, 1, "LOOP_NOT_ACTIVE")


# confirm


def test_an_effect_that_shows_is_confirmed_and_nothing_is_run(loop: _Loop) -> None:
    put(loop.log.parent / "approval.json", {"status": "rejected"})

    [record] = documents(loop.opsmgr("confirm", "--intent", "reject"))

    assert (record["confirmed"], record["reason"], record["attempts"]) == (True, "rejection_observed", 1)
    assert loop.executions == 0
    assert not loop.store.intents.exists()


def test_an_effect_that_does_not_show_in_time_exits_with_2(here: _Loop) -> None:
    ended = here.opsmgr("confirm", "--intent", "reject", "--timeout-seconds", "3", "--interval-seconds", "0.05")

    assert (ended.returncode, ended.stderr) == (2, "")
    record = json.loads(ended.stdout)
    assert (record["confirmed"], record["reason"], record["timeoutSeconds"]) == (False, "timeout", 3)
    assert record["attempts"] >= 2


@pytest.mark.parametrize("option", ["--timeout-seconds", "--interval-seconds"])
def test_a_time_that_is_no_number_does_not_make_a_confirm_look_for_ever(here: _Loop, option: str) -> None:
    words = {"--timeout-seconds": "0.2", "--interval-seconds": "0.05", option: "nan"}

    ended = here.opsmgr("confirm", "--intent", "reject", *[word for pair in words.items() for word in pair], timeout=5)

    assert ended.returncode in {1, 2, 64}
    assert "Traceback" not in ended.stderr


# watch


def test_what_is_appended_while_watching_arrives_in_order_and_once(loop: _Loop) -> None:
    before = loop.lines
    with watching(loop, "--from-start") as watch:
        seen = [watch.next()]
        while seen[-1]["event"]["name"] != "approval_requested":
            seen.append(watch.next())
        for number in range(20):
            loop.append(line(event("tick", data={"number": number})))
        seen += [watch.next() for _ in range(20)]

    for envelope in seen:
        validate("loop_run_event", envelope)
    assert [one["event"]["payload"] for one in seen[-20:]] == [{"number": number} for number in range(20)]
    offsets = [one["cursor"]["eventLineOffset"] for one in seen]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] == before + 20


def test_watching_starts_from_now(loop: _Loop) -> None:
    before = loop.lines
    appended = 0
    with watching(loop) as watch:

        def arrives() -> bool:
            nonlocal appended
            appended += 1
            loop.append(line(event("tick")))
            return watch.has_more()

        until(arrives, "an event arrives")
        first = watch.next()["cursor"]["eventLineOffset"]
        rest = [watch.next()["cursor"]["eventLineOffset"] for _ in range(before + appended - first)]

    assert first > before
    assert rest == list(range(first + 1, before + appended + 1))


def test_the_cursor_of_a_watch_that_starts_from_now_is_at_the_end_of_the_log(loop: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"
    with watching(loop, "--cursor-file", cursor):
        until(cursor.exists, "the cursor is saved")
        saved = json.loads(cursor.read_bytes())

    assert (saved["eventLineOffset"], saved["eventLineCount"]) == (loop.lines, loop.lines)


def test_a_watch_ends_by_itself_after_as_many_events_as_asked_for(loop: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"

    found = documents(loop.opsmgr("watch", "--from-start", "--max-events", "3", "--cursor-file", cursor))

    assert [one["cursor"]["eventLineOffset"] for one in found] == [1, 2, 3]
    assert json.loads(cursor.read_bytes())["eventLineOffset"] == 3

    found = documents(loop.opsmgr("watch", "--max-events", "2", "--cursor-file", cursor))
    assert [one["cursor"]["eventLineOffset"] for one in found] == [4, 5]


def test_ctrl_c_ends_a_watch_quietly_with_130(loop: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"
    with watching(loop, "--from-start", "--cursor-file", cursor) as watch:
        watch.next()
        until(cursor.exists, "the cursor is saved")
        watch.process.send_signal(signal.SIGINT)

        assert watch.end() == ""

    assert watch.process.returncode == 130
    assert json.loads(cursor.read_bytes())["eventLineOffset"] == loop.lines


def test_a_malformed_line_is_passed_over_with_a_remark(here: _Loop) -> None:
    with watching(here, "--from-start", "--max-events", "50") as watch:
        watch.next()
        here.append(b"not json\n", line(event("tick")))
        at = here.lines - 1
        while watch.next()["event"]["name"] != "tick":
            pass
        watch.process.send_signal(signal.SIGINT)

        said = watch.end()

    assert said.startswith(f"opsmgr: line {at} of the log is malformed and was passed over: ")
    assert said.count("\n") == 1


def test_a_replaced_log_is_told_and_gone_on_with_from_its_first_line(here: _Loop) -> None:
    with watching(here, "--from-start") as watch:
        while watch.next()["event"]["name"] != "approval_requested":
            pass
        draft = here.log.with_suffix(".draft")
        draft.write_bytes(line(event("anew")) + line(event("again")))
        draft.replace(here.log)

        assert [watch.next()["event"]["name"] for _ in range(2)] == ["anew", "again"]
        watch.process.send_signal(signal.SIGINT)
        said = watch.end()

    assert "going on with its first line" in said
    assert said.count("\n") == 1


def test_the_cursor_of_a_watch_is_of_the_log_that_is_there(here: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"
    with watching(here, "--from-start", "--cursor-file", cursor):
        until(lambda: cursor.exists() and json.loads(cursor.read_bytes())["eventLineOffset"] == here.lines, "all came")
        draft = here.log.with_suffix(".draft")
        draft.touch()
        draft.replace(here.log)
        until(lambda: json.loads(cursor.read_bytes())["eventLineCount"] == 0, "the other log is noticed")

        assert json.loads(cursor.read_bytes())["eventLineOffset"] == 0


def test_on_a_terminal_a_watch_shows_readable_lines_without_control_characters(here: _Loop) -> None:
    here.log.write_bytes(
        line(
            event("role_end", role="tester", status="ok", message="all\x1b[31m good\r\nopsmgr: fake \x9b2J\u202e\x07é")
        )
        + line(event("evil\x1b]0;title\x07", iteration=12))
    )

    shown, said, code = on_a_terminal(here, "watch", "--from-start", lines=2)

    assert (said, code) == ("", 130)
    assert len(shown) == 2
    for text in shown:
        assert text.isprintable(), text
    assert shown[0].split()[:6] == ["2026-01-02T03:04:05Z", "#1", "1", "role_end", "tester", "ok"]
    assert "é" in shown[0]
    assert shown[1].split()[1:3] == ["#2", "12"]


def test_on_a_terminal_json_is_shown_when_asked_for(here: _Loop) -> None:
    shown, _, _ = on_a_terminal(here, "watch", "--from-start", "--json", lines=2)

    assert [json.loads(text)["cursor"]["eventLineOffset"] for text in shown[:2]] == [1, 2]


def test_on_a_terminal_a_reconcile_is_one_sentence_without_control_characters(here: _Loop) -> None:
    here.append(line(event("evil\x1b[2J\n\x9b31m\u202e")))

    shown, said, code = on_a_terminal(here, "reconcile", lines=1)

    assert (said, code) == ("", 0)
    [sentence] = shown
    assert sentence.isprintable(), sentence
    assert sentence.startswith(f"{here.name}: none -> awaiting_approval on event:evil")


def test_on_a_terminal_a_control_is_one_sentence_with_its_key_and_without_control_characters(here: _Loop) -> None:
    here.append(line(event("evil\x1b[2J\n")))
    put(here.log.parent / "approval.json", {"status": "pending", "run_id": "x\x1b[2J"})

    words = ["--intent", "approve", "--by", "ada", "--timeout-seconds", "0"]
    shown, said, code = on_a_terminal(here, "control", *words, lines=1)

    assert (said, code) == ("", 2)
    [sentence] = shown
    assert sentence.isprintable(), sentence
    assert sentence.startswith("approve ambiguous, timeout: decision recorded")
    assert here.intents[0]["idempotencyKey"] in sentence


# Errors


def test_a_loop_that_is_not_there_is_one_line_on_stderr(loop: _Loop) -> None:
    for command in ("snapshot", "watch"):
        ended = run(command, "--repo", loop.repo, "--loop", "absent", *loop.via, env=loop.env)

        assert "required artifact root missing" in assert_one_line(ended, 1, "LOOP_NOT_FOUND")
        assert ended.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["snapshot"],
        ["events"],
        ["reconcile"],
        ["watch"],
        ["confirm", "--intent", "cancel"],
        ["control", "--intent", "cancel", "--by", "ada"],
    ],
    ids=lambda words: words[0],
)
def test_with_json_every_command_prints_an_error_document(here: _Loop, words: list[str]) -> None:
    ended = run(*words, "--repo", here.repo, "--loop", "absent", *here.via, "--json", env=here.env)

    error = error_in(ended, 1)
    assert ended.stderr == ""
    assert (error["code"], error["status"]) == ("loop_not_found", "NOT_FOUND")
    assert (error["retryable"], error["executed"], error["attempts"]) == (False, False, 1)


def test_with_json_a_projection_that_is_refused_prints_an_error_document(here: _Loop, taken: _Files) -> None:
    taken.snapshot.unlink()

    ended = project(here, taken, "--json")

    assert error_in(ended, 1)["reason"] == "INPUT_INVALID"


@pytest.mark.parametrize("json_words", [[], ["--json"]])
def test_a_repo_that_is_not_there_is_refused_and_not_made(
    tmp_path: Path, env: dict[str, str], json_words: list[str]
) -> None:
    for command in ("snapshot", "reconcile"):
        ended = run(command, "--repo", tmp_path / "no", "--loop", "demo", *json_words, env=env)

        if json_words:
            assert error_in(ended, 1)["reason"] == "INPUT_INVALID"
        else:
            assert_one_line(ended, 1, "INPUT_INVALID")
    assert not (tmp_path / "no").exists()


def test_a_token_that_is_not_the_agents_is_refused_at_once(repo: Path, agent: str, env: dict[str, str]) -> None:
    loop = _Loop(
        repo=repo,
        name="played",
        via=["--transport", "sprite_service", "--service-target", agent],
        env={**env, "OPS_MANAGER_SERVICE_TOKEN": "another"},
    )

    assert_one_line(loop.opsmgr("snapshot"), 1, "TOKEN_INVALID")
    error = error_in(loop.opsmgr("snapshot", "--json"), 1)
    assert (error["phase"], error["status"]) == ("auth", "UNAUTHENTICATED")


def test_no_token_is_refused(repo: Path, agent: str, env: dict[str, str]) -> None:
    loop = _Loop(
        repo=repo,
        name="played",
        via=["--transport", "sprite_service", "--service-target", agent],
        env={name: value for name, value in env.items() if name != "OPS_MANAGER_SERVICE_TOKEN"},
    )

    assert_one_line(loop.opsmgr("events"), 1, "TOKEN_MISSING")


def test_without_an_answer_a_control_exits_with_3_and_says_that_nothing_was_sent(nowhere: _Loop) -> None:
    (nowhere.repo / ".superloop").mkdir(parents=True, exist_ok=True)

    ended = nowhere.opsmgr("control", "--intent", "cancel", "--by", "ada", timeout=NO_ANSWER_WITHIN)

    assert ended.returncode == 3
    assert ended.stdout == ""
    hint, failure = ended.stderr.splitlines()
    [recorded] = nowhere.intents
    assert "nothing was sent" in hint
    assert failure.endswith("[NOT_REACHED]")
    assert recorded["status"] == "failed_command"


def test_without_an_answer_the_error_document_tells_the_calls_that_were_made(nowhere: _Loop) -> None:
    ended = nowhere.opsmgr("snapshot", "--json", timeout=NO_ANSWER_WITHIN)

    error = error_in(ended, 3)
    assert (error["code"], error["phase"], error["retryable"]) == ("not_reached", "connect", True)
    assert error["executed"] is False
    assert error["attempts"] > 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["unknown"],
        ["snapshot"],
        ["snapshot", "--loop", "demo"],
        ["snapshot", "--loop", "demo", "--repo", ".", "--unknown"],
        ["snapshot", "--loop", "demo", "--repo", ".", "extra"],
        ["snapshot", "--loop", "demo", "--transport", "carrier-pigeon"],
        ["snapshot", "--loop", "demo", "--transport", "sprite_service"],
        ["snapshot", "--loop", "demo", "--transport", "sprite_service", "--service-target", "nonsense"],
        ["snapshot", "--loop", "demo", "--transport", "sprite_service", "--service-target", "unix:"],
        ["snapshot", "--loop", "demo", "--transport", "sprite_service", "--service-target", "127.0.0.1:99999"],
        ["snapshot", "--loop", "demo", "--transport", "sprite_service", "--service-target", "192.0.2.1:50051"],
        ["snapshot", "--loop", "demo", "--transport", "sprite_service", "--service-target", "example.org:50051"],
        ["events", "--loop", "demo", "--repo", ".", "--max-events", "-1"],
        ["events", "--loop", "demo", "--repo", ".", "--max-events", "many"],
        ["project", "--loop", "demo", "--snapshot-file", "s", "--events-file", "e"],
        ["project", "--loop", "demo", "--repo", "."],
        ["control", "--loop", "demo", "--repo", "."],
        ["control", "--loop", "demo", "--repo", ".", "--intent", "restart"],
        ["control", "--loop", "demo", "--repo", ".", "--intent", "cancel", "--timeout-seconds", "1000"],
        ["control", "--loop", "demo", "--repo", ".", "--intent", "cancel", "--timeout-seconds", "soon"],
        ["confirm", "--loop", "demo", "--repo", ".", "--intent", "cancel", "--interval-seconds", "0"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_called_wrongly_exits_with_64_and_says_why(
    words: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    ended = run(*words, env=env, cwd=tmp_path)

    assert ended.returncode == 64, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert "Error: " in ended.stderr or words == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../x", "", "a\nb", "x" * 65, "x" * 300], ids=lambda name: repr(name[:9]) + str(len(name))
)
@pytest.mark.parametrize(
    "words",
    [["snapshot"], ["events"], ["reconcile"], ["control", "--intent", "cancel", "--by", "ada"]],
    ids=lambda words: words[0],
)
def test_a_loop_id_that_is_no_plain_name_is_refused_and_nothing_is_written_outside(
    tmp_path: Path, env: dict[str, str], words: list[str], name: str
) -> None:
    """H5, H6."""
    (tmp_path / "repo" / ".superloop" / "loops").mkdir(parents=True)

    ended = run(*words, "--repo", tmp_path / "repo", f"--loop={name}", env=env)

    assert_one_line(ended, 1, "LOOP_ID_INVALID")
    outside = tmp_path / "repo" / ".superloop" / "ops-manager"
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(outside)]
    assert written == []


@pytest.mark.parametrize("name", ["../x", "../../../x", "a/../../x"])
def test_a_projection_of_such_a_loop_id_is_refused_and_nothing_is_written(
    taken: _Files, tmp_path: Path, env: dict[str, str], name: str
) -> None:
    snapshot = json.loads(taken.snapshot.read_bytes())
    put(taken.snapshot, {**snapshot, "source": {**snapshot["source"], "loopId": name}})
    taken.events.write_text("")
    (tmp_path / "r").mkdir()
    before = sorted(tmp_path.rglob("*"))

    ended = run("project", "--repo", tmp_path / "r", "--loop", name, *taken.words, env=env)

    assert ended.returncode == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loop_that_is_a_link_out_of_the_repo_is_refused(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "repo" / ".superloop" / "loops").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "events.jsonl").write_bytes(line(event("secret")))
    (tmp_path / "repo" / ".superloop" / "loops" / "demo").symlink_to(tmp_path / "outside")

    ended = run("events", "--repo", tmp_path / "repo", "--loop", "demo", env=env)

    assert_one_line(ended, 1, "ARTIFACT_NOT_REGULAR")
    assert "secret" not in ended.stdout


@pytest.mark.parametrize(
    "words", [["--loop", b"\xff"], ["--loop", "demo", "--trace-id", b"\xff"]], ids=["loop", "trace"]
)
def test_an_argument_that_is_no_text_is_an_error_and_no_traceback(
    repo: Path, via: list[str], env: dict[str, str], words: list[str | bytes]
) -> None:
    ended = run("snapshot", "--repo", repo, *words, *via, env=env)

    assert "Traceback" not in ended.stderr
    assert ended.returncode in {1, 64}
    assert ended.stderr


@pytest.mark.parametrize(
    ("command", "option"),
    [("approve", "--note"), ("approve", "--target"), ("approve", "--by"), ("loops", "--sprite-id")],
)
def test_an_argument_that_is_no_text_is_named_as_it_was_given(
    repo: Path, env: dict[str, str], command: str, option: str
) -> None:
    ended = run(command, "--repo", repo, option, b"gr\xfcn", env=env)

    assert ended.returncode == 64
    assert ended.stderr.endswith(f"Error: {option} 'gr\\udcfcn' is not valid UTF-8\n")


def test_with_json_a_path_that_is_no_text_is_in_an_error_document(tmp_path: Path, env: dict[str, str]) -> None:
    ended = run("snapshot", "--json", "--loop", "demo", "--repo", os.fsencode(tmp_path) + b"/\xff", env=env)

    assert "\\udcff" in error_in(ended, 1)["message"]


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"{TOKEN}é", f"{TOKEN}\x01"])
def test_a_token_that_can_not_be_sent_is_an_error_and_never_shown(
    repo: Path, agent: str, env: dict[str, str], token: str
) -> None:
    words = ["--repo", str(repo), "--loop", "played", "--transport", "sprite_service", "--service-target", agent]

    ended = run("snapshot", *words, env={**env, "OPS_MANAGER_SERVICE_TOKEN": token})

    assert TOKEN not in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr
    assert ended.returncode in {1, 64}


def test_the_token_never_shows(repo: Path, agent: str, env: dict[str, str], tmp_path: Path) -> None:
    copied(repo, "secretive")
    via = ["--transport", "sprite_service", "--service-target", agent]
    loop = _Loop(repo=repo, name="secretive", via=via, env=env)
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    secret.chmod(0o644)
    said = []
    for words in (
        ["snapshot", "--json"],
        ["events"],
        ["reconcile"],
        ["control", "--intent", "reject", "--by", "ada"],
        ["snapshot", "--service-token-file", str(secret)],
    ):
        ended = loop.opsmgr(words[0], *words[1:])
        said.append(ended.stdout + ended.stderr)

    assert said[-1].count("can be read by others; chmod 600 it") == 1
    for text in said:
        assert TOKEN not in text
    for path in loop.store.folder.rglob("*"):
        assert path.is_dir() or TOKEN not in path.read_text()


def test_a_token_file_is_used(repo: Path, agent: str, env: dict[str, str], tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    secret.chmod(0o600)
    words = ["--transport", "sprite_service", "--service-target", agent, "--service-token-file", str(secret)]
    loop = _Loop(repo=repo, name="played", via=words, env={**env, "OPS_MANAGER_SERVICE_TOKEN": "another"})

    assert len(documents(loop.opsmgr("snapshot"))) == 1


# Readers that go away


def read_a_line_and_go(loop: _Loop, *words: str) -> tuple[Json, str, int]:
    """Reads one line of a command's output and closes the pipe: that line, stderr and the exit code."""
    command: list[str | Path] = [PROGRAMS / "opsmgr", words[0], *loop.words, *words[1:]]
    with subprocess.Popen(command, env=loop.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            first = process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read()
            process.wait(DEADLINE)
        finally:
            process.kill()
    return json.loads(first), said, process.returncode


@pytest.mark.parametrize("words", [["events"], ["watch", "--from-start"]], ids=lambda words: words[0])
def test_a_reader_that_has_heard_enough_ends_the_command_without_a_traceback(here: _Loop, words: list[str]) -> None:
    here.append(*[line(event("tick", message="x" * 1000))] * 500)

    first, said, code = read_a_line_and_go(here, *words)

    assert first["cursor"]["eventLineOffset"] == 1
    assert (said, code) == ("", 1)


def test_an_agent_outlives_a_client_that_goes_away_in_the_middle_of_a_stream(
    tmp_path: Path, env: dict[str, str]
) -> None:
    files = LoopFiles(tmp_path / "repo")
    files.append(*[line(event("tick", message="x" * 1000))] * 1000)
    with serving(files.repo, env, tmp_path) as address:
        via = ["--transport", "sprite_service", "--service-target", address]
        loop = _Loop(repo=files.repo, name=LOOP, via=via, env=env)

        _, said, code = read_a_line_and_go(loop, "events")
        assert (said, code) == ("", 1)

        assert len(documents(loop.opsmgr("events"))) == 1000


def test_a_full_disk_behind_stdout_is_an_error_and_no_traceback(here: _Loop, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor.json"
    with Path("/dev/full").open("w") as full:
        ended = here.opsmgr("events", "--cursor-file", cursor, stdout=full, stderr=subprocess.PIPE)

    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.returncode == 1
    assert not cursor.exists()


def test_output_is_utf_8_whatever_the_terminal_speaks(here: _Loop) -> None:
    here.append('{"timestamp":"2026-01-02T03:04:05Z","event":"tick","message":"日本é"}\n'.encode())

    ended = subprocess.run(
        [PROGRAMS / "opsmgr", "events", *here.words],
        capture_output=True,
        check=False,
        env={**here.env, "PYTHONIOENCODING": "latin-1"},
        timeout=DEADLINE,
    )

    assert (ended.returncode, ended.stderr) == (0, b"")
    assert json.loads(ended.stdout.splitlines()[-1])["event"]["message"] == "日本é"


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, env: dict[str, str]) -> None:
    ended = run(command, "--help", env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"Usage: opsmgr {command} ")


def test_the_help_names_every_command_and_exit_code(env: dict[str, str]) -> None:
    ended = run("--help", env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert set(re.findall(r"^  ([a-z]+)  ", ended.stdout, re.MULTILINE)) >= set(COMMANDS)
    for code in ("0", "1", "2", "3", "64"):
        assert re.search(rf"\b{code}\b", ended.stdout)


@pytest.mark.parametrize("program", ["opsmgr", "sprite-agent"])
def test_the_version_is_told(program: str, env: dict[str, str]) -> None:
    ended = subprocess.run(
        [PROGRAMS / program, "--version"], capture_output=True, check=False, env=env, text=True, timeout=DEADLINE
    )

    assert (ended.returncode, ended.stdout) == (0, f"{program}, version {__version__}\n")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("opsmgr.cli", ["--help"]),
        ("opsmgr.cli", ["snapshot", "--help"]),
        ("opsmgr.cli", ["--version"]),
        ("sprite_agent.cli", ["--help"]),
        ("sprite_agent.cli", ["serve", "--help"]),
        ("sprite_agent.cli", ["--version"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_help_does_not_wait_for_grpc(module: str, words: list[str], env: dict[str, str]) -> None:
    script = (
        f"import sys; from {module} import main\n"
        f"main({words!r}, standalone_mode=False)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'grpc', 'google', 'asyncio'}))"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, env=env, text=True, timeout=DEADLINE
    )

    found = ended.stdout.splitlines()[-1]
    assert "grpc" not in found
    assert "google" not in found


def test_the_local_transport_does_not_wait_for_grpc_either(here: _Loop) -> None:
    script = (
        "import sys; from opsmgr.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('grpc' in sys.modules)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script, "snapshot", *here.words],
        capture_output=True,
        check=True,
        env=here.env,
        text=True,
        timeout=DEADLINE,
    )

    assert ended.stdout.splitlines()[-1] == "False"
