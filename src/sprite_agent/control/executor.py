"""Runs one command for the agent, and outlives it: a program of its own, of the standard library only.

    python -I -S executor.py EXECUTIONS SOCKET USER

It may be started long before there is a command, and waits for one while its agent lives.
Of that one it has nothing but SOCKET, the one end of a pair whose other end is the agent's
alone. By it come two messages:

    the plan    as JSON, and with it the lane: the lock that keeps other commands out, to be
                inherited by the command too
    the gate    one byte, when the plan may be run: the journal has the command's row

Its end before the second means that the agent is gone, and nothing is run. Its end after the
result means that the agent has freed the lane, or is gone: then it is freed here. USER is 1
where commands run as another user. What is left in the execution's folder below EXECUTIONS tells
how far it got, whoever was killed meanwhile:

    process       which process is the command's, as /proc/<pid>/stat has it
    started       the command has been, or is about to be, started
    result.json   how it ended
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

STARTED = "started"
PROCESS = "process"
RESULT = "result.json"

OPEN = b"G"
NEVER_RUN = 96
"""Exit code: no plan came or its gate was not opened, or there was no room to record a result."""

_DRAFT = "result.draft"
_RESERVED_BYTES = 64 * 1024
"""More than any result takes: room for it is taken before the command is started."""
_MOST_MESSAGE_BYTES = 256 * 1024
"""More than a message can have."""
_AMBIENT_CLEAR_ALL = (47, 4)
"""prctl's PR_CAP_AMBIENT and PR_CAP_AMBIENT_CLEAR_ALL."""
_NO_NEW_PRIVILEGES = 38


def main(executions: str, number: int, changes_user: int) -> int:
    """Waits for a plan and its gate, runs the command to its end and records it.

    The end of what it sends tells the agent that the result is there; the exit code is of use to nobody else.
    """
    os.set_inheritable(number, False)  # noqa: FBT003  # its one parameter has no other form
    command = Command(_privileges_dropper() if changes_user else None, not_its_own=number)
    with socket.socket(fileno=number) as agent:
        text, lane = _plan_from(agent, command)
        if not text:
            return NEVER_RUN
        plan: dict[str, Any] = json.loads(text)
        os.chdir(Path(executions, plan["execution"]))
        hit("entered")
        try:
            draft = _reserve()
            _note(command.pid)
            if agent.recv(1) != OPEN:
                return NEVER_RUN
            hit("gated")
            _mark()
        except OSError:
            with contextlib.suppress(OSError):  # else it counts as run, which is safe
                Path(STARTED).unlink()
            return NEVER_RUN
        hit("marked")
        result = _run(command, plan, text, lane)
        hit("ran")
        _record(draft, result)
        agent.shutdown(socket.SHUT_WR)
        _sync(".")  # while the agent, if there still is one, records the result for good
        hit("recorded")
        with contextlib.suppress(OSError):
            agent.recv(1)  # nothing but its end: until then the lane is the agent's to free
        # Nobody else may be left to free it, and a child of the command may hold it for ever.
        fcntl.flock(lane, fcntl.LOCK_UN)
        return 0


def hit(place: str) -> None:
    """A place where tests end this process; here it does nothing."""


class Command:
    """The process of the command: forked before there is one, which takes longer than to start it then.

    Until it is told what to become it ends as soon as this process does, and this one with it.
    """

    def __init__(self, drop_privileges: Callable[[], None] | None, *, not_its_own: int) -> None:
        """Forks it.

        Args:
            drop_privileges: what it does when it has changed its user.
            not_its_own: a descriptor for it to close.
        """
        self.orders, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.output, output = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(not_its_own)
                self.orders.close()
                for standard in (1, 2):
                    os.dup2(output, standard)
                _become_the_command(orders, drop_privileges)
            finally:
                os._exit(NEVER_RUN)
        orders.close()
        os.close(output)
        os.set_blocking(self.output, False)
        self.exit_code: int | None = None
        """Negative: ended by that signal; None: it has not ended, as far as was looked."""
        self.ending, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        """Can be read when it may have ended: to ask again and again would cost up to 50 ms."""
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def start(self, plan: bytes, lane: int) -> str:
        """Has it become the command of a plan; why it could not, if so.

        If it was killed before, that is how the command ended.
        """
        try:
            socket.send_fds(self.orders, [plan], [lane])
            return self.orders.recv(_MOST_MESSAGE_BYTES).decode()
        except (BrokenPipeError, ConnectionResetError):
            return ""

    def has_ended(self, *, kill: bool = False) -> bool:
        """Whether it has.

        Args:
            kill: end it with all its process group, and wait for that.
        """
        if kill and self.exit_code is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        if self.exit_code is None:
            ended, status = os.waitpid(self.pid, 0 if kill else os.WNOHANG)
            if ended:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None


def _become_the_command(orders: socket.socket, drop_privileges: Callable[[], None] | None) -> None:
    """What the command's process does; returns where it does not become it."""
    os.setsid()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and the command would then too
        signal.signal(number, signal.SIG_DFL)
    text, _lanes, _, _ = socket.recv_fds(orders, _MOST_MESSAGE_BYTES, 1)  # to be inherited, as it is
    if not text:
        return
    plan = json.loads(text)
    os.umask(plan["umask"])
    if (user := plan["user"]) is not None:
        try:
            os.setgroups(user["groups"])
            os.setregid(user["gid"], user["gid"])
            os.setreuid(user["uid"], user["uid"])
            assert drop_privileges is not None  # noqa: S101  # it was started for that
            drop_privileges()
        except OSError:
            orders.send(b"the user could not be changed")
            return
    try:
        os.execvpe(plan["command"][0], plan["command"], plan["environment"])  # noqa: S606  # from the agent's table, no shell
    except (OSError, ValueError) as error:
        orders.send(str(getattr(error, "strerror", error)).encode())


def _plan_from(agent: socket.socket, command: Command) -> tuple[bytes, int]:
    """The plan's text and the lane; no text where none will be run."""
    readiness = select.poll()
    readiness.register(agent, select.POLLIN)
    readiness.register(command.orders, select.POLLIN)
    if command.orders.fileno() in {number for number, _ in readiness.poll()}:
        return b"", -1  # it was killed
    text, lanes, _, _ = socket.recv_fds(agent, _MOST_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    return text, lanes[0] if lanes else -1


def _note(pid: int) -> None:
    """Notes which process is the command's, so that it can be found by who cleans up after a killed executor."""
    note = os.open(PROCESS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.write(note, Path(f"/proc/{pid}/stat").read_bytes())
    os.close(note)


def _reserve() -> int:
    """A descriptor of the result's draft, on whose bytes the disk can't be full any more."""
    draft = os.open(_DRAFT, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.posix_fallocate(draft, 0, _RESERVED_BYTES)
    return draft


def _record(draft: int, result: dict[str, Any]) -> None:
    text = json.dumps(result).encode()
    os.pwrite(draft, text, 0)
    os.ftruncate(draft, len(text))
    os.fsync(draft)
    hit("drafted")
    Path(_DRAFT).rename(RESULT)


def _run(command: Command, plan: dict[str, Any], text: bytes, lane: int) -> dict[str, Any]:
    trouble = command.start(text, lane)
    if trouble:
        return {"exitCode": None, "timedOut": False, "output": f"{plan['command'][0]}: {trouble}"}
    hit("running")
    tail, in_time = _follow(command, time.monotonic() + plan["timeoutSeconds"], plan["outputBytes"])
    if not in_time:
        command.has_ended(kill=True)
    output = _bounded_text(tail, plan["outputBytes"])
    return {"exitCode": command.exit_code, "timedOut": not in_time, "output": output}


def _follow(command: Command, until: float, most: int) -> tuple[bytes, bool]:
    """Reads until the command has ended; the end of its output, and whether it ended in time.

    The pipe may stay open after that: a child of the command may have inherited it.
    """
    readiness = select.poll()
    readiness.register(command.output, select.POLLIN)
    readiness.register(command.ending, select.POLLIN)
    tail, ended = b"", command.has_ended()
    while (left := until - time.monotonic()) > 0:
        ready = {number for number, _ in readiness.poll(0 if ended else left * 1000)}
        if command.output in ready:
            chunk = os.read(command.output, 64 * 1024)
            tail = (tail + chunk)[-most:]
            if not chunk:
                readiness.unregister(command.output)
        elif ended:
            return tail, True
        if command.ending in ready:  # only now: what it printed last may have come after this look at its output
            os.read(command.ending, 64)
            ended = command.has_ended()  # it may only have been stopped
    return tail, command.has_ended()


def _bounded_text(output: bytes, most: int) -> str:
    """Text of at most `most` bytes in UTF-8: a byte that is none becomes three."""
    text = output.decode(errors="replace").encode()
    return text[-most:].decode(errors="ignore")


def _privileges_dropper() -> Callable[[], None]:
    """What the command's process does last before it becomes the command, already as its user.

    A process that was not root keeps ambient capabilities when it changes its user.
    """
    import ctypes  # noqa: PLC0415  # only where it is needed: it costs as much as all the rest

    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def drop() -> None:
        for words in ((*_AMBIENT_CLEAR_ALL, 0, 0, 0), (_NO_NEW_PRIVILEGES, 1, 0, 0, 0)):
            if prctl(*words):
                raise OSError(ctypes.get_errno(), "prctl")

    return drop


def _mark() -> None:
    """Returns when the mark is on the disk, and the way to it: its folder was made a moment ago."""
    file = os.open(STARTED, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.fsync(file)
    os.close(file)
    _sync(".")
    _sync("..")


def _sync(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fsync(folder)
    os.close(folder)


if __name__ == "__main__":
    # At once: what Python does at its end would compete with the agent, which has been told.
    os._exit(main(sys.argv[1], *map(int, sys.argv[2:])))
