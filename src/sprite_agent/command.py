"""Runs the runtime's command: an argument vector from a fixed table, no shell, bounded in time and output."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sprite_agent.errors import RuntimeMissing

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ControlRequest

COMMAND_TIMEOUT = 30.0
"""Seconds a command may run; a cancel takes up to about 12."""
MAX_OUTPUT_BYTES = 8 * 1024

_POLL_MS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandOutcome:
    """How a command ended."""

    exit_code: int | None
    """Negative: ended by that signal; None: it could not be started."""
    timed_out: bool
    output: str
    """The end of what it printed, both streams."""


def find_runtime(configured: str | None) -> Path:
    """The runtime's command.

    Raises:
        RuntimeMissing: none is configured, or it is no executable file.
    """
    if not configured:
        raise RuntimeMissing("the runtime's command is not configured: give --superloop-bin or set SUPERLOOP_BIN")
    path = Path(configured)
    if not path.is_file() or not os.access(path, os.X_OK):
        raise RuntimeMissing(f"the runtime's command {configured} is no executable file")
    return path.resolve()


def build_command(runtime: Path, repo: Path, request: ControlRequest) -> list[str]:
    """The argument vector of an intent."""
    if request["intent"] == "cancel":
        return [str(runtime), "cancel", "--repo", str(repo)]
    command = [str(runtime), "approve", "--repo", str(repo), "--loop", request["loopId"]]
    command += ["--by", request["requestedBy"]]
    if request["intent"] == "reject":
        command.append("--reject")
    if "note" in request:
        command += ["--note", request["note"]]
    return command


def run_command(
    command: list[str], timeout: float = COMMAND_TIMEOUT, *, keep_open: int | None = None
) -> CommandOutcome:
    """Runs a command to its end, in a session of its own and with a clean environment.

    Args:
        command: the argument vector.
        timeout: seconds after which its session is killed.
        keep_open: a descriptor that it inherits.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    if "HOME" in os.environ:
        environment["HOME"] = os.environ["HOME"]
    try:
        process = subprocess.Popen(  # noqa: S603  # an argument vector from build_command, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment,
            start_new_session=True,
            pass_fds=() if keep_open is None else (keep_open,),
        )
    except OSError as error:
        return CommandOutcome(exit_code=None, timed_out=False, output=f"{command[0]}: {error.strerror}")
    with process:
        tail, in_time = _follow(process, time.monotonic() + timeout)
        if not in_time:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return CommandOutcome(exit_code=process.returncode, timed_out=not in_time, output=_bounded_text(tail))


def _follow(process: subprocess.Popen[bytes], until: float) -> tuple[bytes, bool]:
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
            tail = (tail + chunk)[-MAX_OUTPUT_BYTES:]
        if ended and not (readable and pipe_open):
            return tail, True
        if not pipe_open and not ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
        ended = process.poll() is not None
        if time.monotonic() > until:
            return tail, ended


def _bounded_text(output: bytes) -> str:
    """Text of at most `MAX_OUTPUT_BYTES` in UTF-8: a byte that is none becomes three."""
    text = output.decode(errors="replace").encode()
    return text[-MAX_OUTPUT_BYTES:].decode(errors="ignore")
