"""A decision that was not made through the agent is found, whatever name it was made under."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from support.repos import LOOP
from support.runtime import executions, mark_in, request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sprite_agent.contract.agent_state import Finding
    from sprite_agent.repo import Repo
    from support.repos import LoopFiles

    MakeRepo = Callable[..., Repo]


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    """A repo whose journal is there, with one key in it."""
    repo = make_repo()
    repo.execute(request("cancel", idempotencyKey="key-0"))
    return repo


def findings(repo: Repo) -> tuple[Finding, ...]:
    """What an operator should look into."""
    return repo.read_loop(LOOP).findings


def decide(loop: LoopFiles, by: Any, status: Any = "approved", **members: Any) -> None:
    """Decides the approval request as sandbox code can."""
    loop.ask_approval(status=status, decision={"by": by}, **members)


@pytest.mark.parametrize("intent", ["approve", "reject"])
def test_a_decision_through_the_agent_is_attributed(repo: Repo, intent: str) -> None:
    repo.execute(request(intent))

    assert findings(repo) == ()


def test_it_stays_attributed_after_a_restart(make_repo: MakeRepo, repo: Repo) -> None:
    repo.execute(request())

    assert findings(make_repo()) == ()


@pytest.mark.parametrize("by", ["alice@corp", "ada", "ada#0123456789abcdef", "#", "", None, ["ada"], {}])
def test_a_decision_of_the_sandboxs_own_is_found(repo: Repo, loop: LoopFiles, by: Any) -> None:
    """C11: it can decide under any name; what it can't do is to have a row in the journal."""
    decide(loop, by)

    (found,) = findings(repo)
    assert found.reason == "APPROVAL_UNATTRIBUTED"
    assert found.message.startswith("approval request ")
    assert found.message.endswith(
        f" of loop demo was approved by {by if isinstance(by, str) else None!r}, and not through this agent"
    )
    assert executions(loop) == []


def test_decisions_by_one_name_on_two_requests_are_two_findings(repo: Repo, loop: LoopFiles) -> None:
    """A manager that has not looked in between escalates only what it has not heard of yet."""
    decide(loop, "alice@corp")
    (first,) = findings(repo)

    decide(loop, "alice@corp", iteration=2)
    (second,) = findings(repo)

    assert first != second


def test_a_mark_of_ours_on_another_request_is_found(repo: Repo, loop: LoopFiles) -> None:
    """Sandbox code can read the mark, once it was used, and write it again."""
    mark = mark_in(repo.execute(request()))
    assert findings(repo) == ()

    decide(loop, mark, iteration=2)

    assert [found.reason for found in findings(repo)] == ["APPROVAL_UNATTRIBUTED"]


@pytest.mark.parametrize(
    "forge",
    [
        lambda mark: (mark, "rejected"),
        lambda mark: (f"eve{mark[3:]}", "approved"),
        lambda mark: (mark[1:], "approved"),
        lambda mark: (f"{mark} ", "approved"),
        lambda mark: (mark.upper(), "approved"),
    ],
    ids=["the other decision", "another name", "a part of it", "more than it", "another spelling"],
)
def test_a_mark_of_ours_with_something_else_is_found(
    repo: Repo, loop: LoopFiles, forge: Callable[[str], tuple[str, str]]
) -> None:
    by, status = forge(mark_in(repo.execute(request())))

    decide(loop, by, status)

    assert len(findings(repo)) == 1


def test_a_mark_of_another_loops_is_found(repo: Repo, loop: LoopFiles) -> None:
    mark = mark_in(repo.execute(request()))
    other = loop.folder.with_name("other")
    other.mkdir()
    for file in (loop.log, loop.approval):
        (other / file.name).write_bytes(file.read_bytes())
    assert mark in (other / "approval.json").read_text()

    assert len(repo.read_loop("other").findings) == 1
    assert findings(repo) == ()


@pytest.mark.parametrize("status", ["pending", "cancelled", "", None, 1, ["approved"], {"approved": True}])
def test_a_request_that_was_not_decided_is_nobodys(repo: Repo, loop: LoopFiles, status: Any) -> None:
    decide(loop, "eve", status)

    assert findings(repo) == ()


def test_where_nothing_is_asked_there_is_nothing_to_find(repo: Repo, loop: LoopFiles) -> None:
    loop.approval.unlink()

    assert findings(repo) == ()


def test_without_a_journal_nobody_can_tell(make_repo: MakeRepo, loop: LoopFiles, state: Path) -> None:
    decide(loop, "eve")
    assert findings(make_repo()) == ()
    state.mkdir(mode=0o700)
    (state / "journal.sqlite3").write_text("damaged")

    assert findings(make_repo()) == ()
    assert json.loads(loop.approval.read_bytes())["status"] == "approved"
