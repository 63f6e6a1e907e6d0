"""The processes of a run: the bench's own workers and real agents, what they use, and their certain end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from opsmgr.cli import OBJECTS_BETWEEN_COLLECTIONS
from sprite_agent.face.config import TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

_T = TypeVar("_T")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

PATIENCE = 120.0
"""Seconds for any one thing asked of a process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """How to reach a server: an agent, or a floor that stands beside it."""

    address: str
    token: str

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries."""
        return (("authorization", f"Bearer {self.token}"),)


def cpu_seconds(pid: int) -> float:
    """What the living threads of a process have run so far; finer than the ticks of /proc/PID/stat."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory(pid: int) -> int:
    """Bytes of a process that are in memory now."""
    return _status(pid, "VmRSS")


def peak_memory(pid: int) -> int:
    """The most bytes that a process has had in memory since it started, or since `forget_peak`."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    """Has the peak begin anew from what is in memory now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def confine(pid: int, processors: set[int]) -> None:
    """Has a process run on these processors only, with all of its threads and those to come."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), processors)


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Worker:
    """A process that runs coroutines one after another, all in one event loop. Lives as long as its `with`.

    What they leave behind in their module stays: an open stream, a server.
    """

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare)
        self.pid = self._pool.submit(os.getpid).result(PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._pool.shutdown(cancel_futures=True)

    def call(self, function: Callable[..., Coroutine[Any, Any, _T]], *args: object, patience: float = PATIENCE) -> _T:
        """What the coroutine returns; TimeoutError after `patience` seconds."""
        return self._pool.submit(_run, function, args).result(patience)


_loop = asyncio.new_event_loop()
"""Of this process, where it is a worker."""


def _prepare() -> None:
    """Makes a worker of this process, set up as `opsmgr run` is. It ends with the bench, however that ends."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _raise_file_limit()
    threading.Thread(target=_loop.run_forever, daemon=True).start()
    threading.Thread(target=_end_with_the_bench, daemon=True).start()


def _end_with_the_bench() -> None:
    bench = multiprocessing.parent_process()
    if bench is not None:
        bench.join()
        os._exit(1)


def _run(function: Callable[..., Coroutine[Any, Any, _T]], args: tuple[object, ...]) -> _T:
    return asyncio.run_coroutine_threadsafe(function(*args), _loop).result()


class Agent:
    """One `sprite-agent serve` on a repo, on loopback, with a token. Lives as long as its `with`."""

    def __init__(self, repo: Path, *options: str) -> None:
        self._repo = repo
        self._options = options
        self._token = secrets.token_hex(16)
        self._log = repo.with_suffix(".agent.log")
        self._state = repo.with_suffix(".state")

    def __enter__(self) -> Self:
        program = Path(sys.executable).with_name("sprite-agent")
        listen = ("--listen", "127.0.0.1:0")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, "serve", "--repo", self._repo, "--state-dir", self._state, *listen, *self._options],
                env={"PATH": os.environ["PATH"], "HOME": str(self._repo), TOKEN_VARIABLE: self._token},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the bench's: it ends its agents itself
                preexec_fn=_prepare_agent,  # noqa: PLW1509  # two system calls, no lock
            )
        self.pid = self._process.pid
        try:
            self.server = Server(address=self._address(), token=self._token)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)

    def _address(self) -> str:
        """Where it listens, once it says so."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            for line in self._log.read_text().rpartition("\n")[0].splitlines():
                entry = json.loads(line) if line.startswith("{") else {}
                if entry.get("event") == "serving":
                    return str(entry["address"])
            time.sleep(0.01)
        raise RuntimeError(f"the agent does not serve; it said: {self._log.read_text()}")


def _prepare_agent() -> None:
    """Between fork and exec. The agent ends with the bench, even where that is killed."""
    _raise_file_limit()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
