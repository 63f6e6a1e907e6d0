"""What was asked and what came of it is recorded whatever happens to the disk; where it can't be, nothing is run."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.callers import Caller, Proof
from sprite_agent.contract.validation import violations
from sprite_agent.control import executor
from sprite_agent.control.executors import EXECUTOR
from sprite_agent.control.journal_file import open_journal
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import (
    ControlNotFound,
    InternalError,
    JournalCorrupt,
    JournalUnavailable,
    NotExecuted,
    OpsError,
    RunMismatch,
    SignatureReplayed,
)
from support.journals import opened, sql
from support.repos import LOOP, STANDIN
from support.runtime import LOOKS_ONCE, SKIPS, again, executions, mark_in, request, script, turn

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from sprite_agent.repo import Repo
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


def signed(nonce: str = "nonce-1") -> Caller:
    """A caller whose request came with a signature."""
    proof = Proof(issuer="ops-1", key_id="k-1", actor="ada", nonce=nonce, expires=time.time() + 60)
    return Caller(identity="ops-1", address="unix:", proof=proof)


def test_the_row_is_there_before_the_command_starts(make_repo: MakeRepo, state: Path, tmp_path: Path) -> None:
    """I3: a key whose command may have run has a row."""
    found = tmp_path / "found"
    program = f"state, found = {str(state)!r}, {str(found)!r}\n{LOOKS_INTO_THE_JOURNAL}"
    repo = make_repo(script(tmp_path / "superloop", program, interpreter=sys.executable))

    repo.execute(request())

    assert found.read_text() == "[('executing', 'key-1', 'approve')]"


# Who asked.


def test_who_asked_is_in_the_journal_the_audit_the_reply_and_the_decision(
    repo: Repo, loop: LoopFiles, state: Path
) -> None:
    """I14: under one key, everywhere."""
    provenance: Any = {"managerId": "m-1", "host": "h", "attempt": 2}

    result = repo.execute(request("reject", traceId="trace-1", provenance=provenance), caller=signed())

    with opened(state) as journal:
        entry = journal.find(LOOP, "key-1")
        begin, *_, end = journal.audit_entries()
    assert entry is not None
    assert entry.origin.caller["proof"]["key_id"] == "k-1"
    assert entry.origin.caller["proof"]["nonce"] == "nonce-1"
    assert entry.origin.request["provenance"] == provenance
    assert json.loads(begin.body)["caller"] == entry.origin.caller
    assert json.loads(begin.body)["command"] == result["command"]
    for told in (entry.result, result, json.loads(begin.body), json.loads(end.body)):
        assert (told["idempotencyKey"], told["traceId"], told["requestedBy"]) == ("key-1", "trace-1", "ada")
    assert mark_in(result) == f"ada@ops-1#{entry.execution_id}"
    assert json.loads(loop.approval.read_bytes())["decision"]["by"] == mark_in(result)


def test_each_step_of_a_control_is_in_the_audit(repo: Repo, loop: LoopFiles, state: Path) -> None:
    repo.execute(request("reject"))
    repo.execute(request("reject"))
    repo.execute(request("cancel", idempotencyKey="key-2"))

    with opened(state) as journal:
        assert [entry.kind for entry in journal.audit_entries()] == ["begun", "executed", "done", "not_needed"]


def test_each_step_is_in_the_audit_also_where_one_commit_takes_two(repo: Repo, state: Path) -> None:
    result = repo.execute(request(confirmation=SKIPS))

    with opened(state) as journal:
        assert [entry.kind for entry in journal.audit_entries()] == ["begun", "executed", "done"]
    assert (result["state"], result["status"]) == ("done", "executed_unconfirmed")


def test_a_refusal_leaves_no_row_and_is_in_the_audit(repo: Repo, state: Path) -> None:
    with pytest.raises(RunMismatch):
        repo.execute(request(expectedRunId="run-2"), caller=signed())

    with opened(state) as journal:
        assert journal.find(LOOP, "key-1") is None
        (entry,) = journal.audit_entries()
    body = json.loads(entry.body)
    assert (entry.kind, body["reason"], body["idempotencyKey"]) == ("refused", "RUN_MISMATCH", "key-1")
    assert body["caller"]["proof"]["nonce"] == "nonce-1"


def test_a_key_without_a_signature_of_its_own_is_not_run(repo: Repo, loop: LoopFiles) -> None:
    """The journal is the last to ask: it remembers signatures for longer than the process that saw them."""
    repo.execute(request(), caller=signed())

    loop.ask_approval()
    with pytest.raises(SignatureReplayed):
        repo.execute(request("reject", idempotencyKey="key-2"), caller=signed())
    assert repo.execute(request("reject", idempotencyKey="key-2"), caller=signed("nonce-2"))["executed"]
    assert len(executions(loop)) == 2


# A disk that is full.


class FullDisk:
    """The disk of one process's journal: full, but for the room that its ballast gives back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._connections: list[sqlite3.Connection] = []
        drop = StateFolder.drop_ballast

        def opening(path: Path) -> tuple[sqlite3.Connection, str]:
            tables, journal_id = open_journal(path)
            self._connections.append(tables)
            return tables, journal_id

        def dropping(folder: StateFolder) -> None:
            was_there = folder.ballast.exists()
            drop(folder)
            if was_there:
                self.limit(more=100)

        monkeypatch.setattr("sprite_agent.control.journal.open_journal", opening)
        monkeypatch.setattr(StateFolder, "drop_ballast", dropping)

    def limit(self, *, more: int) -> None:
        """Leaves room for so many more pages in the journal; SQLite itself says that it is full beyond that."""
        for tables in self._connections:
            (pages,) = tables.execute("PRAGMA page_count").fetchone()
            tables.execute(f"PRAGMA max_page_count = {pages + more}")


def no_room(*_: int) -> None:
    raise OSError(28, "No space left on device")


LONG = "x" * 2000


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def test_on_a_full_disk_nothing_is_run_and_the_same_request_is_run_when_there_is_room(
    full_disk: FullDisk, make_repo: MakeRepo, loop: LoopFiles
) -> None:
    """I9, before: the row comes first."""
    repo = make_repo()
    repo.execute(request("cancel"))
    full_disk.limit(more=0)

    with pytest.raises(JournalUnavailable, match="full") as refused:
        repo.execute(request(idempotencyKey="key-2", note=LONG))
    assert (refused.value.executed, refused.value.retryable) == (False, True)
    assert executions(loop) == []
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, "key-2")

    full_disk.limit(more=100)
    assert repo.execute(request(idempotencyKey="key-2", note=LONG))["executed"]
    assert len(executions(loop)) == 1


def test_without_room_for_what_a_command_does_it_is_not_run(
    make_repo: MakeRepo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I9, before: the ballast comes before the row."""
    repo = make_repo()
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(
            JournalUnavailable, match=r"there is no room in .* to record what a command does"
        ) as refused:
            repo.execute(request())
        assert refused.value.executed is False
        assert isinstance(repo.control_fault(), JournalUnavailable)
    assert executions(loop) == []

    assert repo.control_fault() is None
    assert repo.execute(request())["executed"]


def test_an_executor_without_room_for_its_result_runs_nothing(
    make_repo: MakeRepo, loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I9, between: the room for the result is taken before the command is started."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
    limited += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    python, *options, executor = EXECUTOR
    monkeypatch.setattr("sprite_agent.control.executors.EXECUTOR", (python, *options, "-c", limited, executor))
    repo = make_repo()

    with pytest.raises(NotExecuted) as refused:
        repo.execute(request())

    assert refused.value.executed is False
    assert executions(loop) == []
    with pytest.raises(ControlNotFound):
        repo.get_control(LOOP, "key-1")


def test_a_command_that_has_run_is_recorded_in_the_room_of_the_ballast(
    full_disk: FullDisk, make_repo: MakeRepo, loop: LoopFiles, state: Path
) -> None:
    """I9, after: its outcome needs room that the disk no longer has."""
    turn(loop, output="o" * 8192)
    repo = make_repo()
    repo.execute(request("cancel"))
    full_disk.limit(more=3)

    result = repo.execute(request("reject", idempotencyKey="key-2"))

    assert violations("control_result", result) == []
    assert (result["status"], result["exitCode"], result["output"]) == ("confirmed", 0, "o" * 8192)
    assert not (state / "ballast").exists()
    assert repo.get_control(LOOP, "key-2") == again(result)
    # As soon as there is room, the next one makes it good.
    assert repo.control_fault() is None
    assert (state / "ballast").exists()
    assert len(executions(loop)) == 1


def test_while_the_ballast_cannot_be_made_good_nothing_more_is_run(
    full_disk: FullDisk, make_repo: MakeRepo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn(loop, output="o" * 8192)
    repo = make_repo()
    repo.execute(request("cancel"))
    full_disk.limit(more=3)
    first = repo.execute(request("reject", idempotencyKey="key-2"))
    monkeypatch.setattr(os, "posix_fallocate", no_room)

    assert isinstance(repo.control_fault(), JournalUnavailable)
    loop.ask_approval()
    with pytest.raises(JournalUnavailable):
        repo.execute(request("reject", idempotencyKey="key-3"))
    assert repo.execute(request("reject", idempotencyKey="key-2")) == again(first)
    assert len(executions(loop)) == 1


def test_a_command_that_has_run_and_for_which_even_the_ballast_was_not_enough_is_told_later(
    full_disk: FullDisk, make_repo: MakeRepo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn(loop, output="o" * 8192)
    repo = make_repo()
    repo.execute(request("cancel"))
    monkeypatch.setattr(StateFolder, "drop_ballast", lambda _: None)
    full_disk.limit(more=3)

    with pytest.raises(InternalError) as unknown:
        repo.execute(request("reject", idempotencyKey="key-2"))
    assert unknown.value.executed is None
    full_disk.limit(more=100)

    result = repo.execute(request("reject", idempotencyKey="key-2"))
    assert (result["status"], result["exitCode"], result["output"]) == ("confirmed", 0, "o" * 8192)
    assert len(executions(loop)) == 1


# An audit or a journal that can't be written any more.

FAILS = "CREATE TRIGGER fails BEFORE INSERT ON audit WHEN NEW.kind = '{}' BEGIN SELECT RAISE(ABORT, 'no'); END"


@pytest.mark.parametrize("kind", ["executed", "done"])
@pytest.mark.parametrize("asked", [LOOKS_ONCE, SKIPS], ids=["looks", "skips"])
def test_an_outcome_that_could_not_be_audited_is_told_later_and_the_command_not_run_again(
    make_repo: MakeRepo, loop: LoopFiles, state: Path, kind: str, asked: Any
) -> None:
    """I10: it is never taken for a command that has failed."""
    repo = make_repo()
    repo.execute(request("cancel"))
    sql(state / "journal.sqlite3", FAILS.format(kind))

    for _ in range(2):
        with pytest.raises(InternalError, match="'key-2' was executed, but that could not be recorded") as unknown:
            repo.execute(request("reject", idempotencyKey="key-2", confirmation=asked))
        assert unknown.value.executed is None
    sql(state / "journal.sqlite3", "DROP TRIGGER fails")

    result = repo.execute(request("reject", idempotencyKey="key-2", confirmation=asked))
    found = (
        ("confirmed", "rejection_observed") if asked is LOOKS_ONCE else ("executed_unconfirmed", "confirmation_skipped")
    )
    assert (result["status"], result["reason"], result["exitCode"]) == (*found, 0)
    assert len(executions(loop)) == 1


def test_a_beginning_that_cannot_be_audited_is_none(make_repo: MakeRepo, loop: LoopFiles, state: Path) -> None:
    repo = make_repo()
    repo.execute(request("cancel"))
    sql(state / "journal.sqlite3", FAILS.format("begun"))

    with pytest.raises(JournalCorrupt) as refused:
        repo.execute(request(idempotencyKey="key-2"))

    assert refused.value.executed is False
    assert executions(loop) == []


def test_a_refusal_that_cannot_be_audited_is_the_same_refusal(make_repo: MakeRepo, state: Path) -> None:
    """I10: what can't be noted changes no answer."""
    repo = make_repo()
    repo.execute(request("cancel"))
    sql(state / "journal.sqlite3", FAILS.format("refused"))

    with pytest.raises(RunMismatch):
        repo.execute(request(idempotencyKey="key-2", expectedRunId="run-2"))
    repo.note_refusal({"reason": "TOKEN_MISSING"})


def test_a_refused_signature_that_cannot_be_remembered_changes_no_answer(make_repo: MakeRepo, state: Path) -> None:
    repo = make_repo()
    repo.execute(request("cancel"))
    (state / "journal.sqlite3").unlink()
    proof = signed().proof
    assert proof is not None

    repo.use_up(proof)


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


def test_what_sandbox_code_writes_about_a_key_is_no_row(repo: Repo, loop: LoopFiles, state: Path) -> None:
    """I7: neither as it would have to look, nor at the place where it would have to stand inside the repo."""
    repo.execute(request("cancel"))
    for folder in (loop.runtime, loop.folder, loop.repo / "state"):
        folder.mkdir(exist_ok=True)
        (folder / "journal.sqlite3").write_bytes((state / "journal.sqlite3").read_bytes())
        (folder / "idempotency.json").write_text('{"key-2": {"ok": true, "confirmed": true}}')

    result = repo.execute(request(idempotencyKey="key-2", confirmation=LOOKS_ONCE))

    assert (result["replayed"], result["executed"]) == (False, True)
    assert len(executions(loop)) == 1
    assert result["command"][0] == str(STANDIN)


def test_a_result_that_can_not_be_read_at_the_moment_is_not_taken_for_none(
    make_repo: MakeRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = make_repo(script(tmp_path / "superloop", "exit 3"))
    left = Path.read_bytes
    failed: list[Path] = []

    def read_bytes(path: Path) -> bytes:
        if path.name == executor.RESULT and len(failed) < 2:
            failed.append(path)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return left(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    for _ in range(2):
        with pytest.raises(InternalError) as unknown:
            repo.execute(request(confirmation=SKIPS))
        assert unknown.value.executed is None

    assert repo.execute(request(confirmation=SKIPS))["exitCode"] == 3
