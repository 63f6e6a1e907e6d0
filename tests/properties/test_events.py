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
        made._accepts = made._are_plain = lambda _: False  # noqa: SLF001  # what the fast way stands for
    return made


def outcome(made: EventBuilder, texts: list[str], line: int) -> Any:
    """The envelopes, or what is wrong and where."""
    try:
        return made.build([json_text.object_in(text) for text in texts], texts, line)
    except ContractError as error:
        return error.path, error.message


def refusal(made: EventBuilder, texts: list[str], line: int) -> tuple[str, str] | None:
    """What is wrong and where, as far as is checked; None: nothing."""
    try:
        made.check([json_text.object_in(text) for text in texts], line)
    except ContractError as error:
        return error.path, error.message
    return None


@given(records=st.lists(RECORDS, min_size=1, max_size=4), line=st.integers(-2, 9) | st.integers(2**63 - 5, 2**63 + 1))
def test_what_is_checked_in_parts_is_what_the_whole_schema_says(records: list[dict[str, Any]], line: int) -> None:
    texts = [json_text.encode(record).decode() for record in records]

    found = outcome(builder(whole=False), texts, line)

    assert found == outcome(builder(whole=True), texts, line)
    if isinstance(found, list):
        for envelope in found:
            validate("loop_run_event", envelope)
        assert [envelope["event"]["raw"].text for envelope in found] == texts
        assert [envelope["cursor"]["eventLineOffset"] for envelope in found] == list(range(line, line + len(texts)))


@given(records=st.lists(RECORDS, min_size=1, max_size=4))
def test_records_are_checked_as_they_are_built(records: list[dict[str, Any]]) -> None:
    texts = [json_text.encode(record).decode() for record in records]

    refused = refusal(builder(whole=False), texts, 1)

    assert refused == refusal(builder(whole=True), texts, 1)
    found = outcome(builder(whole=False), texts, 1)
    assert found == refused if refused else isinstance(found, list)
