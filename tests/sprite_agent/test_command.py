"""The runtime's command is run as an argument vector, clean, and bounded in time and output."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprite_agent.command import MAX_OUTPUT_BYTES, CommandOutcome, build_command, find_runtime, run_command
from sprite_agent.errors import RuntimeMissing
from sprite_agent.processes import is_alive, pid_is_alive, this_process
from support.runtime import request, script
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.contract.envelopes import ControlRequest


def run_text(text: str, timeout: float = 20.0) -> CommandOutcome:
    """Runs a line of shell."""
    return run_command(["/bin/sh", "-c", text], timeout)


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """A file for pids, one a line, of what would outlive the test."""
    pids = tmp_path / "pids"
    pids.touch()
    yield pids
    for pid in pids.read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


# The vector.


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (request("cancel"), ["cancel", "--repo", "/repo"]),
        (request("cancel", note="why"), ["cancel", "--repo", "/repo"]),
        (request("approve"), ["approve", "--repo", "/repo", "--loop", "demo", "--by", "ada"]),
        (
            request("approve", note="a b; $(c) 'd'"),
            ["approve", "--repo", "/repo", "--loop", "demo", "--by", "ada", "--note", "a b; $(c) 'd'"],
        ),
        (request("reject"), ["approve", "--repo", "/repo", "--loop", "demo", "--by", "ada", "--reject"]),
        (
            request("reject", note="--approve"),
            ["approve", "--repo", "/repo", "--loop", "demo", "--by", "ada", "--reject", "--note", "--approve"],
        ),
    ],
)
def test_each_intent_has_its_vector(document: dict[str, Any], words: list[str]) -> None:
    command = build_command(Path("/bin/superloop"), Path("/repo"), cast("ControlRequest", document))

    assert command == ["/bin/superloop", *words]


# Finding it.


@pytest.mark.parametrize("configured", [None, ""])
def test_a_runtime_that_is_not_configured_is_missing(configured: str | None) -> None:
    with pytest.raises(RuntimeMissing, match="not configured"):
        find_runtime(configured)


def test_a_runtime_that_cannot_be_executed_is_missing(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch(mode=0o644)

    for configured in (tmp_path / "gone", tmp_path, plain):
        with pytest.raises(RuntimeMissing, match=f"{configured} is no executable file"):
            find_runtime(str(configured))


def test_a_runtime_given_by_a_relative_path_or_a_link_is_run_by_its_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "superloop", "exit 0")
    (tmp_path / "link").symlink_to("superloop")
    monkeypatch.chdir(tmp_path)

    assert find_runtime("./superloop") == tmp_path.resolve() / "superloop"
    assert find_runtime("link") == tmp_path.resolve() / "superloop"


# How it ends.


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code_is_the_commands(code: int) -> None:
    assert run_text(f"exit {code}") == CommandOutcome(exit_code=code, timed_out=False, output="")


def test_a_command_ended_by_a_signal_has_the_signal_as_a_negative_exit_code() -> None:
    assert run_text("kill -TERM $$") == CommandOutcome(exit_code=-15, timed_out=False, output="")


def test_a_command_that_cannot_be_started_has_no_exit_code(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0\0")
    broken.chmod(0o755)

    outcome = run_command([str(broken)])

    assert outcome == CommandOutcome(exit_code=None, timed_out=False, output=f"{broken}: Exec format error")


def test_a_command_that_ends_at_once_is_answered_at_once() -> None:
    began = time.monotonic()
    for _ in range(20):
        run_text("exit 0")

    assert time.monotonic() - began < 5


# What it prints.


def test_both_streams_are_kept_in_their_order() -> None:
    assert run_text("echo out; echo err >&2; echo out").output == "out\nerr\nout\n"


def test_of_a_long_output_the_end_is_kept() -> None:
    outcome = run_text("yes 0123456789 | head -c 5500000; echo END")

    assert outcome.output.endswith("0123456789\nEND\n")
    assert len(outcome.output) == MAX_OUTPUT_BYTES


def test_output_printed_just_before_the_end_is_not_lost() -> None:
    for number in range(20):
        assert run_text(f"head -c 60000 /dev/zero | tr '\\0' x; echo {number}").output.endswith(f"x{number}\n")


def test_output_that_is_not_utf_8_is_bounded_as_well() -> None:
    outcome = run_text("head -c 20000 /dev/zero | tr '\\0' '\\377'")

    assert set(outcome.output) == {"\N{REPLACEMENT CHARACTER}"}
    assert len(outcome.output.encode()) <= MAX_OUTPUT_BYTES


def test_a_command_that_closes_its_output_is_waited_for() -> None:
    assert run_text("exec >&- 2>&-; sleep 0.3; exit 3") == CommandOutcome(exit_code=3, timed_out=False, output="")


# What it is given.


def test_the_environment_is_path_home_and_lang_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "secret")
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    outcome = run_command(["/usr/bin/env"])

    assert sorted(outcome.output.splitlines()) == ["HOME=/home/ada", "LANG=C.UTF-8", "PATH=/usr/bin:/bin"]


def test_a_shell_script_finds_nothing_more_than_what_its_shell_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "secret")

    outcome = run_command([script(tmp_path / "superloop", "env")])

    names = {entry.partition("=")[0] for entry in outcome.output.splitlines()}
    assert {"PATH", "LANG"} <= names <= {"PATH", "HOME", "LANG", "PWD", "OLDPWD", "SHLVL", "_"}


def test_a_home_that_is_not_set_stays_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)

    assert "HOME=" not in run_command(["/usr/bin/env"]).output


def test_without_a_path_there_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH", raising=False)

    assert f"PATH={os.defpath}" in run_command(["/usr/bin/env"]).output


def test_the_command_has_no_input_a_session_of_its_own_and_the_root_folder() -> None:
    program = "import os, sys; print(sys.stdin.read() == '', os.getsid(0) == os.getpid() == os.getpgrp(), os.getcwd())"

    assert run_command([sys.executable, "-c", program]).output == "True True /\n"


def test_the_command_inherits_no_descriptor_but_the_standard_ones() -> None:
    with Path("/dev/null").open() as ours:
        os.set_inheritable(ours.fileno(), True)  # noqa: FBT003  # its one parameter has no other form

        assert run_text("exec ls /proc/$$/fd").output.split()[:3] == ["0", "1", "2"]
        assert str(ours.fileno()) not in run_text("ls /proc/$$/fd").output.split()


def test_a_command_is_run_however_many_files_are_open() -> None:
    """As in an agent with a thousand streams: select() knows no descriptor beyond 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
        for _ in range(1050):
            opened.callback(os.close, os.open("/dev/null", os.O_RDONLY))

        assert run_text("echo out; exit 3") == CommandOutcome(exit_code=3, timed_out=False, output="out\n")


# Its time.


def test_a_command_over_its_time_is_ended_with_all_its_children(pids: Path) -> None:
    text = f"trap '' TERM INT HUP; (trap '' TERM; sleep 1000) & echo $! $$ >> {pids}; echo waiting; wait; sleep 1000"
    began = time.monotonic()

    outcome = run_text(text, timeout=0.5)

    assert 0.5 <= time.monotonic() - began < 5
    assert outcome == CommandOutcome(exit_code=-9, timed_out=True, output="waiting\n")
    for pid in pids.read_text().split():
        until(lambda pid=int(pid): not pid_is_alive(pid), f"process {pid} is gone")  # type: ignore[misc]


def test_a_command_that_prints_without_end_is_ended_at_its_time() -> None:
    outcome = run_text("yes", timeout=0.3)

    assert (outcome.exit_code, outcome.timed_out) == (-9, True)
    assert outcome.output == "y\n" * (MAX_OUTPUT_BYTES // 2)


def test_a_command_that_closes_its_output_is_ended_at_its_time() -> None:
    outcome = run_text("exec >&- 2>&-; exec sleep 1000", timeout=0.3)

    assert (outcome.exit_code, outcome.timed_out) == (-9, True)


def test_a_child_that_keeps_the_output_open_does_not_hold_the_command_up(pids: Path) -> None:
    began = time.monotonic()

    outcome = run_text(f"sleep 1000 & echo $! >> {pids}; echo done; exit 4")

    assert time.monotonic() - began < 5
    assert outcome == CommandOutcome(exit_code=4, timed_out=False, output="done\n")


def test_a_child_that_goes_on_printing_does_not_hold_the_command_up(pids: Path) -> None:
    began = time.monotonic()

    outcome = run_text(f"yes & echo $! >> {pids}; exit 4", timeout=5)

    assert (outcome.exit_code, outcome.timed_out) == (4, False)
    assert time.monotonic() - began < 3


# Names of processes.


def test_this_process_is_alive_by_its_name() -> None:
    assert is_alive(this_process())
    assert pid_is_alive(os.getpid())


def test_another_process_with_the_same_pid_is_not_this_one() -> None:
    boot, pid, started = this_process().split(":")

    assert not is_alive(f"{boot}:{pid}:{int(started) + 1}")
    assert not is_alive(f"another-boot:{pid}:{started}")


@pytest.mark.parametrize("name", [f"x:{2**22 + 1}:1", "x:0:1", "x:-1:1", "x::1", "x:y:1", "?:1:?"])
def test_what_names_no_living_process_is_not_alive(name: str) -> None:
    assert not is_alive(name)
