"""docs/cli.md says what the programs take, no less and no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import opsmgr.cli
import sprite_agent.cli
from opsmgr.cli.target import Target

if TYPE_CHECKING:
    import click

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
COMMANDS = {
    f"{program} {name}": command
    for program, group in (("opsmgr", opsmgr.cli.main), ("sprite-agent", sprite_agent.cli.main))
    for name, command in group.commands.items()
}


def section(heading: str) -> str:
    """The text below a heading."""
    return DOCS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def options(command: click.Command) -> set[str]:
    return {name for option in command.params for name in option.opts if name.startswith("--")}


SHARED = {f"--{name.replace('_', '-')}" for name in Target.__dataclass_fields__}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_described_with_all_its_options_and_no_others(name: str) -> None:
    described = set(re.findall(r"`(--[a-z-]+)", section(name)))
    own = options(COMMANDS[name])

    assert described == (own if name in {"opsmgr project", "sprite-agent serve"} else own - SHARED)


def test_the_options_that_say_which_loop_are_described_once() -> None:
    assert set(re.findall(r"`(--[a-z-]+)", section("Which loop, and how to reach it"))) >= SHARED


def test_every_described_command_exists() -> None:
    described = set(re.findall(r"^## ((?:opsmgr|sprite-agent) [a-z]+)$", DOCS, re.MULTILINE))

    assert described == set(COMMANDS)


def test_every_exit_code_is_described() -> None:
    from opsmgr.cli import output  # noqa: PLC0415  # beside the assertion it is for

    codes = {0, output.EXIT_FAILED, output.EXIT_AMBIGUOUS, output.EXIT_NO_ANSWER, output.EXIT_USAGE, 130}

    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)} == codes
