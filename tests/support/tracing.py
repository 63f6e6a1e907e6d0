"""strace: has the system calls of a process fail, and tells in which order they were made."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Sequence

INJECTED = "(INJECTED)"
"""What a line of the trace says of a call that was made to fail."""

_UNFINISHED = "<unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>")
_SYNCS = ("fsync", "fdatasync", "rename", "unlink")


class Trace:
    """The system calls of one process, and of all that it starts, from the moment it is made."""

    def __init__(self, pid: int, output: Path, calls: Sequence[str], *, inject: str | None = None) -> None:
        """Returns when the process is watched.

        Args:
            pid: the process.
            output: where to write the trace.
            calls: which calls to watch.
            inject: what to do to them, as in "fsync:error=EIO:when=3". They are counted for each thread.
        """
        self._output = output
        options = ["-f", "-qq", "-y", "-s", "64", "-o", str(output), "-e", f"trace={','.join(calls)}"]
        if inject is not None:
            options += ["-e", f"inject={inject}"]
        self._strace = subprocess.Popen(["strace", *options, "-p", str(pid)], stderr=subprocess.PIPE)
        status = Path(f"/proc/{pid}/status")
        until(
            lambda: self._strace.poll() is not None or "TracerPid:\t0\n" not in status.read_text(),
            "strace watches the process",
        )
        if self._strace.poll() is not None:
            raise AssertionError(f"strace can't watch a process here: {self._strace.communicate()[1].decode()}")

    def lines(self) -> list[str]:
        """The calls in their order, once all the processes have ended."""
        self._strace.communicate(timeout=DEADLINE)
        return _joined(self._output.read_text().splitlines())


def _joined(lines: list[str]) -> list[str]:
    """The calls each on one line, also those during which another process made one.

    What is to be on the disk is where the call has ended, whatever else where it began.
    """
    found: list[str] = []
    begun: dict[str, int] = {}
    for line in lines:
        pid, call = line.split(maxsplit=1)
        resumed = _RESUMED.match(call)
        if resumed is None:
            if call.endswith(_UNFINISHED):
                begun[pid] = len(found)
            found.append(line)
            continue
        place = begun.pop(pid)
        whole = found[place].removesuffix(_UNFINISHED).rstrip() + call[resumed.end() :]
        found[place] = "" if resumed[1] in _SYNCS else whole
        if resumed[1] in _SYNCS:
            found.append(whole)
    return [line for line in found if line]
