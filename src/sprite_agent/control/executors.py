"""Executor processes: each is started, handed one plan, and ends; one may wait for the next command.

To start one takes longer than all the rest of a short control. So an agent that serves
keeps one waiting, which has nothing of the agent's but its end of a socket pair: it ends
when that does, and runs nothing that was not handed to it.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from sprite_agent.control import executor
from sprite_agent.control.command import build_environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXECUTOR = (sys.executable, "-I", "-S", executor.__file__)
"""Isolated and without site-packages: nobody's modules get into it."""

LATER = 0.02
"""Seconds from the end of a command to the start of the next executor: by then the answer is on its way, and what it
takes to start Python holds nobody up."""
_MESSAGE = 5.0
"""Seconds that an executor may take to have room for a message; there is always room for these two."""
_ENDING = 5.0
"""Seconds that an executor which is done may take to end."""


class ExecutorProcess:
    """One executor, from its start to its end. Only who has it may call."""

    def __init__(self, folder: Path, *, changes_user: bool) -> None:
        """Starts one.

        Args:
            folder: where the folders of executions are.
            changes_user: whether its command is to run as another user.

        Raises:
            OSError: it can't be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603  # this program's own file
                    [*EXECUTOR, str(folder), str(theirs.fileno()), str(int(changes_user))],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=build_environment(None),
                    start_new_session=True,
                    pass_fds=(theirs.fileno(),),
                )
            except BaseException:
                ours.close()
                raise
        ours.settimeout(_MESSAGE)
        self._socket = ours

    def hand_over(self, plan: dict[str, Any], lane: int) -> None:
        """Gives it what to run, once its gate is opened, and the lane to hold.

        Raises:
            OSError: it has ended.
        """
        socket.send_fds(self._socket, [json.dumps(plan).encode()], [lane])

    def open_gate(self) -> None:
        """Lets it run its plan.

        Raises:
            OSError: it has ended, and has run nothing.
        """
        self._socket.send(executor.OPEN)

    def is_done(self, timeout: float) -> bool:
        """Whether it has recorded how its command ended, or has ended itself, within so many seconds."""
        readiness = select.poll()
        readiness.register(self._socket, select.POLLIN)
        return bool(readiness.poll(timeout * 1000))

    def end(self, *, kill: bool = False) -> int:
        """Its exit code, once it has ended: by itself if its gate was not opened, or if it is done.

        Args:
            kill: end it wherever it is.
        """
        self._socket.close()
        if not kill:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(_ENDING)
        self._process.kill()  # if it was to end by itself, it was stopped: what it had to record it has
        return self._process.wait()


class Executors:
    """The executors of one repo. Lives as long as its engine; any thread may call."""

    def __init__(self, folder: Path, *, changes_user: bool, ahead: bool) -> None:
        """Starts nothing yet.

        Args:
            folder: where the folders of executions are.
            changes_user: whether the commands run as another user.
            ahead: whether to start the next one before it is needed, from the first `prepare` on.
        """
        self._folder = folder
        self._changes_user = changes_user
        self._ahead = ahead
        # Guards what follows. One is started under it: who comes meanwhile is to have that one, and not start another.
        self._lock = threading.Lock()
        self._waiting: ExecutorProcess | None = None
        self._work: list[Callable[[], object]] = []
        self._keeper: threading.Thread | None = None
        self._wanted = threading.Event()
        self._closing = threading.Event()

    def close(self) -> None:
        """Ends the one that waits. Those that work go on, and end by themselves."""
        self._closing.set()
        self._wanted.set()
        if self._keeper is not None:
            self._keeper.join()
        with self._lock:
            if self._waiting is not None:
                self._waiting.end(kill=True)
                self._waiting = None
        self._do_work()

    def hand_over(self, plan: dict[str, Any], lane: int) -> ExecutorProcess:
        """Gives a plan to the executor that waits or, where none does or it was killed, to a new one.

        Raises:
            OSError: none can be started.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            try:
                waiting.hand_over(plan, lane)
            except OSError:
                waiting.end(kill=True)
            else:
                return waiting
        started = self._start()
        try:
            started.hand_over(plan, lane)
        except OSError:
            started.end(kill=True)
            raise
        return started

    def prepare(self) -> None:
        """Has the next executor started, a little later and in a thread of its own, if that is to be done ahead."""
        if not self._ahead or self._closing.is_set():
            return
        with self._lock:
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep_one_waiting, name="executors", daemon=True)
                self._keeper.start()
        self._wanted.set()

    def later(self, work: Callable[[], object]) -> None:
        """Has done what no answer needs to wait for: a little later where there is a thread for it, else at once."""
        with self._lock:
            if waits := self._keeper is not None and not self._closing.is_set():
                self._work.append(work)
        if waits:
            self._wanted.set()
        else:
            work()

    def _keep_one_waiting(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()  # before the look at what may have set it, or a wish between the two would be lost
            if self._closing.wait(LATER):
                return
            self._do_work()
            with self._lock, contextlib.suppress(OSError):  # then the control that needs it starts one, or says why not
                if self._waiting is None:
                    self._waiting = self._start()

    def _start(self) -> ExecutorProcess:
        return ExecutorProcess(self._folder, changes_user=self._changes_user)

    def _do_work(self) -> None:
        with self._lock:
            work, self._work = self._work, []
        for each in work:
            each()
