"""Whether a Sprite that does not answer sleeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from opsmgr.fleet import sleep
from opsmgr.fleet.sleep import sleeps

if TYPE_CHECKING:
    from pathlib import Path


def command(folder: Path, script: str) -> tuple[str, ...]:
    """A program that says how the Sprite is."""
    path = folder / "state"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return (str(path),)


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


async def test_a_platform_that_does_not_say_in_time_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleep, "_TIMEOUT", 0.1)

    assert not await sleeps(command(tmp_path, "exec sleep 30"), runs=True)
