"""The commands for who looks after an agent's journal: audit, journal check, journal reset."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from sprite_agent.repo import Repo
from support.repos import STANDIN, event, line
from support.runtime import SKIPS, executions, request, this_python_first
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from support.repos import LoopFiles

KEYS = ("key-1", "key-2")


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    this_python_first(monkeypatch)


@pytest.fixture
def state(repo: LoopFiles, tmp_path: Path) -> Path:
    """The state folder of a repo in which two cancels were run."""
    repo.append(line(event()))
    folder = tmp_path / "state"
    control(repo, folder, *KEYS)
    return folder


def control(repo: LoopFiles, folder: Path, *keys: str) -> None:
    served = Repo(repo.repo, state_folder=folder, runtime=str(STANDIN))
    for key in keys:
        repo.state.write_text('{"active": true}')
        served.execute(request("cancel", idempotencyKey=key, confirmation=SKIPS))
    served.close()


def program(*words: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("sprite-agent"), *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=DEADLINE,
        stdin=subprocess.DEVNULL,
    )


def call(
    repo: LoopFiles, folder: Path, *words: str, stdout: int | IO[str] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return program(*words, "--repo", str(repo.repo), "--state-dir", str(folder), stdout=stdout)


def documents(ended: subprocess.CompletedProcess[str]) -> list[Any]:
    return [json.loads(text) for text in ended.stdout.splitlines()]


def test_the_audit_tells_what_was_asked_and_how_it_came_out_and_can_be_narrowed(repo: LoopFiles, state: Path) -> None:
    everything = documents(call(repo, state, "audit"))
    of_a_key = documents(call(repo, state, "audit", "--key", "key-2", "--kind", "begun", "--kind", "done"))

    told = [(entry["kind"], entry["body"]["idempotencyKey"]) for entry in everything]
    assert told == [(kind, key) for key in KEYS for kind in ("begun", "executed", "done")]
    assert [entry["sequence"] for entry in everything] == [1, 2, 3, 4, 5, 6]
    assert [entry["sequence"] for entry in of_a_key] == [4, 6]
    assert documents(call(repo, state, "audit", "--after", "5")) == everything[5:]
    assert documents(call(repo, state, "audit", "--loop", "other")) == []


def test_a_whole_chain_is_said_to_be_whole(repo: LoopFiles, state: Path) -> None:
    ended = call(repo, state, "audit", "--verify")

    last = documents(call(repo, state, "audit"))[-1]
    whole = {"entries": 6, "head": {"sequence": 6, "hash": last["hash"]}, "fault": None}
    assert (ended.returncode, documents(ended)) == (0, [whole])


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE audit SET body = replace(body, 'ada', 'eve') WHERE sequence = 3", "entry 3"),
        ("DELETE FROM audit WHERE sequence = 4", "entry 5"),
        ("UPDATE audit SET hash = hex(randomblob(32)) WHERE sequence = 2", "entry 2"),
    ],
)
def test_a_broken_chain_is_said_to_break_where_it_breaks(
    repo: LoopFiles, state: Path, statement: str, where: str
) -> None:
    with closing(sqlite3.connect(state / "journal.sqlite3")) as tables:
        tables.execute(statement)
        tables.commit()

    verified = call(repo, state, "audit", "--verify")
    printed = call(repo, state, "audit")
    checked = call(repo, state, "journal", "check")

    assert (verified.returncode, printed.returncode, checked.returncode) == (1, 1, 1)
    assert documents(verified)[0]["fault"].startswith(where)
    assert where in printed.stderr
    assert where in documents(checked)[0]["faults"][0]


@pytest.mark.parametrize("body", ["[]", "7", "{", '{"caller":"x","loopId":[]}'])
def test_an_entry_that_somebody_has_made_something_else_of_is_printed_and_said_to_break_the_chain(
    repo: LoopFiles, state: Path, body: str
) -> None:
    with closing(sqlite3.connect(state / "journal.sqlite3")) as tables:
        tables.execute("UPDATE audit SET body = ? WHERE sequence = 2", (body,))
        tables.commit()

    printed = call(repo, state, "audit")
    asked_for = call(repo, state, "audit", "--loop", "demo")

    assert (printed.returncode, asked_for.returncode) == (1, 1)
    assert [entry["sequence"] for entry in documents(printed)] == [1, 2, 3, 4, 5, 6]
    for ended in (printed, asked_for):
        assert "the chain breaks at entry 2" in ended.stderr


def test_a_journal_that_can_be_trusted_is_said_to_have_no_faults(repo: LoopFiles, state: Path, tmp_path: Path) -> None:
    whole = call(repo, state, "journal", "check")
    none = call(repo, tmp_path / "unused", "journal", "check")

    assert (whole.returncode, documents(whole)[0]["faults"]) == (0, [])
    assert (none.returncode, documents(none)[0]["exists"]) == (0, False)


@pytest.mark.parametrize("damage", ["gone", "emptied", "not a journal", "exchanged"])
def test_a_journal_that_cannot_be_trusted_has_a_way_out(
    repo: LoopFiles, state: Path, tmp_path: Path, damage: str
) -> None:
    journal = state / "journal.sqlite3"
    before = journal.read_bytes()
    if damage == "gone":
        journal.unlink()
    elif damage == "exchanged":
        control(repo, tmp_path / "another", "key-9")
        (tmp_path / "another" / "journal.sqlite3").replace(journal)
    else:
        journal.write_bytes(b"" if damage == "emptied" else b"x" * 5000)
    damaged = journal.read_bytes() if journal.exists() else None

    checked = call(repo, state, "journal", "check")
    reset = call(repo, state, "journal", "reset", "--yes")
    checked_again = call(repo, state, "journal", "check")

    assert (checked.returncode, reset.returncode, checked_again.returncode) == (1, 0, 0)
    assert len(documents(checked)[0]["faults"]) == 1
    kept = [path for path in state.glob("journal.*.sqlite3") if path != journal]
    assert [path.read_bytes() for path in kept] == ([] if damaged is None else [damaged])
    assert journal.read_bytes() != before
    control(repo, state, "key-1")  # runs again: the new journal knows no key
    assert [found["argv"][1] for found in executions(repo)].count("cancel") == 3 + (damage == "exchanged")


def test_a_state_folder_that_cannot_be_written_is_not_reset(repo: LoopFiles, state: Path) -> None:
    before = (state / "journal.sqlite3").read_bytes()
    (state / "agent.lock").mkdir()

    ended = call(repo, state, "journal", "reset", "--yes")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(rf"Error: state folder {state} can't be written: .*--state-dir \[.*\]\n", ended.stderr)
    assert (state / "journal.sqlite3").read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [("audit",), ("audit", "--verify"), ("journal", "check"), ("journal", "reset", "--yes")],
    ids=" ".join,
)
def test_a_repo_that_is_not_there_is_refused_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))

    ended = program(*words, "--repo", str(tmp_path / "none"))

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"Error: no folder at {tmp_path / 'none'}\n"
    assert not (tmp_path / "states").exists()


def test_the_audit_outlives_the_repo(repo: LoopFiles, state: Path) -> None:
    shutil.rmtree(repo.repo)

    assert len(documents(call(repo, state, "audit"))) == 6


@pytest.mark.parametrize("words", [("audit",), ("audit", "--verify"), ("journal", "check")], ids=" ".join)
def test_what_cannot_be_written_out_is_an_error_and_no_traceback(
    repo: LoopFiles, state: Path, words: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w") as full:
        ended = call(repo, state, *words, stdout=full)

    assert (ended.returncode, ended.stderr) == (1, "Error: output can't be written: No space left on device\n")


@pytest.mark.parametrize("words", [("audit",), ("journal", "check")], ids=" ".join)
def test_a_place_where_no_journal_can_be_looked_for_is_told(
    repo: LoopFiles, tmp_path: Path, words: tuple[str, ...]
) -> None:
    journal = tmp_path / ("x" * 300) / "journal.sqlite3"

    ended = call(repo, journal.parent, *words)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"Error: journal {journal}: File name too long [JOURNAL_UNAVAILABLE]\n"


def test_a_reader_of_the_audit_who_goes_away_is_no_error(repo: LoopFiles, state: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        ended = call(repo, state, "audit", stdout=gone)

    assert ended.stderr == ""


def test_nothing_is_reset_unless_that_is_said(repo: LoopFiles, state: Path) -> None:
    before = (state / "journal.sqlite3").read_bytes()

    ended = call(repo, state, "journal", "reset")

    assert ended.returncode == 1
    assert (state / "journal.sqlite3").read_bytes() == before


def test_the_journal_of_a_serving_agent_is_not_reset(repo: LoopFiles, state: Path) -> None:
    before = (state / "journal.sqlite3").read_bytes()
    with (state / "agent.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = call(repo, state, "journal", "reset", "--yes")

    assert (ended.returncode, "stop it first" in ended.stderr) == (1, True)
    assert (state / "journal.sqlite3").read_bytes() == before


def test_a_state_folder_that_is_none_of_this_repo_has_no_entries(repo: LoopFiles, tmp_path: Path) -> None:
    ended = call(repo, tmp_path / "unused", "audit", "--verify")

    assert (ended.returncode, documents(ended)) == (0, [{"entries": 0, "head": None, "fault": None}])
    assert ended.stderr == f"sprite-agent: there is no journal at {tmp_path / 'unused'}/journal.sqlite3 yet\n"
    assert not (tmp_path / "unused").exists()
