"""Artifacts are read without trusting what sandbox code put at their paths."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprite_agent import artifacts
from sprite_agent.artifacts import (
    ACTIVE_RUN,
    MAX_DOCUMENT_BYTES,
    STATE,
    ArtifactFiles,
    loop_paths,
    missing_ref,
)
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import ArtifactMalformed, ArtifactNotRegular, EventsNotFound, LoopIdInvalid, LoopNotFound
from sprite_agent.repo import Repo
from support.following import come_to_rest
from support.repos import LOOP, LoopFiles, event, line, put
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = b'{"secret": "outside"}\n'

NASTY_IDS = [
    "",
    ".",
    "..",
    "...",
    "a..b",
    "a..",
    ".hidden",
    "-option",
    "_under",
    "../outside",
    "../../../outside",
    "/etc",
    "demo/",
    "demo/../demo",
    "./demo",
    "a/b",
    "a\\b",
    "demo\0",
    "demo\n",
    "\ndemo",
    "demo\r",
    " demo",
    "demo ",
    "de mo",
    "a" * 65,
    "%2e%2e",
    "~root",
    "$HOME",
    "demo*",
    "dem\N{LATIN SMALL LETTER O WITH DIAERESIS}",
    "\N{FULLWIDTH LATIN SMALL LETTER D}emo",
    "dem\N{CYRILLIC SMALL LETTER O}",
    "demo\N{FULLWIDTH DIGIT ONE}",
    "demo\N{ARABIC-INDIC DIGIT ONE}",
    "\N{ONE DOT LEADER}\N{ONE DOT LEADER}",
    "\N{TWO DOT LEADER}",
    "a\N{DIVISION SLASH}b",
    "demo\N{ZERO WIDTH SPACE}",
    "demo\N{LINE SEPARATOR}",
    "demo\udcff",
]

OF_THE_LOOP = ["events.jsonl", "run-summary.json", "approval.json", "heartbeat.v1.json"]
OF_THE_REPO = ["state.json", "active-run.json"]


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    loop = LoopFiles(tmp_path / "repo")
    loop.append(line(event()))
    return loop


@pytest.fixture
def files(loop: LoopFiles) -> ArtifactFiles:
    return ArtifactFiles(loop.repo)


@pytest.fixture
def repo(loop: LoopFiles, tmp_path: Path) -> Iterator[Repo]:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
    yield repo
    repo.close()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What a link could lead to: a whole runtime folder of another repo."""
    outside = LoopFiles(tmp_path / "outside")
    outside.rewrite(SECRET)
    for path in (outside.run_summary, outside.approval, outside.heartbeat, outside.state, outside.active_run):
        path.write_bytes(SECRET)
    return outside.repo


async def test_a_link_in_place_of_the_repo_itself_is_refused(repo: Repo, loop: LoopFiles, outside: Path) -> None:
    """Sandbox code may well own the folder that the repo is in."""
    repo.read_loop(LOOP)
    move_out(loop.repo, outside)

    with pytest.raises(ArtifactNotRegular):
        repo.read_loop(LOOP)
    with pytest.raises(ArtifactNotRegular):
        repo.loops()
    with pytest.raises(ArtifactNotRegular):
        [batch async for batch in repo.stream_events(EventQuery(loop_id=LOOP))]


def move_out(inside: Path, outside: Path) -> None:
    """Puts a link to `outside` where `inside` was."""
    if inside.exists():
        inside.rename(inside.with_name(f"{inside.name}.was"))
    inside.symlink_to(outside)


@pytest.mark.parametrize("name", OF_THE_LOOP)
def test_a_link_in_place_of_an_artifact_is_refused(repo: Repo, loop: LoopFiles, outside: Path, name: str) -> None:
    move_out(loop.folder / name, outside / ".superloop" / "loops" / LOOP / name)

    with pytest.raises(ArtifactNotRegular) as refused:
        repo.read_loop(LOOP)

    assert refused.value.details["path"] == f".superloop/loops/{LOOP}/{name}"
    assert "outside" not in str(refused.value)


@pytest.mark.parametrize("name", OF_THE_REPO)
def test_a_link_in_place_of_an_artifact_of_the_repo_is_refused(
    repo: Repo, loop: LoopFiles, outside: Path, name: str
) -> None:
    move_out(loop.runtime / name, outside / ".superloop" / name)

    with pytest.raises(ArtifactNotRegular, match=name):
        repo.read_loop(LOOP)


@pytest.mark.parametrize("component", [".superloop", ".superloop/loops", f".superloop/loops/{LOOP}"])
def test_a_link_in_place_of_a_folder_on_the_way_is_refused(
    repo: Repo, loop: LoopFiles, outside: Path, component: str
) -> None:
    move_out(loop.repo / component, outside / component)

    with pytest.raises(ArtifactNotRegular):
        repo.read_loop(LOOP)
    with pytest.raises(ArtifactNotRegular):
        ArtifactFiles(loop.repo).read_document(loop_paths(LOOP).approval)


@pytest.mark.parametrize("component", [".superloop", ".superloop/loops", f".superloop/loops/{LOOP}"])
async def test_a_link_in_place_of_a_folder_is_refused_by_a_stream(
    repo: Repo, loop: LoopFiles, outside: Path, component: str
) -> None:
    move_out(loop.repo / component, outside / component)

    with pytest.raises(ArtifactNotRegular):
        [batch async for batch in repo.stream_events(EventQuery(loop_id=LOOP))]


@pytest.mark.parametrize(
    "component", [".superloop", ".superloop/loops", f".superloop/loops/{LOOP}", f".superloop/loops/{LOOP}/events.jsonl"]
)
async def test_a_link_to_the_very_log_that_was_read_is_refused_by_a_stream_that_resumes_at_its_end(
    repo: Repo, loop: LoopFiles, component: str
) -> None:
    await come_to_rest(repo)
    token = repo.read_loop(LOOP).resume_token
    inside = loop.repo / component
    move_out(inside, inside.with_name(f"{inside.name}.was"))

    with pytest.raises(ArtifactNotRegular):
        await anext(repo.stream_events(EventQuery(loop_id=LOOP, resume_token=token, follow=True)))


def test_a_link_to_a_file_of_the_same_repo_is_refused_too(files: ArtifactFiles, loop: LoopFiles) -> None:
    put(loop.heartbeat, {"pid": 1})
    loop.approval.symlink_to(loop.heartbeat)

    with pytest.raises(ArtifactNotRegular):
        files.read_document(loop_paths(LOOP).approval)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_second_name_of_a_file_that_only_somebody_else_may_read_is_refused_if_it_goes_before_names_are_counted(
    files: ArtifactFiles, loop: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o640)
    os.chown(loop.folder, 12345, 12345)
    os.link(secret, loop.approval)
    open_file = os.open

    def then_gone(path: str, *words: int, dir_fd: int | None = None) -> int:
        descriptor = open_file(path, *words, dir_fd=dir_fd)
        if path == loop.approval.name:
            loop.approval.unlink()
        return descriptor

    monkeypatch.setattr(artifacts, "_hard_links_are_protected", lambda: False)
    monkeypatch.setattr(os, "open", then_gone)
    with pytest.raises(ArtifactNotRegular, match="may have had another name"):
        files.read_document(loop_paths(LOOP).approval)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_read_if_it_has_had_no_other_name(files: ArtifactFiles, loop: LoopFiles) -> None:
    put(loop.approval, {"status": "pending"})
    put(loop.heartbeat, {"pid": 1})
    loop.heartbeat.chmod(0o600)
    os.chown(loop.folder, 12345, 12345)

    def heartbeat() -> object:
        with contextlib.suppress(ArtifactNotRegular):
            return files.read_document(loop_paths(LOOP).heartbeat).value
        return None

    assert files.read_document(loop_paths(LOOP).approval).value == {"status": "pending"}
    assert until(heartbeat, "it is taken") == {"pid": 1}


def test_a_link_to_nowhere_is_refused_and_not_taken_for_a_missing_file(files: ArtifactFiles, loop: LoopFiles) -> None:
    loop.approval.symlink_to(loop.folder / "nothing")

    with pytest.raises(ArtifactNotRegular):
        files.read_document(loop_paths(LOOP).approval)


@pytest.mark.parametrize("name", OF_THE_LOOP)
def test_a_fifo_is_refused_and_nobody_waits_for_its_writer(repo: Repo, loop: LoopFiles, name: str) -> None:
    (loop.folder / name).unlink(missing_ok=True)
    os.mkfifo(loop.folder / name)

    with pytest.raises(ArtifactNotRegular, match=name):
        repo.read_loop(LOOP)


@pytest.mark.parametrize("name", OF_THE_LOOP)
def test_a_folder_in_place_of_a_file_is_refused(repo: Repo, loop: LoopFiles, name: str) -> None:
    (loop.folder / name).unlink(missing_ok=True)
    (loop.folder / name).mkdir()

    with pytest.raises(ArtifactNotRegular, match=name):
        repo.read_loop(LOOP)


def test_a_socket_is_refused(files: ArtifactFiles, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loop.folder)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("approval.json")

        with pytest.raises(ArtifactNotRegular):
            files.read_document(loop_paths(LOOP).approval)


@pytest.mark.parametrize("component", [".superloop", ".superloop/loops", f".superloop/loops/{LOOP}"])
def test_a_file_in_place_of_a_folder_is_refused(loop: LoopFiles, repo: Repo, component: str) -> None:
    (loop.repo / component).rename(loop.repo / "was")
    (loop.repo / component).write_bytes(SECRET)

    with pytest.raises(ArtifactNotRegular):
        repo.read_loop(LOOP)


@pytest.mark.parametrize("loop_id", NASTY_IDS)
def test_a_loop_id_that_is_no_plain_path_component_is_refused(repo: Repo, outside: Path, loop_id: str) -> None:
    with pytest.raises(LoopIdInvalid):
        repo.read_loop(loop_id)


@pytest.mark.parametrize("loop_id", NASTY_IDS)
async def test_a_stream_refuses_a_loop_id_that_is_no_plain_path_component(repo: Repo, loop_id: str) -> None:
    with pytest.raises(LoopIdInvalid):
        [batch async for batch in repo.stream_events(EventQuery(loop_id=loop_id))]


@pytest.mark.parametrize("loop_id", NASTY_IDS)
def test_control_refuses_a_loop_id_that_is_no_plain_path_component(repo: Repo, loop_id: str) -> None:
    request = {"loopId": loop_id, "intent": "cancel", "requestedBy": "me", "idempotencyKey": "k"}

    with pytest.raises(LoopIdInvalid):
        repo.execute(request)


@pytest.mark.parametrize("loop_id", ["a", "A", "0", "a" * 64, "a.b", "a-b", "a_b", "a.", "loop_2", "1.2.3-rc_4"])
def test_a_plain_path_component_is_a_loop_id(loop: LoopFiles, files: ArtifactFiles, loop_id: str) -> None:
    (loop.folder.parent / loop_id).mkdir()

    assert files.require_loop(loop_id).root == f".superloop/loops/{loop_id}"


def test_the_loops_are_the_folders_with_a_loop_id_for_a_name(loop: LoopFiles, files: ArtifactFiles) -> None:
    for name in ("b", "a.b", ".hidden", "a..b", "sp ace"):
        (loop.folder.parent / name).mkdir()
    (loop.folder.parent / "file").touch()
    (loop.folder.parent / "link").symlink_to(loop.folder)

    assert files.loops() == ["a.b", "b", LOOP]


def test_a_repo_without_a_runtime_folder_has_no_loops(tmp_path: Path) -> None:
    assert ArtifactFiles(tmp_path).loops() == []
    assert ArtifactFiles(tmp_path / "gone").loops() == []


def test_a_loop_without_a_folder_is_not_found_by_its_path(repo: Repo, loop: LoopFiles) -> None:
    with pytest.raises(LoopNotFound) as missing:
        repo.read_loop("other")

    assert str(missing.value) == f"required artifact root missing: {loop.repo}/.superloop/loops/other"


def test_a_loop_without_a_log_is_told_so_by_its_path(repo: Repo, loop: LoopFiles) -> None:
    loop.log.unlink()

    with pytest.raises(EventsNotFound) as missing:
        repo.read_loop(LOOP)

    assert str(missing.value) == f"required artifact missing: {loop.log}"


def test_a_missing_document_has_no_value_and_an_empty_reference(files: ArtifactFiles) -> None:
    found = files.read_document(STATE)

    assert found.value is None
    assert found.ref == missing_ref(STATE)
    assert found.ref == {
        "path": ".superloop/state.json",
        "exists": False,
        "sizeBytes": 0,
        "lineCount": 0,
        "sha256": None,
        "mtimeEpoch": None,
    }


def test_a_document_keeps_its_text_and_says_what_the_file_was(files: ArtifactFiles, loop: LoopFiles) -> None:
    content = b'\n{\n  "active": true,\n  "pid": 18446744073709551616,\n "x": 1.0 }  \n\n'
    put(loop.active_run, content)
    os.utime(loop.active_run, (1771824606.9, 1771824606.9))

    found = files.read_document(ACTIVE_RUN)

    assert found.value == {"active": True, "pid": 2**64, "x": 1.0}
    assert found.value.text == content.strip().decode()
    assert found.ref == {
        "path": ".superloop/active-run.json",
        "exists": True,
        "sizeBytes": len(content),
        "lineCount": 6,
        "sha256": hashlib.sha256(content).hexdigest(),
        "mtimeEpoch": 1771824606,
    }


@pytest.mark.parametrize("before", [b"", b'{"active": tr'])
def test_a_file_that_is_just_being_rewritten_is_read_again(
    files: ArtifactFiles, loop: LoopFiles, before: bytes
) -> None:
    loop.state.write_bytes(before)
    writer = threading.Timer(0.05, lambda: loop.state.write_bytes(b'{"active": true}'))
    writer.start()

    assert files.read_document(STATE).value == {"active": True}
    writer.join()


def failing(*_: object, **__: object) -> None:
    """A call of the system's that fails, as where one may not search the folder, or the disk is broken."""
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("call", ["open", "read", "stat"])
async def test_what_the_system_refuses_is_said_of_the_artifact(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    put(loop.state, {})
    await come_to_rest(repo)
    token = repo.read_loop(LOOP).resume_token
    monkeypatch.setattr(os, call, failing)

    async def ask() -> None:
        await anext(repo.stream_events(EventQuery(loop_id=LOOP, resume_token=token, follow=True)))
        repo.read_loop(LOOP)

    with pytest.raises(ArtifactMalformed, match=r"\.superloop.* can't be read: Input/output error"):
        await ask()


LONG = b'{"first": %d, "filler": "' + b" " * 100_000 + b'", "last": %d}'
"""A document that takes more than one read."""


def rewriting(monkeypatch: pytest.MonkeyPatch, path: Path, *, after: str, times: int) -> None:
    """Has a document rewritten in place after each such call of the system's, so often."""
    call = getattr(os, after)
    seen: list[object] = []

    def then_rewritten(*words: int) -> object:
        found = call(*words)
        if len(seen) < times:
            seen.append(found)
            path.write_bytes(LONG % (len(seen), len(seen)) + b" " * len(seen))  # the clock of files is too coarse
        return found

    path.write_bytes(LONG % (0, 0))
    monkeypatch.setattr(os, after, then_rewritten)


@pytest.mark.parametrize(("after", "times"), [("read", 1), ("fstat", 2), ("fstat", 5)])
def test_a_file_that_is_rewritten_between_two_reads_of_it_is_read_again(
    files: ArtifactFiles, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch, after: str, times: int
) -> None:
    rewriting(monkeypatch, loop.state, after=after, times=times)

    value = files.read_document(STATE).value

    assert value is not None
    assert (value["first"], value["last"]) == (times, times)


def test_a_file_that_is_rewritten_all_the_time_is_malformed_and_named(
    files: ArtifactFiles, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewriting(monkeypatch, loop.state, after="fstat", times=1000)

    with pytest.raises(ArtifactMalformed, match=r"state\.json can't be read: it was rewritten while it was read"):
        files.read_document(STATE)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b'{"active": tr', "not JSON"),
        (b'{"active": NaN}', "not JSON"),
        (b'{"active": "\xff"}', "not valid UTF-8"),
        (b"[]", "an object is needed, this is a JSON array"),
        (b"null", "an object is needed, this is a JSON null"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested deeper than 256 levels"),
    ],
)
def test_a_file_that_stays_broken_is_malformed_and_named(
    files: ArtifactFiles, loop: LoopFiles, content: bytes, why: str
) -> None:
    loop.state.write_bytes(content)

    with pytest.raises(ArtifactMalformed) as malformed:
        files.read_document(STATE)

    assert malformed.value.details["path"] == ".superloop/state.json"
    assert str(loop.state) in str(malformed.value)
    assert why in str(malformed.value)


def test_a_document_of_the_largest_size_is_read(files: ArtifactFiles, loop: LoopFiles) -> None:
    loop.state.write_bytes(b"{}" + b" " * (MAX_DOCUMENT_BYTES - 2))

    assert files.read_document(STATE).ref["sizeBytes"] == MAX_DOCUMENT_BYTES


def test_a_larger_document_is_not_read(files: ArtifactFiles, loop: LoopFiles) -> None:
    loop.state.write_bytes(b"{}" + b" " * (MAX_DOCUMENT_BYTES - 1))

    with pytest.raises(ArtifactMalformed, match=f"larger than {MAX_DOCUMENT_BYTES} bytes"):
        files.read_document(STATE)


def test_a_document_may_have_a_limit_of_its_own(files: ArtifactFiles, loop: LoopFiles) -> None:
    loop.state.write_bytes(b'{"a": 1}')

    assert files.read_document(STATE, limit=8).value == {"a": 1}
    with pytest.raises(ArtifactMalformed, match="larger than 7 bytes"):
        files.read_document(STATE, limit=7)


def test_reading_leaves_no_descriptor_open(files: ArtifactFiles, loop: LoopFiles) -> None:
    loop.approval.symlink_to(loop.log)
    os.mkfifo(loop.heartbeat)
    put(loop.state, {})
    before = len(list(Path("/proc/self/fd").iterdir()))

    for path in (loop_paths(LOOP).approval, loop_paths(LOOP).heartbeat):
        with pytest.raises(ArtifactNotRegular):
            files.read_document(path)
    files.read_document(STATE)
    files.read_document(ACTIVE_RUN)
    files.require_loop(LOOP)
    files.loops()

    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("name", ["x" * 300, "no\udcffutf-8"])
def test_a_repo_that_no_envelope_could_name_or_that_can_not_be_looked_at_is_none(tmp_path: Path, name: str) -> None:
    with contextlib.suppress(OSError):
        (tmp_path / name).mkdir()

    with pytest.raises(ValueError, match=r"no folder at|is not UTF-8"):
        Repo(tmp_path / name, state_folder=tmp_path / "state", runtime=None)
