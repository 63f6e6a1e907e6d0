"""Run as another user, the command has that user's rights and nothing of the agent's: what the sandbox names, too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.control import conclusion
from sprite_agent.control.command import can_change_user, find_user
from sprite_agent.control.processes import name_of
from sprite_agent.errors import RuntimeUntrusted
from sprite_agent.face.config import load_serve_config
from sprite_agent.repo import Repo
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.runtime import LOOKS_ONCE, executions, request, script

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of two users and run as another")

SANDBOX = "nobody"
DECIDED = {**LOOKS_ONCE, "requiredEffect": "decision_recorded"}


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
    loop = LoopFiles(place / "repo")
    loop.append(line(event("approval_requested")))
    loop.ask_approval()
    for folder, _, names in os.walk(place / "repo"):
        for name in [".", *names]:
            shutil.chown(f"{folder}/{name}", SANDBOX)
    return loop


def execute(place: Path, loop: LoopFiles, runtime: str, asked: Any = None) -> Any:
    """The result of what is asked; an approve, unless told otherwise."""
    repo = Repo(loop.repo, state_folder=place / "state", runtime=runtime, user=find_user(SANDBOX))
    try:
        return repo.execute(asked or request("approve", confirmation=DECIDED))
    finally:
        repo.close()


def test_the_command_has_the_users_ids_and_no_capability_and_can_get_none(place: Path, loop: LoopFiles) -> None:
    shows = script(
        place / "superloop", "id -u; id -g; id -G; grep -E 'Cap(Inh|Prm|Eff|Amb)|NoNewPrivs' /proc/self/status"
    )

    shown = execute(place, loop, shows)["output"].splitlines()

    user = find_user(SANDBOX)
    assert shown[:3] == [str(user.uid), str(user.gid), " ".join(str(group) for group in user.groups)]
    assert {text.split()[0]: int(text.split()[1], 16) for text in shown[3:]} == {
        **dict.fromkeys(("CapInh:", "CapPrm:", "CapEff:", "CapAmb:"), 0),
        "NoNewPrivs:": 1,
    }


def test_capabilities_that_a_user_kept_are_taken_from_the_command(place: Path, loop: LoopFiles) -> None:
    """An agent that is not root has them as ambient ones, which a change of user does not clear."""
    shows = script(place / "superloop", "grep -E 'Cap(Prm|Eff|Amb)' /proc/self/status; id -un")
    program = (
        "import sys\nfrom pathlib import Path\nfrom sprite_agent.repo import Repo\n"
        "from sprite_agent.control.command import can_change_user, find_user\nassert can_change_user()\n"
        f"repo = Repo(Path({str(loop.repo)!r}), state_folder=Path({str(place / 'daemons')!r}),"
        f" runtime={shows!r}, user=find_user({SANDBOX!r}))\n"
        f"print(repo.execute({request('approve', confirmation=DECIDED)!r})['output'])\n"
    )
    (place / "daemons").mkdir(mode=0o700)
    shutil.chown(place / "daemons", "daemon")
    # The last one is only for the tests' interpreter, which others may not be able to reach.
    kept = "+setuid,+setgid,+kill,+dac_read_search"
    ended = subprocess.run(
        [
            "setpriv",
            "--reuid=daemon",
            "--regid=daemon",
            "--clear-groups",
            f"--inh-caps={kept}",
            f"--ambient-caps={kept}",
            sys.executable,
            "-c",
            program,
        ],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )

    none = "0" * 16
    assert ended.stdout.split() == ["CapPrm:", none, "CapEff:", none, "CapAmb:", none, SANDBOX], ended.stderr


def test_the_command_can_write_the_repo_and_not_the_agents_state(place: Path, loop: LoopFiles) -> None:
    shutil.copy(STANDIN, place / "superloop")
    (place / "superloop").write_text(STANDIN.read_text().replace("#!/usr/bin/env python3", "#!/usr/bin/python3", 1))
    looks = script(place / "look", f"ls {place}/state; cat {place}/state/journal.sqlite3; echo x >&3")

    decided = execute(place, loop, str(place / "superloop"))
    looked = Repo(loop.repo, state_folder=place / "state", runtime=looks, user=find_user(SANDBOX))
    loop.ask_approval()
    shutil.chown(loop.approval, SANDBOX)
    output = looked.execute(request("approve", idempotencyKey="key-2", confirmation=LOOKS_ONCE))["output"]
    looked.close()

    assert (decided["status"], len(executions(loop))) == ("confirmed", 1)
    assert output.count("ermission denied") == 2
    assert loop.approval.owner() == SANDBOX


def test_what_the_command_writes_through_a_link_is_denied_where_its_user_may_not_write(
    place: Path, loop: LoopFiles
) -> None:
    """C9: the agent's rights are not lent to who makes links."""
    victim = place / "victim"
    victim.write_text("kept\n")
    log = loop.folder / "decisions.jsonl"
    log.symlink_to(victim)
    runtime = script(place / "superloop", f"echo decided >> {log}")

    result = execute(place, loop, runtime)

    assert "ermission denied" in result["output"]
    assert (result["status"], result["effect"]) == ("failed_command", "none")
    assert victim.read_text() == "kept\n"


def test_a_process_that_is_not_of_the_commands_user_is_not_ended_whoever_names_it(
    place: Path, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: sandbox code writes the file that says what to kill."""
    monkeypatch.setattr(conclusion, "SETTLE", 0.05)
    with subprocess.Popen(["sleep", "1000"]) as victim:
        put(loop.active_run, {"loop_id": LOOP, "pid": victim.pid, "pgid": victim.pid})
        runtime = script(place / "superloop", f"kill -9 {victim.pid}; rm {loop.active_run}")

        result = execute(place, loop, runtime, request("cancel"))

        assert "not permitted" in result["output"]
        assert name_of(victim.pid) is not None
        victim.kill()
    assert result["status"] == "ambiguous"
    assert result["detail"] is not None
    assert result["detail"].endswith("and the process of its run lives")


@pytest.mark.parametrize("writable", ["the file", "its folder", "everybody"])
def test_a_command_that_its_user_could_exchange_is_not_run(place: Path, loop: LoopFiles, writable: str) -> None:
    (place / "bin").mkdir()
    runtime = script(place / "bin" / "superloop", "echo ran")
    if writable == "everybody":
        (place / "bin" / "superloop").chmod(0o777)
    else:
        shutil.chown(place / "bin" / ("superloop" if writable == "the file" else "."), SANDBOX)

    with pytest.raises(RuntimeUntrusted, match=str(place / "bin")):
        execute(place, loop, runtime)


def test_no_command_runs_as_root_or_as_nobody_known(tmp_path: Path) -> None:
    for name in ("root", "no-such-user"):
        with pytest.raises(ValueError, match=name):
            find_user(name)


def test_an_agent_that_cannot_change_its_user_says_so_when_it_starts(
    monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    assert can_change_user()
    monkeypatch.setattr("sprite_agent.face.config.can_change_user", lambda: False)
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "token")

    with pytest.raises(ValueError, match="CAP_SETUID"):
        load_serve_config(
            repo=place,
            listen="unix:/nowhere",
            state_folder=None,
            runtime=None,
            token_file=None,
            sprite_id=None,
            run_as=SANDBOX,
        )
