"""An event's envelope is checked in two parts, and accepted exactly where the schema accepts the whole of it."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sprite_agent.contract import json_text
from sprite_agent.contract.events import EventBuilder
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "7", "1.5", "1e400", "\x00", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = ("timestamp", "event", "type", "loop_id", "run_id", "iteration", "role", "status", "message", "data", "more")
GOOD = {"timestamp": "2026-01-01T00:00:00Z", "event": "role_start", "run_id": "r", "iteration": 1, "data": {"n": 1}}
RECORDS = st.builds(
    lambda keep, changes: {**{name: GOOD[name] for name in keep}, **changes},
    st.sets(st.sampled_from(sorted(GOOD))),
    st.dictionaries(st.sampled_from(MEMBERS), ANYTHING, max_size=2),
)


def builder(*, whole: bool) -> EventBuilder:
    """One that checks in parts, or leaves each envelope to the whole schema."""
    made = EventBuilder(
        source={"repoPath": "/repo", "loopId": "demo"}, trace_id="t", emitted_at="2026-01-01T00:00:00Z", line_count=9
    )
    if whole:
        made._accepts = lambda _: False  # noqa: SLF001  # what the fast way stands for
    return made


def outcome(made: EventBuilder, text: str, line: int) -> Any:
    """The envelope, or what is wrong and where."""
    try:
        return made.build([json_text.object_in(text)], [text], line)[0]
    except ContractError as error:
        return error.path, error.message


@given(record=RECORDS, line=st.integers(-2, 2**63 - 1))
def test_what_is_checked_in_parts_is_what_the_whole_schema_says(record: dict[str, Any], line: int) -> None:
    text = json_text.encode(record).decode()

    found = outcome(builder(whole=False), text, line)

    assert found == outcome(builder(whole=True), text, line)
    if isinstance(found, dict):
        validate("loop_run_event", found)
        assert found["event"]["raw"].text == text


@given(record=RECORDS)
def test_a_record_is_checked_as_it_is_built(record: dict[str, Any]) -> None:
    text = json_text.encode(record).decode()
    try:
        builder(whole=False).check([json_text.object_in(text)], 1)
        refusal = None
    except ContractError as error:
        refusal = (error.path, error.message)

    found = outcome(builder(whole=False), text, 1)

    assert found == refusal if refusal else isinstance(found, dict)
