"""Runs one command for the agent, and outlives it: a program of its own, of the standard library only.

    python -I -S executor.py FOLDER GATE LANE

FOLDER holds `plan.json`. GATE is the reading end of a pipe: one byte opens it when the
journal has the command's row; its end without a byte means that the agent is gone, and
nothing is run. LANE is the lock that keeps other commands out, inherited by the command
too. What is left in FOLDER tells how far it got, whoever was killed meanwhile:

    started       the command has been, or is about to be, started
    process       which process it is, as /proc/<pid>/stat has it
    result.json   how it ended
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PLAN = "plan.json"
STARTED = "started"
PROCESS = "process"
RESULT = "result.json"

OPEN = b"G"
NEVER_RUN = 96
"""Exit code: the gate was not opened, or there was no room to record a result."""

_DRAFT = "result.draft"
_RESERVED_BYTES = 64 * 1024
"""More than any result takes: room for it is taken before the command is started."""
_POLL_MS = 50
_AMBIENT_CLEAR_ALL = (47, 4)
"""prctl's PR_CAP_AMBIENT and PR_CAP_AMBIENT_CLEAR_ALL."""
_NO_NEW_PRIVILEGES = 38


def main(folder: str, gate: int, lane: int) -> int:
    """Waits for the gate, runs the command to its end and records it. The exit code is of use to nobody else."""
    os.chdir(folder)
    plan: dict[str, Any] = json.loads(Path(PLAN).read_bytes())
    hit("entered")
    try:
        draft = _reserve()
        note = os.open(PROCESS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        if os.read(gate, 1) != OPEN:
            return NEVER_RUN
        hit("gated")
        _write_durably(STARTED, b"")
    except OSError:
        with contextlib.suppress(OSError):  # else it counts as run, which is safe
            Path(STARTED).unlink()
        return NEVER_RUN
    hit("marked")
    result = _run(plan, lane, note)
    hit("ran")
    _record(draft, result)
    hit("recorded")
    if os.getppid() != plan["agent"]:
        # Nobody is left to free the lane, and a child of the command may hold it for ever.
        fcntl.flock(lane, fcntl.LOCK_UN)
    return 0


def hit(place: str) -> None:
    """A place where tests end this process; here it does nothing."""


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
    _sync_folder()


def _run(plan: dict[str, Any], lane: int, note: int) -> dict[str, Any]:
    user = plan["user"]
    as_user: dict[str, Any] = {}
    last_steps = [_note_taker(note)]
    if user is not None:
        as_user = {"user": user["uid"], "group": user["gid"], "extra_groups": user["groups"]}
        last_steps.append(_privileges_dropper())
    command = plan["command"]
    try:
        process = subprocess.Popen(  # noqa: S603  # an argument vector from the agent's table, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=plan["environment"],
            start_new_session=True,
            pass_fds=(lane,),
            umask=plan["umask"],
            preexec_fn=lambda: [step() for step in last_steps],  # noqa: PLW1509  # this program has one thread
            **as_user,
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the user could not be changed"
        return {"exitCode": None, "timedOut": False, "output": f"{command[0]}: {reason}"}
    with process:
        hit("running")
        tail, in_time = _follow(process, time.monotonic() + plan["timeoutSeconds"], plan["outputBytes"])
        if not in_time:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    exit_code = process.returncode
    return {"exitCode": exit_code, "timedOut": not in_time, "output": _bounded_text(tail, plan["outputBytes"])}


def _follow(process: subprocess.Popen[bytes], until: float, most: int) -> tuple[bytes, bool]:
    """Reads until the process has ended; the end of its output, and whether it ended in time.

    The pipe may stay open after that: a child of the command may have inherited it.
    """
    assert process.stdout is not None  # noqa: S101  # asked for
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    readiness = select.poll()
    readiness.register(pipe, select.POLLIN)
    tail, ended, pipe_open = b"", False, True
    while True:
        readable = bool(pipe_open and readiness.poll(0 if ended else _POLL_MS))
        if readable:
            chunk = os.read(pipe, 64 * 1024)
            pipe_open = bool(chunk)
            tail = (tail + chunk)[-most:]
        if ended and not (readable and pipe_open):
            return tail, True
        if not pipe_open and not ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
        ended = process.poll() is not None
        if time.monotonic() > until:
            return tail, ended


def _bounded_text(output: bytes, most: int) -> str:
    """Text of at most `most` bytes in UTF-8: a byte that is none becomes three."""
    text = output.decode(errors="replace").encode()
    return text[-most:].decode(errors="ignore")


def _note_taker(note: int) -> Callable[[], None]:
    """What the command's process does first, so that it is known whoever is killed: notes which one it is."""

    def take() -> None:
        with contextlib.suppress(OSError):  # only who cleans up after this program misses it
            os.write(note, Path("/proc/self/stat").read_bytes())

    return take


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


def _write_durably(name: str, content: bytes) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.write(file, content)
    os.fsync(file)
    os.close(file)
    _sync_folder()


def _sync_folder() -> None:
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fsync(folder)
    os.close(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
