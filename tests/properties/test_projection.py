"""Laws of the projection, for any valid snapshot, events and previous state."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from opsmgr.passes.projection import project
from properties import strategies
from sprite_agent.contract.validation import validate

LOOP = "loop"

Json = dict[str, Any]


def of_the_loop(envelope: Json) -> Json:
    return {**envelope, "source": {**envelope["source"], "loopId": LOOP}}


@st.composite
def some_of(draw: st.DrawFn, state: Json) -> Json:
    """A state some of whose keys are missing or null, at any depth."""
    kept = {}
    for name, value in state.items():
        fate = draw(st.sampled_from(["kept", "kept", "kept", "null", "missing"]))
        if fate == "kept":
            kept[name] = draw(some_of(value)) if isinstance(value, dict) else value
        elif fate == "null":
            kept[name] = None
    return kept


_state = st.fixed_dictionaries(
    {
        "schemaVersion": st.just("v1"),
        "run": st.fixed_dictionaries({"runId": strategies.some_text, "iteration": strategies.count}),
        "transition": st.fixed_dictionaries(
            {"previousState": strategies.some_text, "currentState": st.sampled_from(strategies.RUN_STATUS)}
        ),
        "cursor": st.fixed_dictionaries({"eventLineOffset": strategies.count, "eventLineCount": strategies.count}),
    }
)

snapshots = strategies.snapshot.map(of_the_loop)
polls = st.lists(strategies.event.map(of_the_loop), max_size=2)
previous_states = st.none() | _state.flatmap(some_of)


fewer = settings(max_examples=max(1, settings.get_profile("opsmgr").max_examples // 4))
"""A snapshot, two events and a state are costly to draw."""


def offset_of(previous: Json | None) -> int:
    cursor = (previous or {}).get("cursor") or {}
    return int(cursor.get("eventLineOffset") or 0)


@fewer
@given(snapshots, polls, previous_states)
def test_a_projection_is_valid_and_says_of_its_input_what_the_contract_says(
    snapshot: Any, events: list[Any], previous: Json | None
) -> None:
    state = project(LOOP, snapshot, events, previous)

    validate("manager_state", state)
    flags = state["divergence"]["flags"]
    confidence = state["transition"]["confidence"]
    assert (confidence == "low") == any(flags.values())
    assert (confidence == "medium") == (not any(flags.values()) and not events)
    assert state["divergence"]["any"] is any(flags.values())
    assert state["cursor"] == snapshot["cursor"]
    assert flags["cursorRegression"] is (offset_of(previous) > snapshot["cursor"]["eventLineOffset"])
    assert state["transition"]["currentState"] == state["projection"]["status"] == snapshot["run"]["status"]


@fewer
@given(snapshots, polls, previous_states)
def test_a_projection_changes_nothing_it_was_given_and_depends_on_nothing_else(
    snapshot: Any, events: list[Any], previous: Json | None
) -> None:
    given_values = json.dumps([snapshot, events, previous])

    first = project(LOOP, snapshot, events, previous)
    second = project(LOOP, snapshot, events, previous)

    assert json.dumps([snapshot, events, previous]) == given_values
    assert {**first, "generatedAt": None} == {**second, "generatedAt": None}
