"""The tree of errors is whole: one reason and one gRPC status for each leaf, and the docstring draws it as it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import grpc
import pytest

from sprite_agent import errors
from sprite_agent.errors import BY_REASON, ContractError, InternalError, NotNow, OpsError, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator


def classes(cls: type[OpsError] = OpsError) -> Iterator[type[OpsError]]:
    """Every class of the agent's tree; other modules may have branches of their own."""
    yield cls
    for subclass in cls.__subclasses__():
        if subclass.__module__ == errors.__name__:
            yield from classes(subclass)


LEAVES = [cls for cls in classes() if not any(cls in other.__bases__ for other in classes())]


def test_every_leaf_has_a_reason_of_its_own() -> None:
    reasons = [leaf.reason for leaf in LEAVES]

    assert len(reasons) == len(set(reasons))
    assert all("reason" in vars(leaf) for leaf in LEAVES)
    assert [reason for reason in reasons if not re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", reason)] == []


def test_only_leaves_have_a_reason() -> None:
    assert [cls for cls in classes() if cls not in LEAVES and hasattr(cls, "reason")] == []


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_travels_as_a_grpc_status_that_is_an_error(leaf: type[OpsError]) -> None:
    assert leaf.status in {code.name for code in grpc.StatusCode} - {"OK"}


def test_by_reason_holds_each_leaf_and_nothing_else() -> None:
    assert {leaf.reason: leaf for leaf in LEAVES} == BY_REASON


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_refuses_for_good_or_for_the_moment_or_is_a_bug(leaf: type[OpsError]) -> None:
    assert issubclass(leaf, (Refused, NotNow, InternalError))
    assert leaf.retryable is issubclass(leaf, NotNow)
    assert leaf("text").executed is (None if leaf is InternalError else False)


def test_the_docstring_names_every_class_above_the_leaves() -> None:
    drawn = re.findall(r"^(?:[│ ]*[├└]── )?([A-Z]\w+)", str(errors.__doc__).split("OpsError", 1)[1], flags=re.MULTILINE)

    above = {cls.__name__ for cls in classes() if cls not in LEAVES} - {"OpsError"}
    assert above <= set(drawn)


@pytest.mark.parametrize("leaf", LEAVES)
def test_the_docstring_names_every_reason(leaf: type[OpsError]) -> None:
    assert leaf.reason in re.findall(r"[A-Z][A-Z0-9_]+", str(errors.__doc__))


def test_the_docstring_names_nothing_that_is_not_in_the_tree() -> None:
    words = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", str(errors.__doc__))) - {"BY_REASON"}

    assert words - BY_REASON.keys() - {code.name for code in grpc.StatusCode} == set()


def test_an_error_keeps_its_values_as_text() -> None:
    error = errors.CursorBeyondEnd(
        "cursor 9 is past the 7 lines of the log", details={"cursor": 9, "lines": 7}, violations=[("cursor", "past")]
    )

    assert error.message == str(error) == "cursor 9 is past the 7 lines of the log"
    assert error.details == {"cursor": "9", "lines": "7"}
    assert error.violations == (("cursor", "past"),)


def test_a_contract_error_says_where() -> None:
    error = ContractError("is no whole number", path="run.iteration")

    assert str(error) == "run.iteration: is no whole number"
    assert error.path == error.details["path"] == "run.iteration"
    assert str(ContractError("not JSON")) == "not JSON"
