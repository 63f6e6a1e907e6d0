"""An agent that is started again whenever it has ended, as a supervisor in a Sprite does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sprite_agent.face.config import TOKEN_VARIABLE

if TYPE_CHECKING:
    from types import TracebackType

PROGRAM = Path(sys.executable).with_name("sprite-agent")


class Supervised:
    """`sprite-agent serve`, on a Unix socket below `place` that stays the same. Lives as long as its `with`."""

    def __init__(self, place: Path, repo: Path, *, runtime: str, token: str) -> None:
        self.address = f"unix:{place}/agent.sock"
        self.state = place / "state"
        self.log = place / "agent.log"
        """What all of them have printed."""
        self.starts = 0
        options = ("--repo", str(repo), "--listen", self.address, "--state-dir", str(self.state))
        self._command = [str(PROGRAM), "serve", *options, "--superloop-bin", runtime]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {"PATH": path, "HOME": str(place), TOKEN_VARIABLE: token}
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self.kill()
        self._watcher.join()

    def kill(self) -> None:
        """Kills the one that runs at the moment, wherever it is."""
        self._process.kill()

    def _watch(self) -> None:
        while not self._ending.is_set():
            self._process.wait()
            if not self._ending.is_set():
                self._process = self._start()
        self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
