"""Whether a Sprite that does not answer sleeps, which is no fault, or is gone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

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
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(_TIMEOUT):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return output.strip() if process.returncode == 0 else None
