"""docs/runbook.md knows every reason there is, and the commands in it and in the other guides are ones that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import opsmgr.cli
import opsmgr.errors
import sprite_agent.cli
from opsmgr.passes.health import FAILURES
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
GUIDES = ("docs/runbook.md", "docs/library.md", "docs/metrics.md")
PROGRAMS = {"opsmgr": opsmgr.cli.main, "sprite-agent": sprite_agent.cli.main}


def explained(heading: str) -> set[str]:
    """What the first column of a section's table names."""
    section = RUNBOOK.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    for row in rows:
        assert len(row) == 3, row
        assert all(cell.strip(" |") for cell in row), f"{row[0]} has no meaning or no advice"
    return {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}


# The reasons.


def reasons(cls: type[OpsError]) -> Iterator[str]:
    """Those of the classes below, of the programs' own."""
    for below in cls.__subclasses__():
        yield from reasons(below)
        if below.__module__.startswith(("opsmgr", "sprite_agent")) and "reason" in vars(below):
            yield below.reason


def sources(*names: str) -> str:
    return "\n".join((ROOT / "src" / name).read_text() for name in names)


def test_every_reason_of_a_refusal_is_explained_and_no_other() -> None:
    assert explained("Refusals") == set(reasons(OpsError))


def test_every_code_of_the_health_is_explained_and_no_other() -> None:
    text = sources("opsmgr/passes/health.py")
    added = set(re.findall(r'\badd(?:_above)?\(\s*"([a-z_]+)"', text))
    by_control = {f"control_{status}" for status in ("ambiguous", "failed_command")}

    assert added
    assert 'code = f"control_{' in text
    assert explained("Health") == {*FAILURES.values(), *added, *by_control}


def test_every_way_an_ingest_fails_is_named() -> None:
    rows = [line for line in RUNBOOK.splitlines() if line.startswith("| `")]

    for failure, code in FAILURES.items():
        assert any(row.startswith(f"| `{code}`") for row in rows)
        assert failure == code or any(f"`{failure}`" in row for row in rows) or failure == "service_response_invalid"


def test_every_category_of_an_escalation_is_explained_and_no_other() -> None:
    text = sources("opsmgr/passes/escalations.py", "opsmgr/agent_memory.py")
    written = set(re.findall(r'\(\s*"([a-z_]+)",\s*\{', text))
    lost = {"log_replaced", "log_truncated", "history_rewritten"}
    findings = {
        name.lower()
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r'^([A-Z]+(?:_[A-Z]+)+) = "\1"$', path.read_text(), re.MULTILINE)
    }

    assert {"divergence_detected", "agent_state_rolled_back"} <= written
    assert "approval_unattributed" in findings
    assert explained("Escalations") == {*written, *lost, *findings, "health_degraded", "health_critical"}


def test_every_alert_is_explained_and_no_other() -> None:
    rules = re.findall(r"- alert: (\w+)", (ROOT / "docs" / "metrics.md").read_text())

    assert rules
    assert explained("Alerts") == set(rules)


def test_every_link_in_the_runbook_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK))
    assert links
    assert links <= anchors


# The commands.


def calls(pattern: str) -> list[str]:
    """What the guides have that begins with the name of a program, without its remark."""
    texts = [(ROOT / guide).read_text() for guide in GUIDES]
    found = {
        re.sub(r"\s+", " ", call.partition("  #")[0]).strip() for text in texts for call in re.findall(pattern, text)
    }
    return sorted(found)


LINES = calls(r"(?m)^ {4,}((?:opsmgr|sprite-agent) .+)$")
MENTIONS = calls(r"`((?:opsmgr|sprite-agent) [^`]+)`")


def found_in(call: str) -> tuple[click.Command, list[str]]:
    """The command that is called, and the words after its name."""
    program, *words = shlex.split(call)
    command: click.Command = PROGRAMS[program]
    while isinstance(command, click.Group):
        assert words, f"{call} names no command"
        assert words[0] in command.commands, f"{call}: there is no {words[0]}"
        command = command.commands[words.pop(0)]
    return command, words


@pytest.mark.parametrize("call", LINES)
def test_a_line_of_code_is_taken_by_the_program_that_it_calls(call: str) -> None:
    command, words = found_in(call)

    with command.make_context(command.name, words) as context:  # raises where it is called wrongly
        assert context.command is command


@pytest.mark.parametrize("call", MENTIONS)
def test_a_command_that_is_mentioned_exists_with_its_options(call: str) -> None:
    command, words = found_in(call)
    options = {name for option in command.params for name in option.opts if name.startswith("--")}

    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


def test_the_guides_have_lines_of_both_programs() -> None:
    assert {call.split()[0] for call in LINES} == set(PROGRAMS)
