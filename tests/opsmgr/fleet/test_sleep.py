"""Whether a Sprite that does not answer sleeps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from opsmgr.fleet import sleep
from opsmgr.fleet.sleep import sleeps
from support.waiting import DEADLINE, eventually


def command(folder: Path, script: str) -> tuple[str, ...]:
    """A program that says how the Sprite is."""
    path = folder / "state"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return (str(path),)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked for its status has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.parametrize(("said", "asleep"), [("cold", True), ("warm", True), ("running", False)])
async def test_the_platform_is_believed_whatever_the_loop_did_last(tmp_path: Path, said: str, asleep: bool) -> None:  # noqa: FBT001  # a table's column
    ask = command(tmp_path, f"echo {said}")

    assert await sleeps(ask, runs=True) is asleep
    assert await sleeps(ask, runs=False) is asleep


@pytest.mark.parametrize("runs", [True, False])
async def test_without_a_word_of_the_platform_a_sprite_with_a_run_at_work_does_not_sleep(
    tmp_path: Path,
    runs: bool,  # noqa: FBT001  # a table's column
) -> None:
    assert await sleeps((), runs=runs) is not runs
    assert await sleeps(command(tmp_path, "exit 3"), runs=runs) is not runs
    assert await sleeps((str(tmp_path / "nowhere"),), runs=runs) is not runs


@pytest.mark.parametrize("script", ["exec sleep 30", "sleep 30; echo cold", "setsid sleep 30; echo cold"])
async def test_a_platform_that_does_not_say_in_time_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(sleep, "_TIMEOUT", 0.1)

    async with asyncio.timeout(DEADLINE):
        assert not await sleeps(command(tmp_path, script), runs=True)


async def test_who_no_longer_wants_to_know_is_not_held_up_and_leaves_nothing_running(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    ask = command(tmp_path, f"sleep 30 & echo $! > {said}.draft; mv {said}.draft {said}; wait")
    asking = asyncio.create_task(sleeps(ask, runs=True))
    await eventually(said.exists, "it hangs")
    asking.cancel()
    done, _ = await asyncio.wait({asking}, timeout=DEADLINE)

    assert done
    await eventually(lambda: is_gone(int(said.read_text())), "what it has started has ended")


async def test_what_the_platforms_command_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    async with asyncio.timeout(DEADLINE):
        assert await sleeps(command(tmp_path, "sleep 30 & echo cold"), runs=True)
