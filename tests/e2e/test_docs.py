"""docs/cli.md says what the programs take, no less and no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import opsmgr.cli
import sprite_agent.cli
from opsmgr.cli.target import OPTIONS

if TYPE_CHECKING:
    import click

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def leaves(name: str, command: click.Command) -> dict[str, click.Command]:
    """The commands below a group, by their full names."""
    below = getattr(command, "commands", None)
    if below is None:
        return {name: command}
    return {full: leaf for word, each in below.items() for full, leaf in leaves(f"{name} {word}", each).items()}


COMMANDS = leaves("opsmgr", opsmgr.cli.main) | leaves("sprite-agent", sprite_agent.cli.main)


def section(heading: str) -> str:
    """The text below a heading."""
    return DOCS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def options(command: click.Command) -> set[str]:
    return {name for option in command.params for name in option.opts if name.startswith("--")}


SHARED = {"--target", *(f"--{name.replace('_', '-')}" for name in OPTIONS if name != "name")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_described_with_all_its_options_and_no_others(name: str) -> None:
    described = set(re.findall(r"`(--[a-z0-9-]+)", section(name)))
    own = options(COMMANDS[name])

    shared = SHARED if "--service-target" in own else set()
    assert described - shared == own - shared


def test_the_options_that_say_which_loop_are_described_once() -> None:
    assert set(re.findall(r"`(--[a-z0-9-]+)", section("Which loop, and how to reach it"))) >= SHARED


def test_every_described_command_exists() -> None:
    described = set(re.findall(r"^## ((?:opsmgr|sprite-agent) [a-z ]+)$", DOCS, re.MULTILINE))

    assert described == set(COMMANDS)


def test_every_exit_code_is_described() -> None:
    from opsmgr.cli import output  # noqa: PLC0415  # beside the assertion it is for

    codes = {0, output.EXIT_FAILED, output.EXIT_AMBIGUOUS, output.EXIT_NO_ANSWER, output.EXIT_USAGE, 130}

    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)} == codes
