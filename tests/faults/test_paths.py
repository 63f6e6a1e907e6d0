"""T25: whatever names a caller gives and whatever sandbox code puts at a path, nothing outside the repo is read.

H4.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from inotify_simple import INotify, flags

from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import ArtifactMalformed, ArtifactNotRegular, EventsNotFound, LoopNotFound, OpsError
from sprite_agent.v1 import service_pb2 as pb
from sprite_agent.v1 import service_pb2_grpc
from sprite_agent.v1.control_pb2 import INTENT_CANCEL
from support.figures import found, scaled
from support.following import Follower
from support.repos import LOOP, LoopFiles, event, line, put
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Agent

    from opsmgr.transport.base import Transport

CANARY = "canary-7b1e"
"""Stands in every file that must not be read."""
LONG_AGO = 1_000_000_000

TRAVERSALS = [
    "..",
    "../outside",
    "../../outside",
    "../../../outside",
    "../../../../../../etc",
    "demo/..",
    "demo/../../../../outside",
    "./demo",
    "demo/.",
    "demo/",
    "/",
    "//",
    "/etc",
    "/etc/passwd",
    "//outside",
    "~",
    "~root",
    "$HOME",
    "${HOME}",
    "`id`",
    "$(id)",
    "..\\outside",
    "..\\..\\outside",
    "C:\\outside",
    "%2e%2e",
    "%2e%2e%2foutside",
    "..%2foutside",
    "%252e%252e",
    "..%c0%afoutside",
    "..%00",
    "demo\0",
    "demo\0/../outside",
    "demo\n../outside",
    "demo\r",
    " ..",
    ".. ",
    "....//outside",
    "..;/outside",
    "file:///etc/passwd",
    "*",
    "demo*",
    "{demo,outside}",
    "-rf",
    ".",
    "...",
    ".hidden",
    "a..b",
    "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}",
    "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}\N{FULLWIDTH SOLIDUS}outside",
    "\N{ONE DOT LEADER}\N{ONE DOT LEADER}/outside",
    "\N{TWO DOT LEADER}",
    "\N{HORIZONTAL ELLIPSIS}",
    "..\N{DIVISION SLASH}outside",
    "..\N{FRACTION SLASH}outside",
    "..\N{BIG SOLIDUS}outside",
    "..\N{FULLWIDTH REVERSE SOLIDUS}outside",
    "dem\N{CYRILLIC SMALL LETTER O}",
    "dem\N{GREEK SMALL LETTER OMICRON}",
    "\N{FULLWIDTH LATIN SMALL LETTER D}emo",
    "demo\N{ZERO WIDTH SPACE}",
    "demo\N{RIGHT-TO-LEFT OVERRIDE}",
    "demo\N{COMBINING ACUTE ACCENT}",
    "\N{LATIN SMALL LETTER LONG S}",
    "demo\N{LINE SEPARATOR}",
    "demo\N{NO-BREAK SPACE}",
    "x" * 65,
    "x" * 5000,
    "",
]

FOLDERS = [".superloop", ".superloop/loops", f".superloop/loops/{LOOP}"]
FILES = [
    *(f".superloop/loops/{LOOP}/{name}" for name in ("events.jsonl", "run-summary.json", "approval.json")),
    f".superloop/loops/{LOOP}/heartbeat.v1.json",
    ".superloop/state.json",
    ".superloop/active-run.json",
]

FLIPPER = r"""
import ctypes, os, signal, sys, time
one, other, seconds, wanted = *map(os.fsencode, sys.argv[1:3]), float(sys.argv[3]), int(sys.argv[4])
enough = sys.argv[5]
exchange = ctypes.CDLL(None, use_errno=True).renameat2
flips, until = 0, time.monotonic() + seconds
while time.monotonic() < until or flips < wanted or not os.path.exists(enough):
    for pause in (*[0] * 60, 0.0001, 0.001, 0.03):
        assert exchange(-100, one, -100, other, 2) == 0, os.strerror(ctypes.get_errno())
        flips += 1
        time.sleep(pause)
if flips % 2:
    exchange(-100, one, -100, other, 2)
print(flips)
"""
SECONDS = scaled(1, 10)
FLIPS = scaled(0, 100_000)


class Outside:
    """A whole runtime of another repo, full of canaries, which tells when one of its files was opened."""

    def __init__(self, folder: Path) -> None:
        self.loop = LoopFiles(folder)
        self.loop.rewrite(line(event(CANARY)) * 3)
        self.loop.summarize({"run_id": CANARY})
        self.loop.ask_approval(run_id=CANARY)
        for path in (self.loop.heartbeat, self.loop.state, self.loop.active_run):
            put(path, {"canary": CANARY})
        self._files = [path for path in folder.rglob("*") if path.is_file()]
        for path in self._files:
            os.utime(path, (LONG_AGO, LONG_AGO))
        self._before = self._facts()
        self._watch = INotify(nonblocking=True)
        for path in self._files:
            self._watch.add_watch(path, flags.OPEN | flags.ACCESS | flags.MODIFY | flags.ATTRIB)

    def assert_untouched(self) -> None:
        """Fails if a file was opened, read or changed, or there is one more or less."""
        assert self._watch.read(timeout=0) == []
        self._watch.close()
        assert self._facts() == self._before

    def _facts(self) -> dict[Path, tuple[str, float, float]]:
        stamps = {path: path.stat() for path in self.loop.repo.rglob("*") if path.is_file()}
        facts = {}
        for path, status in stamps.items():
            facts[path] = (hashlib.sha256(path.read_bytes()).hexdigest(), status.st_atime, status.st_mtime)
            os.utime(path, (status.st_atime, status.st_mtime))  # reading it here must not be what is seen
        return facts


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    outside = Outside(tmp_path / "outside")
    yield outside
    outside.assert_untouched()


@pytest.fixture
def repo(tmp_path: Path) -> LoopFiles:
    """A repo in which every artifact is there."""
    loop = LoopFiles(tmp_path / "repo")
    loop.append(line(event(n=1)), line(event(n=2)))
    loop.summarize({"run_id": "run-1"})
    loop.ask_approval()
    for path in (loop.heartbeat, loop.state, loop.active_run):
        put(path, {"pid": 1})
    return loop


async def everything(transport: Transport) -> str:
    """All that can be read of the loop."""
    envelope = (await transport.snapshot(LOOP)).envelope
    async with Follower(transport.events(EventQuery(loop_id=LOOP, skip_malformed=True))) as following:
        batches = await following.to_end()
    return f"{envelope} {batches}"


def lead_out(repo: LoopFiles, outside: Outside, path: str) -> Path:
    """Puts a link to the same path of the other repo where the artifact was; where that is now."""
    inside = repo.repo / path
    moved = inside.with_name(f"{inside.name}.was")
    inside.rename(moved)
    inside.symlink_to(outside.loop.repo / path)
    return moved


@pytest.mark.parametrize("loop_id", TRAVERSALS, ids=range(len(TRAVERSALS)))
async def test_no_call_takes_a_loop_id_that_is_more_than_a_name(
    agent: Agent, repo: LoopFiles, outside: Outside, loop_id: str
) -> None:
    """As no client of ours would send it."""
    async with grpc.aio.insecure_channel(agent.address) as channel:
        stub: Any = service_pb2_grpc.SpriteAgentServiceStub(channel)
        control = pb.ExecuteControlRequest(
            loop_id=loop_id, intent=INTENT_CANCEL, requested_by="me", idempotency_key="key-1"
        )
        calls = [
            stub.GetSnapshot(pb.GetSnapshotRequest(loop_id=loop_id), metadata=agent.metadata, timeout=DEADLINE),
            stub.StreamEvents(pb.StreamEventsRequest(loop_id=loop_id), metadata=agent.metadata, timeout=DEADLINE),
            stub.ExecuteControl(control, metadata=agent.metadata, timeout=DEADLINE),
        ]
        for call in calls:
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert b"LOOP_ID_INVALID" in dict(await call.trailing_metadata())["grpc-status-details-bin"]
            assert CANARY not in await call.details()
    assert sorted(path.name for path in repo.repo.iterdir()) == [".superloop"]
    if loop_id == TRAVERSALS[-1]:
        found("T25", f"{len(TRAVERSALS)} names x 3 calls: all refused, nothing opened outside the repo")


@pytest.mark.parametrize("path", [*FOLDERS, *FILES])
async def test_a_link_at_any_component_is_refused(
    transport: Transport, repo: LoopFiles, outside: Outside, path: str
) -> None:
    lead_out(repo, outside, path)

    with pytest.raises(ArtifactNotRegular) as refused:
        await everything(transport)

    assert CANARY not in str(refused.value)
    assert "outside" not in str(refused.value)


@pytest.mark.parametrize("path", [*FOLDERS, FILES[0]])
async def test_a_link_that_comes_while_the_log_is_followed_ends_the_stream(
    transport: Transport, repo: LoopFiles, outside: Outside, path: str
) -> None:
    async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True, heartbeat_interval=1.0))) as following:
        await following.until_lines(2)
        lead_out(repo, outside, path)

        with pytest.raises(ArtifactNotRegular):
            await following.to_end()

    assert following.lines == [1, 2]


def make_fifo(path: Path) -> None:
    """A pipe: whoever opens it may wait for ever."""
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """A socket, bound by a short name."""
    before = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


def make_endless(path: Path) -> None:
    """A device that gives zeros for ever."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making devices is not allowed here")


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("make", [make_fifo, make_socket, make_endless, os.mkdir])
async def test_what_is_no_file_is_refused_and_nobody_waits_for_it(
    transport: Transport, repo: LoopFiles, make: Callable[[Path], None], path: str
) -> None:
    (repo.repo / path).unlink()
    make(repo.repo / path)

    with pytest.raises(ArtifactNotRegular):
        await asyncio.wait_for(everything(transport), DEADLINE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("path", FILES)
async def test_a_second_name_of_a_file_of_somebody_else_is_refused(
    transport: Transport, repo: LoopFiles, outside: Outside, path: str
) -> None:
    """Sandbox code can make one of a file that the agent can read and it can't."""
    for folder in (repo.folder, repo.runtime):
        os.chown(folder, 12345, 12345)
    (repo.repo / path).unlink()
    secret = repo.repo.parent / "secret"
    secret.write_text(CANARY)
    os.link(secret, repo.repo / path)

    with pytest.raises(ArtifactNotRegular, match="another name"):
        await everything(transport)


@pytest.mark.parametrize("path", FILES)
async def test_a_second_name_of_a_file_of_the_same_user_is_read(
    transport: Transport, repo: LoopFiles, path: str
) -> None:
    """As a backup of hard links leaves it: what is read, its owner could read anyway."""
    os.link(repo.repo / path, repo.repo / "backup")

    assert "run-1" in await everything(transport)


@pytest.mark.timeout(scaled(240, 600))
@pytest.mark.parametrize("path", [*FOLDERS, FILES[0], FILES[2]])
async def test_a_link_that_comes_and_goes_all_the_time_is_never_followed(
    transport: Transport, repo: LoopFiles, outside: Outside, tmp_path: Path, path: str
) -> None:
    moved, enough = lead_out(repo, outside, path), tmp_path / "enough"
    words = [str(repo.repo / path), str(moved), str(SECONDS), str(FLIPS), str(enough)]
    flipper = subprocess.Popen(  # noqa: ASYNC220  # begins at once
        [sys.executable, "-S", "-c", FLIPPER, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    read = refused = led_out = 0
    try:
        while flipper.poll() is None:
            try:
                assert CANARY not in await everything(transport)
                read += 1
            except (ArtifactNotRegular, ArtifactMalformed, EventsNotFound, LoopNotFound) as refusal:
                refused += CANARY not in str(refusal)
                led_out += CANARY in str(refusal)
            if read and refused:
                enough.touch()  # on a machine that stands still it may take longer than its time
            with contextlib.suppress(OpsError):
                async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True))) as following:
                    assert CANARY not in str(await following.next())
    finally:
        flipper.kill()
        flips = int((flipper.communicate()[0] or b"0").split()[0])

    assert led_out == 0
    assert read > 0
    assert refused > 0
    found("T25", f"{path} on {transport.name}: {flips} flips, read {read} times, refused {refused}, never led outside")
