"""The executor with failpoints: like the real one a program of the standard library only.

    python -I -S failing_executor.py EXECUTOR FAILPOINTS EXECUTIONS SOCKET USER

FAILPOINTS is what `Failpoints` reads; its environment is clean, so it is told by a word.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

KILL = "kill"
FULL = "full"
"""From there on no file of this process can grow: RLIMIT_FSIZE."""
_COUNTED = ("open", "write", "pwrite", "fsync", "ftruncate", "posix_fallocate", "rename", "fork", "execvpe")
"""Calls of which the n-th is a place as well, as in "executor.fsync.2=EIO"."""


class Failpoints:
    """Places at which this process is killed, or fails. Each counts once, for all the processes that share the folder.

    Read from "FOLDER|agent.recorded=kill,executor.gated=ENOSPC": side, place, and what
    happens there. Each that was passed leaves a file of its name in FOLDER.
    """

    def __init__(self, spec: str, side: str) -> None:
        folder, _, places = spec.partition("|")
        self._folder = Path(folder)
        self._side = side
        self._effects = dict(each.split("=") for each in places.split(",") if each)

    def hit(self, place: str) -> None:
        """Stands for `hit` of agent or executor."""
        name = f"{self._side}.{place}"
        if name not in self._effects:
            return
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._folder / name, os.O_CREAT | os.O_EXCL))
            effect = self._effects[name]
            if effect == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif effect == FULL:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            else:
                number = getattr(errno, effect)
                raise OSError(number, os.strerror(number))

    def count(self, name: str) -> None:
        """Has each call of a function of `os` be a place."""
        call, number = getattr(os, name), itertools.count(1)

        def counted(*args: Any, **options: Any) -> Any:
            self.hit(f"{name}.{next(number)}")
            return call(*args, **options)

        setattr(os, name, counted)


def load(path: str) -> Any:
    """The executor's module; it is in no package here."""
    spec = importlib.util.spec_from_file_location("executor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    executor = load(sys.argv[1])
    failpoints = Failpoints(sys.argv[2], "executor")
    executor.hit = failpoints.hit
    if re.search(r"\.\d+=", sys.argv[2]):
        for name in _COUNTED:
            failpoints.count(name)
    os._exit(executor.main(sys.argv[3], *map(int, sys.argv[4:])))
