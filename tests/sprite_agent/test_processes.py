"""A process is named so that another one with the same pid, or of another boot, is not taken for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sprite_agent.control.processes import NOBODY, is_alive, name_from_stat, name_of, pid_of, this_boot, this_process


def test_this_process_is_alive_by_its_name() -> None:
    assert is_alive(this_process())
    assert name_of(os.getpid()) == this_process()
    assert pid_of(this_process()) == os.getpid()
    assert this_process().startswith(f"{this_boot()}:")


def test_another_process_with_the_same_pid_is_not_this_one() -> None:
    boot, pid, started = this_process().split(":")

    assert not is_alive(f"{boot}:{pid}:{int(started) + 1}")
    assert not is_alive(f"another-boot:{pid}:{started}")


@pytest.mark.parametrize("name", [f"x:{2**22 + 1}:1", "x:0:1", "x:-1:1", "x::1", "x:y:1", "?:1:?", NOBODY])
def test_what_names_no_living_process_is_not_alive(name: str) -> None:
    assert not is_alive(name)


@pytest.mark.parametrize("pid", [2**22 + 1, 0, -1, "1", True, None, 1.5, [1], 2**70])
def test_what_is_no_pid_names_no_process(pid: Any) -> None:
    assert name_of(pid) is None


def test_a_process_that_has_ended_and_was_not_reaped_is_not_alive() -> None:
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)

        assert Path(f"/proc/{ended.pid}/stat").exists()
        assert name_of(ended.pid) is None


@pytest.mark.parametrize("command", [b"sh", b"a b", b"a) S 1", b") Z (", b"(((", b"", b"\xff\xfe", "é".encode()])
def test_a_command_may_be_called_anything(command: bytes) -> None:
    fields = " ".join(["S", *(str(number) for number in range(4, 53))])

    assert name_from_stat(b"7 (%b) %b" % (command, fields.encode())) == f"{this_boot()}:7:22"


@pytest.mark.parametrize("content", [b"", b"7", b"7 (x)", b"7 (x) S 1 2", b"7 (x) Z " + b"1 " * 40, b"x" * 500])
def test_what_is_no_living_process_has_no_name(content: bytes) -> None:
    assert name_from_stat(content) is None


def test_a_process_whose_name_is_no_text_is_alive(tmp_path: Path) -> None:
    program = os.fsencode(tmp_path) + b"/\xff\xfe"
    Path(os.fsdecode(program)).symlink_to("/bin/sleep")
    with subprocess.Popen([program, b"60"]) as process:
        try:
            name = name_of(process.pid)
            assert name is not None
            assert is_alive(name)
        finally:
            process.kill()
