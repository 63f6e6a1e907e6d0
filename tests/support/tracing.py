"""strace: has the system calls of a process fail, and tells in which order they were made."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Sequence

INJECTED = "(INJECTED)"
"""What a line of the trace says of a call that was made to fail."""


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
        return self._output.read_text().splitlines()
