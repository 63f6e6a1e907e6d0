"""What the sandbox names in its artifacts, the command can't reach: it runs as the sandbox's own user."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprite_agent.control import engine as control
from sprite_agent.control.command import find_user
from sprite_agent.control.processes import name_of
from sprite_agent.repo import Repo
from support.repos import LOOP, put
from support.runtime import asking_loop, request, script

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.contract.envelopes import ControlResult
    from support.repos import LoopFiles

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of two users and run as another")

SANDBOX = "nobody"


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can reach, as pytest's own are not."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def loop(place: Path) -> LoopFiles:
    """A loop of the sandbox's user that waits for approval."""
    loop = asking_loop(place / "repo")
    for folder, _, names in os.walk(loop.repo):
        for name in [".", *names]:
            shutil.chown(f"{folder}/{name}", SANDBOX)
    return loop


def execute(place: Path, loop: LoopFiles, runtime: str, intent: str) -> ControlResult:
    repo = Repo(loop.repo, state_folder=place / "state", runtime=runtime, user=find_user(SANDBOX))
    try:
        return repo.execute(request(intent))
    finally:
        repo.close()


def test_what_the_command_writes_through_a_link_is_denied_where_its_user_may_not_write(
    place: Path, loop: LoopFiles
) -> None:
    """C9: the agent's rights are not lent to who makes links."""
    victim = place / "victim"
    victim.write_text("kept\n")
    log = loop.folder / "decisions.jsonl"
    log.symlink_to(victim)
    runtime = script(place / "superloop", f"echo decided >> {log}")

    result = execute(place, loop, runtime, "approve")

    assert "ermission denied" in result["output"]
    assert (result["status"], result["effect"]) == ("failed_command", "none")
    assert victim.read_text() == "kept\n"


def test_a_process_that_is_not_of_the_commands_user_is_not_ended_whoever_names_it(
    place: Path, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: sandbox code writes the file that says what to kill."""
    monkeypatch.setattr(control, "SETTLE", 0.05)
    with subprocess.Popen(["sleep", "1000"]) as victim:
        put(loop.active_run, {"loop_id": LOOP, "pid": victim.pid, "pgid": victim.pid})
        runtime = script(place / "superloop", f"kill -9 {victim.pid}; rm {loop.active_run}")

        result = execute(place, loop, runtime, "cancel")

        assert "not permitted" in result["output"]
        assert name_of(victim.pid) is not None
        victim.kill()
    assert result["status"] == "ambiguous"
    assert result["detail"] is not None
    assert result["detail"].endswith("and the process of its run lives")
