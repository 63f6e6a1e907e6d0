"""Names a process so that another one with the same pid is not taken for it."""

from __future__ import annotations

import os
from pathlib import Path

NOBODY = "::"
"""The name of no process."""

_START_TIME = 18
"""Place of the start time in /proc/<pid>/stat, among the fields after the state."""


def this_process() -> str:
    """The name of this process: boot id, pid, start time."""
    return name_of(os.getpid()) or f"?:{os.getpid()}:?"


def this_boot() -> str:
    """The id of this boot of the machine; another one after a restart of it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def is_alive(name: str) -> bool:
    """Whether the process of that name still runs."""
    pid = name.split(":")[1]
    return pid.isdecimal() and name_of(int(pid)) == name


def name_of(pid: object) -> str | None:
    """The name of the process that runs under a pid, which comes from an artifact and may be anything."""
    if type(pid) is not int or pid <= 0:
        return None
    try:
        return name_from_stat(Path(f"/proc/{pid}/stat").read_bytes())
    except OSError:
        return None


def name_from_stat(content: bytes) -> str | None:
    """The name of the process whose /proc/<pid>/stat holds this; None: it has ended, or this is no such content."""
    # The second field is the command in parentheses and may hold anything, text or not; the state follows it.
    front, parenthesis, fields = content.decode("ascii", errors="replace").rpartition(")")
    pid = front.partition(" ")[0]
    state, *rest = fields.split() or [""]
    if not parenthesis or state == "Z" or len(rest) < _START_TIME + 1:
        return None
    return f"{this_boot()}:{pid}:{rest[_START_TIME]}"


def pid_of(name: str) -> int:
    """The pid in a process's name."""
    return int(name.split(":")[1])
