"""Whether a Sprite that does not answer sleeps, which is no fault, or is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_ASLEEP = {b"cold", b"warm"}
_TIMEOUT = 5.0
"""Seconds that the platform may take to say."""


async def sleeps(command: Sequence[str], *, runs: bool) -> bool:
    """Whether the Sprite sleeps, as far as can be told.

    Args:
        command: prints cold, warm or running, as the platform knows it; empty: there is none to ask.
        runs: whether a run was at work when the loop was seen last. A Sprite without one goes to sleep by itself.
    """
    if command:
        said = await _ask(command)
        if said is not None:
            return said in _ASLEEP
    return not runs


async def _ask(command: Sequence[str]) -> bytes | None:
    """What `command` prints; None where it fails, or takes too long."""
    try:
        with tempfile.TemporaryFile() as output:  # no pipe: whoever the command leaves behind could hold that open
            return output.read().strip() if await _is_done(command, output) else None
    except OSError:
        return None


async def _is_done(command: Sequence[str], output: IO[bytes]) -> bool:
    """Runs `command`; whether it ended well and in time. Out of time it is killed, with what it has started."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_TIMEOUT):
            await process.wait()
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or is another user's: sudo
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    output.seek(0)
    return process.returncode == 0
