"""The agent's own folder is outside the repo, for its user only, and holds its locks and the room for an emergency."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from sprite_agent.control.state_folder import BALLAST_BYTES, StateFolder, default_path, repo_lock
from sprite_agent.errors import ControlBusy, JournalUnavailable
from sprite_agent.repo import Repo
from support.repos import LOOP
from support.runtime import executions, made_folder, request, script

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]


# Where it is.


@pytest.mark.parametrize("inside", [".", ".superloop/state", "../repo/state", "link/state"])
def test_a_state_folder_inside_the_repo_is_refused(loop: LoopFiles, inside: str) -> None:
    """I7: what sandbox code can write is no journal."""
    (loop.repo / "link").symlink_to(loop.runtime)

    with pytest.raises(ValueError, match="inside the repo"):
        Repo(loop.repo, state_folder=loop.repo / inside, runtime=None)


def test_a_state_folder_that_leads_into_the_repo_is_refused(loop: LoopFiles, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(loop.repo)

    with pytest.raises(ValueError, match="inside the repo"):
        Repo(loop.repo, state_folder=tmp_path / "link" / "state", runtime=None)


def test_a_state_folder_beside_the_repo_is_not_inside_it(loop: LoopFiles) -> None:
    Repo(loop.repo, state_folder=loop.repo.with_name("repo-state"), runtime=None).close()


def test_the_state_folder_of_a_repo_is_its_own_below_the_users(
    loop: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "link").symlink_to(loop.repo)

    assert default_path(loop.repo).parent == tmp_path / "xdg" / "sprite-agent"
    assert default_path(tmp_path / "link") == default_path(loop.repo)
    assert default_path(tmp_path) != default_path(loop.repo)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path(loop.repo).parent == tmp_path / ".local" / "state" / "sprite-agent"


def test_nothing_is_made_before_control_is_asked_for(make_repo: MakeRepo, state: Path) -> None:
    make_repo().read_loop(LOOP)

    assert not state.exists()


# Who gets at it.


@pytest.mark.parametrize("lock", ["agent.lock", "lane.lock"])
def test_a_folder_that_holds_no_lock_of_ours_cannot_be_written(loop: LoopFiles, state: Path, lock: str) -> None:
    folder = made_folder(state, loop)
    (state / lock).mkdir()

    with (
        pytest.raises(JournalUnavailable, match=rf"state folder {state} can't be written: .*; let uid \d+ write there"),
        folder.agent_lock() if lock == "agent.lock" else folder.lane(0),
    ):
        pass


def test_only_this_user_may_look_into_it_whatever_the_mask(make_repo: MakeRepo, state: Path) -> None:
    before = os.umask(0)
    try:
        make_repo().execute(request())
    finally:
        os.umask(before)

    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in state.iterdir()} == {
        "ballast": 0o600,
        "executions": 0o700,
        "journal.id": 0o600,
        "journal.sqlite3": 0o600,
        "journal.sqlite3-journal": 0o600,
        "lane.lock": 0o600,
    }


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o770, 0o755, 0o777, 0o1777])
def test_with_a_folder_that_is_open_to_others_nothing_is_run(
    make_repo: MakeRepo, loop: LoopFiles, state: Path, mode: int
) -> None:
    state.mkdir()
    state.chmod(mode)

    with pytest.raises(JournalUnavailable, match="is open to others; chmod 700 it") as refused:
        make_repo().execute(request())

    assert refused.value.executed is False
    assert executions(loop) == []
    state.chmod(0o700)
    assert make_repo().execute(request())["executed"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user's")
def test_with_a_folder_of_another_users_nothing_is_run(make_repo: MakeRepo, loop: LoopFiles, state: Path) -> None:
    state.mkdir(mode=0o700)
    os.chown(state, 65534, 65534)

    with pytest.raises(JournalUnavailable, match="belongs to another user, uid 65534"):
        make_repo().execute(request())
    assert executions(loop) == []


def test_a_folder_that_cannot_be_made_is_told_with_its_reason(state: Path, loop: LoopFiles) -> None:
    state.touch()

    with pytest.raises(JournalUnavailable, match=f"state folder {state} can't be made: File exists"):
        StateFolder(state, loop.repo).make()


# Locks.


def test_one_agent_holds_the_agent_lock(loop: LoopFiles, state: Path) -> None:
    first, second = StateFolder(state, loop.repo), StateFolder(state, loop.repo)

    with first.agent_lock():
        assert (state / "agent.lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(BlockingIOError), second.agent_lock():
            pass
    with second.agent_lock():
        pass


def test_one_agent_holds_the_repo_whatever_its_state_folder_is(
    loop: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "link").symlink_to(loop.repo)
    before = sorted(loop.repo.rglob("*"))

    with repo_lock(loop.repo):
        with pytest.raises(BlockingIOError), repo_lock(tmp_path / "link"):
            pass
        with repo_lock(tmp_path / "another"):
            pass
    with repo_lock(loop.repo):
        pass

    assert sorted(loop.repo.rglob("*")) == before


def test_the_lock_of_a_repo_is_never_in_it(loop: LoopFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(loop.repo / "home"))

    with pytest.raises(OSError, match="inside the repo"), repo_lock(loop.repo):
        pass

    assert not (loop.repo / "home").exists()


def test_one_holds_the_lane_and_another_waits_for_it_as_long_as_it_likes(loop: LoopFiles, state: Path) -> None:
    first, second = made_folder(state, loop), made_folder(state, loop)

    with first.lane(0):
        began = time.monotonic()
        with pytest.raises(ControlBusy, match="another command runs in this repo"), second.lane(0.2):
            pass
        assert 0.2 <= time.monotonic() - began < 5
    with second.lane(0):
        pass


def test_a_process_that_has_inherited_the_lane_keeps_it_when_its_holder_is_killed(loop: LoopFiles, state: Path) -> None:
    folder = made_folder(state, loop)
    program = (
        "import subprocess, sys, os; from pathlib import Path\n"
        "from sprite_agent.control.state_folder import StateFolder\n"
        f"with StateFolder(Path({str(state)!r}), Path({str(loop.repo)!r})).lane(0) as lane:\n"
        "    print(subprocess.Popen(['sleep', '1000'], pass_fds=[lane], stdout=2).pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False, timeout=20)

    with pytest.raises(ControlBusy), folder.lane(0.1):
        pass
    os.kill(int(ended.stdout), 9)
    with folder.lane(5):
        pass


def test_the_lane_is_free_when_its_holder_lets_go_whoever_has_inherited_it(
    make_repo: MakeRepo, loop: LoopFiles, state: Path, tmp_path: Path
) -> None:
    """As with a command that leaves a child behind."""
    pids = tmp_path / "pids"
    repo = make_repo(script(tmp_path / "superloop", f"sleep 1000 > /dev/null 2>&1 & echo $! > {pids}"))

    repo.execute(request())

    with StateFolder(state, loop.repo).lane(0):
        pass
    os.kill(int(pids.read_text()), 9)


# Room.


def test_the_ballast_takes_its_room_and_gives_it_back(loop: LoopFiles, state: Path) -> None:
    folder = made_folder(state, loop)

    folder.ensure_ballast()
    made = folder.ballast.stat()
    folder.ensure_ballast()

    assert made.st_blocks * 512 >= BALLAST_BYTES == 1024 * 1024
    assert folder.ballast.stat().st_ino == made.st_ino
    folder.drop_ballast()
    folder.drop_ballast()
    assert list(state.iterdir()) == []


def test_a_ballast_for_which_there_is_no_room_leaves_nothing_behind(
    loop: LoopFiles, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    folder = made_folder(state, loop)
    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(OSError, match="No space left"):
        folder.ensure_ballast()
    assert list(state.iterdir()) == []


def test_a_draft_of_the_ballast_that_a_killed_process_has_left_is_used_again(loop: LoopFiles, state: Path) -> None:
    folder = made_folder(state, loop)
    (state / f".ballast.{os.getpid()}.{threading.get_ident()}").touch()

    folder.ensure_ballast()

    assert folder.ballast.stat().st_size == BALLAST_BYTES
