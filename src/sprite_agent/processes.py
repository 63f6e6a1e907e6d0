"""Names a process so that another one with the same pid is not taken for it."""

from __future__ import annotations

import os
from pathlib import Path


def this_process() -> str:
    """The name of this process: boot id, pid, start time."""
    return _name(os.getpid()) or f"?:{os.getpid()}:?"


def is_alive(name: str) -> bool:
    """Whether the process of that name still runs."""
    pid = name.split(":")[1]
    return pid.isdecimal() and _name(int(pid)) == name


def pid_is_alive(pid: object) -> bool:
    """Whether a process with this pid runs; the pid comes from an artifact and may be anything."""
    return type(pid) is int and pid > 0 and _name(pid) is not None


def _name(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    # The second field is the command in parentheses and may hold anything; the state follows it.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else f"{boot}:{pid}:{fields[18]}"
