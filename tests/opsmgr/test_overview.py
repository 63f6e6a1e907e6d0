"""A fleet at a glance: which target comes first, what its row says, and whose word counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr import overview, store
from opsmgr.cursors import Position, save_cursor
from opsmgr.targets import Target
from sprite_agent.contract import clock
from sprite_agent.contract.validation import validate
from support.repos import LOOP
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from concurrent.futures import Future

    from support.repos import LoopFiles

Json = dict[str, Any]

TROUBLES: list[tuple[str, Json]] = [
    ("critical", {"health": "critical"}),
    ("frozen", {"frozen": "the journal went backwards"}),
    ("unreachable", {"reach": "unreachable"}),
    ("pending", {"hasPendingApproval": True}),
    ("degraded", {"health": "degraded"}),
    ("reconnecting", {"reach": "reconnecting"}),
    ("healthy", {"health": "healthy", "reach": "connected"}),
]
"""Each kind of trouble, the worst first."""


def target_in(folder: Path, name: str = LOOP) -> Target:
    return Target(name=name, loop=LOOP, repo=folder, folder=folder / "manager")


def row(name: str, **members: Any) -> Json:
    target = target_in(Path("/nowhere"), name)
    built = overview.build_row(target, state=None, health=None, frozen=None, error=None, cursor_line=0, updated_at=None)
    return {**built, **members}


def status(*rows: Json, pid: int | None = None, age: float = 0.0) -> Json:
    written = datetime.now(UTC) - timedelta(seconds=age)
    return {
        "schemaVersion": "v1",
        "updatedAt": written.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "pid": os.getpid() if pid is None else pid,
        "startedAt": clock.now(),
        "targets": list(rows),
    }


@pytest.mark.parametrize("worse", range(len(TROUBLES) - 1))
def test_each_kind_of_trouble_comes_before_the_next(worse: int) -> None:
    # Names that would sort the other way round.
    first, second = row("z", **TROUBLES[worse][1]), row("a", **TROUBLES[worse + 1][1])

    assert [each["name"] for each in overview.worst_first([second, first])] == ["z", "a"]


def test_targets_in_the_same_trouble_are_in_the_order_of_their_names() -> None:
    rows = [row(name, health="degraded") for name in ("c", "a", "b")]

    assert [each["name"] for each in overview.worst_first(rows)] == ["a", "b", "c"]


def test_a_target_is_placed_by_the_worst_of_its_troubles() -> None:
    both = row("both", health="critical", hasPendingApproval=True, reach="unreachable")

    assert overview.trouble(both) == overview.trouble(row("one", health="critical"))


def test_a_row_of_a_target_never_worked_on_keeps_the_contract(repo: LoopFiles) -> None:
    document = overview.read_status([target_in(repo.repo)])

    validate("manager_status", document)
    [found] = document["targets"]
    assert (found["lifecycle"], found["health"], found["cursorLine"], found["error"]) == (None, None, 0, None)


@pytest.mark.parametrize("content", ["{torn", '{"status": "unknown"}'])
def test_a_file_that_is_not_what_it_should_be_is_told_in_its_row_and_spoils_no_other(
    repo: LoopFiles, tmp_path: Path, content: str
) -> None:
    broken, sound = target_in(repo.repo, "broken"), target_in(tmp_path, "sound")
    save_cursor(sound.store().cursor, Position(line=3, line_count=3), repo_path=str(tmp_path), loop_id=LOOP)
    broken.store().folder.mkdir(parents=True)
    broken.store().health.write_text(content)

    first, second = overview.read_status([broken, sound])["targets"]

    assert first["error"]["reason"] == "INPUT_INVALID"
    assert str(broken.store().health) in first["error"]["message"]
    assert (second["error"], second["cursorLine"]) == (None, 3)


def test_what_a_daemon_at_work_tells_counts(tmp_path: Path) -> None:
    told = status(row("demo", reach="connected"))
    store.save(tmp_path / "status.json", told)

    assert overview.load_daemons(tmp_path / "status.json") == told


def test_what_a_daemon_told_long_ago_does_not_count(tmp_path: Path) -> None:
    store.save(tmp_path / "status.json", status(row("demo"), age=overview.FRESH_SECONDS + 5))

    assert overview.load_daemons(tmp_path / "status.json") is None


def test_what_a_daemon_told_of_a_time_to_come_does_not_count(tmp_path: Path) -> None:
    store.save(tmp_path / "status.json", status(row("demo"), age=-overview.FRESH_SECONDS - 5))

    assert overview.load_daemons(tmp_path / "status.json") is None


@pytest.mark.parametrize(("age", "counts"), [(0, True), (overview.FRESH_SECONDS + 5, False)], ids=["now", "long ago"])
def test_what_a_daemon_of_another_user_told_counts_as_long_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, *, counts: bool
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError  # as for pid 1, for everybody but root

    monkeypatch.setattr(os, "kill", refused)
    store.save(tmp_path / "status.json", status(row("demo"), age=age))

    assert (overview.load_daemons(tmp_path / "status.json") is not None) is counts


def test_what_a_process_told_that_there_can_not_be_does_not_count(tmp_path: Path) -> None:
    store.save(tmp_path / "status.json", status(row("demo"), pid=2**40))

    assert overview.load_daemons(tmp_path / "status.json") is None


def test_what_a_daemon_told_that_has_ended_does_not_count(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(DEADLINE)
    store.save(tmp_path / "status.json", status(row("demo"), pid=ended.pid))

    assert overview.load_daemons(tmp_path / "status.json") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid":1}'], ids=["empty", "torn", "list", "other"])
def test_a_status_file_that_is_none_does_not_count(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)

    assert overview.load_daemons(tmp_path / "status.json") is None


def test_no_status_file_is_no_daemon(tmp_path: Path) -> None:
    assert overview.load_daemons(tmp_path / "status.json") is None


def test_the_last_records_go_on_into_the_logs_of_before(tmp_path: Path) -> None:
    log = tmp_path / "escalations.jsonl"
    size = len(json.dumps({"number": 0}, separators=(",", ":"))) + 1
    for number in range(7):
        store.append(log, {"number": number}, rotate_bytes=2 * size)
    assert len(store.logs(log)) > 1  # it has rotated

    assert [record["number"] for record in overview.last_records(log, 5)] == [2, 3, 4, 5, 6]


def test_no_record_is_missed_or_told_twice_where_the_log_is_rotated_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "escalations.jsonl"
    for number in range(3):
        store.append(log, {"number": number}, rotate_bytes=1)
    listed = store.logs
    appending: list[Future[None]] = []
    with ThreadPoolExecutor() as pool:

        def then_appended(path: Path) -> list[Path]:
            found = listed(path)
            appending.append(pool.submit(store.append, log, {"number": 3}, rotate_bytes=1))
            wait(appending, timeout=0.2)  # it waits in turn; without that it would have rotated by now
            return found

        monkeypatch.setattr(store, "logs", then_appended)
        found = overview.last_records(log, 10)

    assert [record["number"] for record in found] == [0, 1, 2]
    assert [each.exception() for each in appending] == [None]


def test_a_torn_record_hides_none_of_the_others(tmp_path: Path) -> None:
    log = tmp_path / "escalations.jsonl"
    store.append(log, {"number": 1})
    with log.open("ab") as file:
        file.write(b'{"number":')  # a manager was killed here
    store.append(log, {"number": 2})

    assert [record["number"] for record in overview.last_records(log, 5)] == [1, 2]
