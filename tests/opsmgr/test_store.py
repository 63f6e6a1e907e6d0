"""The manager's files survive what happens to files: full disks, kills at any moment, two managers at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr import store as files
from opsmgr.errors import InputInvalid, LoopLocked
from opsmgr.store import LoopStore
from sprite_agent.errors import ContractError
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Iterator

OLD = {"schemaVersion": "v1", "line": 1}
NEW = {"schemaVersion": "v1", "line": 2, "text": "x" * 5000}

HOLDER = """
import sys
from pathlib import Path
from opsmgr.store import LoopStore

with LoopStore(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""
KILLED_BEFORE_THE_RENAME = """
import os, signal, sys
from pathlib import Path
from opsmgr import store

Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.save(Path(sys.argv[1]), {"line": 2})
"""
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from opsmgr import store
from opsmgr.errors import InputInvalid

path, allowed, write = Path(sys.argv[1]), int(sys.argv[2]), getattr(store, sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed))
try:
    write(path, {"line": 2, "text": "x" * 5000})
except InputInvalid as error:
    print(error)
"""


def python(script: str, *words: object, code: int = 0) -> str:
    """What a program of its own prints that runs `script`."""
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert ended.returncode == code, ended.stderr
    return ended.stdout


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock of the loop in `folder`; gives the process."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


# Documents.


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    document: dict[str, Any] = {"text": "é\u2028", "null": None, "big": 2**64, "list": [1, 1.5, True], "object": {}}

    files.save(tmp_path / "state.json", document)

    assert files.load(tmp_path / "state.json") == document


def test_a_saved_file_is_for_people_to_read_and_ends_with_a_newline(tmp_path: Path) -> None:
    files.save(tmp_path / "state.json", {"a": {"b": 1}})

    assert (tmp_path / "state.json").read_text() == '{\n  "a": {\n    "b": 1\n  }\n}\n'


def test_saving_makes_the_folders_it_needs(tmp_path: Path) -> None:
    files.save(tmp_path / "a" / "b" / "state.json", OLD)

    assert files.load(tmp_path / "a" / "b" / "state.json") == OLD


def test_a_reader_that_has_the_old_file_open_keeps_reading_the_old_one(tmp_path: Path) -> None:
    files.save(tmp_path / "state.json", OLD)
    with (tmp_path / "state.json").open() as reader:
        files.save(tmp_path / "state.json", NEW)

        assert json.load(reader) == OLD
    assert files.load(tmp_path / "state.json") == NEW


def test_saving_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    for document in (OLD, NEW):
        files.save(tmp_path / "state.json", document)

    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    files.save(tmp_path / "state.json", OLD)

    said = python(ON_A_FULL_DISK, tmp_path / "state.json", 100, "save")

    assert said == f"{tmp_path}/state.json can't be written: File too large\n"
    assert files.load(tmp_path / "state.json") == OLD
    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_a_rename_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "state.json").mkdir()

    with pytest.raises(InputInvalid, match=r"state\.json can't be written: Is a directory"):
        files.save(tmp_path / "state.json", NEW)

    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_a_manager_killed_between_write_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    files.save(tmp_path / "state.json", OLD)

    python(KILLED_BEFORE_THE_RENAME, tmp_path / "state.json", code=-signal.SIGKILL)

    assert files.load(tmp_path / "state.json") == OLD


def test_what_json_has_no_form_for_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    files.save(tmp_path / "state.json", OLD)

    with pytest.raises(ContractError):
        files.save(tmp_path / "state.json", {"lag": float("nan")})

    assert files.load(tmp_path / "state.json") == OLD
    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_a_folder_that_is_a_file_is_a_refusal_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "folder").touch()

    with pytest.raises(InputInvalid, match=r"folder/state\.json can't be written"):
        files.save(tmp_path / "folder" / "state.json", NEW)


# Loading.


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert files.load(tmp_path / "state.json") is None


def test_a_document_that_has_to_be_there_and_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputInvalid, match=r"snapshot\.json is not there"):
        files.load_document(tmp_path / "snapshot.json")


@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"', b"null", b"true"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)

    with pytest.raises(InputInvalid, match=r"state\.json is no JSON object"):
        files.load(tmp_path / "state.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" ",
        b"{",
        b'{"a": 1',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b"\0" * 40,
    ],
)
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)

    with pytest.raises(InputInvalid, match=r"state\.json is not JSON"):
        files.load(tmp_path / "state.json")


def test_what_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)

    with pytest.raises(InputInvalid, match="nested deeper"):
        files.load(tmp_path / "state.json")


def test_a_folder_in_a_files_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputInvalid, match="can't be read: Is a directory"):
        files.load(tmp_path)


def test_lines_are_loaded_in_order_and_blank_ones_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.ndjson").write_bytes(b'\n{"a":1}\r\n \n{"a":2}')

    assert files.load_lines(tmp_path / "events.ndjson") == [{"a": 1}, {"a": 2}]


def test_a_line_that_is_no_object_is_refused_and_its_number_named(tmp_path: Path) -> None:
    (tmp_path / "events.ndjson").write_bytes(b'{"a":1}\n\n[2]\n')

    with pytest.raises(InputInvalid, match=r"events\.ndjson line 3 is no JSON object"):
        files.load_lines(tmp_path / "events.ndjson")


def test_lines_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputInvalid, match="can't be read: No such file"):
        files.load_lines(tmp_path / "events.ndjson")


# Logs.


def test_each_append_is_one_line_whatever_it_says(tmp_path: Path) -> None:
    log = tmp_path / "telemetry" / "reconcile.jsonl"
    documents: list[dict[str, Any]] = [{"note": "two\nlines\r\u2028"}, {"nothing": None}, {"nested": {"a": [1]}}]

    for document in documents:
        files.append(log, document)

    assert log.read_bytes().count(b"\n") == 3
    assert [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]] == documents


def test_appends_of_several_managers_never_mix(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from opsmgr import store\n"
        "for number in range(200): store.append(Path(sys.argv[1]), {'who': sys.argv[2], 'text': 'x' * 3000})"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log.jsonl"), who]) for who in ("a", "b", "c")
    ]
    for writer in writers:
        assert writer.wait(DEADLINE) == 0

    found = [json.loads(line)["who"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(found) == ["a"] * 200 + ["b"] * 200 + ["c"] * 200


def test_an_append_that_fits_only_in_part_is_an_error(tmp_path: Path) -> None:
    files.append(tmp_path / "intents.jsonl", OLD)

    said = python(ON_A_FULL_DISK, tmp_path / "intents.jsonl", 1000, "append")

    assert said.startswith(f"{tmp_path}/intents.jsonl can't be written")


def test_an_append_that_fits_only_in_part_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    python(ON_A_FULL_DISK, tmp_path / "intents.jsonl", 1000, "append")

    files.append(tmp_path / "intents.jsonl", OLD)

    assert files.last_line(tmp_path / "intents.jsonl") == OLD


def test_the_last_line_of_a_log_is_its_last_complete_one(tmp_path: Path) -> None:
    (tmp_path / "intents.jsonl").write_bytes(b'{"n":1}\n{"n":2}\n{"n":')

    assert files.last_line(tmp_path / "intents.jsonl") == {"n": 2}


@pytest.mark.parametrize("content", [b"", b'{"n":1}', b"no json\n", b"[]\n", b'{"n":1}\n\n'])
def test_a_log_whose_last_line_can_not_be_read_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "intents.jsonl").write_bytes(content)

    assert files.last_line(tmp_path / "intents.jsonl") is None


def test_a_log_that_is_not_there_has_no_last_line(tmp_path: Path) -> None:
    assert files.last_line(tmp_path / "intents.jsonl") is None


def test_the_last_line_of_a_long_log_is_found(tmp_path: Path) -> None:
    with (tmp_path / "intents.jsonl").open("w") as log:
        log.writelines(f'{{"n":{number},"text":"{"x" * 1000}"}}\n' for number in range(1000))

    assert (files.last_line(tmp_path / "intents.jsonl") or {})["n"] == 999


# Rotation.


def test_appends_of_several_processes_across_rotations_are_each_there_exactly_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    script = (
        "import sys; from pathlib import Path; from opsmgr import store; store.KEPT = 1000\n"
        "for number in range(150):\n"
        "    store.append(Path(sys.argv[1]), {'who': sys.argv[2], 'number': number}, rotate_bytes=1000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(log), who]) for who in ("a", "b", "c")]
    for writer in writers:
        assert writer.wait(DEADLINE) == 0

    texts = [path.read_text() for path in tmp_path.iterdir()]
    assert len(texts) > 10
    assert all(len(text) <= 1000 and text.endswith("\n") for text in texts)
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    assert sorted((line["who"], line["number"]) for line in lines) == [
        (who, number) for who in ("a", "b", "c") for number in range(150)
    ]


def test_a_log_is_rotated_before_it_gets_too_long_and_the_oldest_goes(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    for number in range(8):
        files.append(log, {"n": number}, rotate_bytes=1)

    assert [json.loads(path.read_text())["n"] for path in files.logs(log)] == [2, 3, 4, 5, 6, 7]
    assert files.logs(log)[-1] == log


def test_a_rotation_fills_the_gap_that_a_killed_one_has_left(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for age, path in enumerate((log, *(tmp_path / f"log.jsonl.{age}" for age in (1, 3, 4, 5)))):
        path.write_text(f'{{"n":{-age}}}\n')

    files.append(log, {"n": 1}, rotate_bytes=1)

    assert [json.loads(path.read_text())["n"] for path in files.logs(log)] == [-4, -3, -2, -1, 0, 1]


@pytest.mark.parametrize("content", [None, b"", b'{"torn":'])
def test_the_last_line_is_found_right_after_a_rotation(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "log.jsonl.1").write_bytes(b'{"n":1}\n{"n":2}\n')
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content)

    assert files.last_line(tmp_path / "log.jsonl") == {"n": 2}


def test_a_line_that_a_killed_process_left_torn_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"n":1}\n{"n":')

    files.append(log, {"n": 3})

    assert log.read_bytes() == b'{"n":1}\n{"n":\n{"n":3}\n'
    assert files.last_line(log) == {"n": 3}


def test_an_append_to_a_log_that_is_rotated_away_while_it_waits_goes_to_the_new_one(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"n":1}\n')
    with log.open("rb") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        script = (
            "import sys; from pathlib import Path; from opsmgr import store\nstore.append(Path(sys.argv[1]), {'n': 2})"
        )
        writer = subprocess.Popen([sys.executable, "-c", script, str(log)])
        until(lambda: _waits_for_a_lock(writer.pid), "the writer waits for the lock")
        log.replace(tmp_path / "log.jsonl.1")
    assert writer.wait(DEADLINE) == 0

    assert (tmp_path / "log.jsonl.1").read_bytes() == b'{"n":1}\n'
    assert log.read_bytes() == b'{"n":2}\n'


def _waits_for_a_lock(pid: int) -> bool:
    """Whether a process is blocked on a lock of a file, as the kernel lists them ("->" marks those that wait)."""
    return any("->" in row and f" {pid} " in row for row in Path("/proc/locks").read_text().splitlines())


# A repo that is none.


def test_nothing_is_made_in_a_repo_that_is_not_there(tmp_path: Path) -> None:
    store = LoopStore(files.default_folder(tmp_path / "mistyped", "demo"))

    with pytest.raises(InputInvalid, match="mistyped has no"), store.locked():
        pytest.fail("locked")
    with pytest.raises(InputInvalid, match=r"has no \.superloop"):
        files.save(store.state, OLD)
    with pytest.raises(InputInvalid, match=r"has no \.superloop"):
        files.append(store.intents, OLD)

    assert list(tmp_path.iterdir()) == []


# The lock.


def test_a_second_manager_is_kept_out_of_a_loop(tmp_path: Path) -> None:
    store = LoopStore(tmp_path / "loop")

    with (
        store.locked(),
        pytest.raises(LoopLocked, match=f"another manager works on {tmp_path}/loop"),
        LoopStore(tmp_path / "loop").locked(),
    ):
        pytest.fail("two managers at once")


def test_a_lock_ends_although_a_process_that_is_being_started_still_has_its_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, opened, copies = LoopStore(tmp_path / "loop"), os.open, contextlib.ExitStack()

    def copied(*where: Any, **how: Any) -> int:
        descriptor = opened(*where, **how)
        copies.callback(os.close, os.dup(descriptor))
        return descriptor

    monkeypatch.setattr(os, "open", copied)
    with copies:
        with store.locked():
            pass
        with store.locked():
            pass


def test_a_manager_of_another_process_is_kept_out_too_until_the_first_one_is_gone(tmp_path: Path) -> None:
    store = LoopStore(tmp_path / "loop")

    with held_elsewhere(tmp_path / "loop") as holder:
        with pytest.raises(LoopLocked), store.locked():
            pytest.fail("two managers at once")
        holder.kill()
        until(lambda: holder.poll() is not None, "the other manager is gone")
        with store.locked():
            pass


def test_a_lock_is_given_back_when_its_holder_fails(tmp_path: Path) -> None:
    store = LoopStore(tmp_path / "loop")
    with pytest.raises(RuntimeError), store.locked():
        raise RuntimeError

    with store.locked():
        pass


def test_managers_of_two_loops_do_not_meet(tmp_path: Path) -> None:
    with LoopStore(tmp_path / "one").locked(), LoopStore(tmp_path / "two").locked():
        pass


def test_a_loop_folder_that_can_not_be_made_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "ops-manager").touch()

    with pytest.raises(InputInvalid, match="ops-manager"), LoopStore(tmp_path / "ops-manager" / "loop").locked():
        pytest.fail("no folder, no lock")


def test_the_files_of_a_loop_are_where_the_contract_says(tmp_path: Path) -> None:
    folder = files.default_folder(tmp_path, "demo")
    store = LoopStore(folder)

    assert folder == tmp_path / ".superloop" / "ops-manager" / "demo"
    assert [
        str(path.relative_to(folder))
        for path in (
            store.state,
            store.cursor,
            store.health,
            store.heartbeat,
            store.sequence,
            store.intents,
            store.escalations,
            store.reconcile_telemetry,
            store.heartbeat_telemetry,
            store.sequence_telemetry,
            store.transport_health,
        )
    ] == [
        "state.json",
        "cursor.json",
        "health.json",
        "heartbeat.json",
        "sequence-state.json",
        "intents.jsonl",
        "escalations.jsonl",
        "telemetry/reconcile.jsonl",
        "telemetry/heartbeat.jsonl",
        "telemetry/sequence.jsonl",
        "telemetry/transport-health.json",
    ]
