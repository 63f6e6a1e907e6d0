"""A cursor file is read leniently, moves only past what was handled, and never names another loop's place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.cursors import CursorFile, Position, load_cursor, save_cursor
from opsmgr.errors import InputInvalid
from sprite_agent.contract.streaming import EventBatch
from sprite_agent.contract.validation import validate

if TYPE_CHECKING:
    from pathlib import Path

LOOP = "demo"
BEFORE, KEPT, NEXT = (f"r1.{'0' * 16}.{line}.{line * 10}.{'0' * 32}" for line in (3, 5, 7))

Json = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cursor.json"


def put(path: Path, **members: Any) -> None:
    path.write_text(json.dumps(members))


def batch(line: int, line_count: int, *, events: int = 1, token: str = NEXT) -> EventBatch:
    return EventBatch(
        events=[{}] * events,  # type: ignore[typeddict-item]  # only their number matters
        cursor={"eventLineOffset": line, "eventLineCount": line_count},
        resume_token=token,
        caught_up=True,
        skipped=[],
        emitted_at="2026-01-02T03:04:05Z",
    )


# Reading.


def test_without_a_file_reading_begins_at_the_first_line(path: Path) -> None:
    assert load_cursor(path, LOOP) == Position(line=0, line_count=0, resume_token=None)


def test_a_position_comes_back_as_it_was_saved(path: Path) -> None:
    position = Position(line=7, line_count=9, resume_token=KEPT)

    save_cursor(path, position, repo_path="/srv/repo", loop_id=LOOP)

    assert load_cursor(path, LOOP) == position


def test_a_saved_cursor_has_every_key_of_its_schema(path: Path) -> None:
    save_cursor(path, Position(line=7, line_count=9), repo_path="/srv/repo", loop_id=LOOP)

    document = json.loads(path.read_bytes())
    validate("manager_cursor", document)
    del document["updatedAt"]
    assert document == {
        "schemaVersion": "v1",
        "repoPath": "/srv/repo",
        "loopId": LOOP,
        "eventsFile": ".superloop/loops/demo/events.jsonl",
        "eventLineOffset": 7,
        "eventLineCount": 9,
        "resumeToken": None,
    }


@pytest.mark.parametrize(
    ("members", "position"),
    [
        ({}, Position()),
        ({"eventLineOffset": 5}, Position(line=5)),
        ({"eventLineOffset": 5, "loopId": LOOP, "repoPath": "/elsewhere"}, Position(line=5)),
        ({"eventLineOffset": None, "eventLineCount": None, "resumeToken": None}, Position()),
        ({"eventLineCount": 5}, Position(line_count=5)),
        ({"eventLineOffset": 5, "resumeToken": 3}, Position(line=5)),
        ({"resumeToken": KEPT}, Position(resume_token=KEPT)),
        ({"eventLineOffset": 5, "further": {"keys": 1}}, Position(line=5)),
    ],
)
def test_a_cursor_file_that_lacks_keys_is_read_as_far_as_it_goes(path: Path, members: Json, position: Position) -> None:
    put(path, **members)

    assert load_cursor(path, LOOP) == position


def test_a_cursor_of_another_loop_is_refused_and_both_are_named(path: Path) -> None:
    put(path, loopId="another", eventLineOffset=5)

    with pytest.raises(InputInvalid, match="is of loop another, not of demo"):
        load_cursor(path, LOOP)


@pytest.mark.parametrize("name", ["eventLineOffset", "eventLineCount"])
@pytest.mark.parametrize("value", [-1, 1.5, "5", True, False, [], {}])
def test_an_offset_that_is_no_line_is_refused_with_what_to_do(path: Path, name: str, value: Any) -> None:
    put(path, **{name: value})

    with pytest.raises(InputInvalid, match=f"{name} is .*, not a whole number >= 0; reset it or use --from-start"):
        load_cursor(path, LOOP)


def test_an_offset_that_the_contract_has_no_room_for_is_refused(path: Path) -> None:
    put(path, eventLineOffset=2**63)

    with pytest.raises(InputInvalid):
        load_cursor(path, LOOP)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_cursor_file_that_is_no_json_object_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    with pytest.raises(InputInvalid, match=r"cursor\.json"):
        load_cursor(path, LOOP)


# Moving on.


def test_after_a_batch_the_line_is_that_of_its_last_event_and_the_token_the_batchs() -> None:
    before = Position(line=3, line_count=3, resume_token=BEFORE)

    assert before.after(batch(7, 9)) == Position(line=7, line_count=9, resume_token=NEXT)


def test_an_empty_batch_leaves_the_line_and_moves_count_and_token() -> None:
    before = Position(line=3, line_count=3, resume_token=BEFORE)

    after = before.after(batch(0, 9, events=0))

    assert after == Position(line=3, line_count=9, resume_token=NEXT)


def test_a_batch_is_saved_when_it_has_been_handled(path: Path) -> None:
    cursor = CursorFile(path, LOOP, from_start=False)
    assert not path.exists()

    cursor.save_after(batch(7, 9), "/srv/repo")

    assert load_cursor(path, LOOP) == cursor.position == Position(line=7, line_count=9, resume_token=NEXT)
    validate("manager_cursor", json.loads(path.read_bytes()))


def test_an_empty_batch_leaves_the_line_in_the_file(path: Path) -> None:
    put(path, eventLineOffset=5, eventLineCount=5)
    cursor = CursorFile(path, LOOP, from_start=False)

    cursor.save_after(batch(5, 6, events=0), "/srv/repo")

    assert load_cursor(path, LOOP) == Position(line=5, line_count=6, resume_token=NEXT)


def test_where_another_position_is_begun_at_the_file_says_so_from_the_next_batch_on(path: Path) -> None:
    put(path, eventLineOffset=5, eventLineCount=5)
    cursor = CursorFile(path, LOOP, from_start=False)

    cursor.begin(Position())
    cursor.save_after(batch(0, 0, events=0), "/srv/repo")

    assert load_cursor(path, LOOP) == Position(resume_token=NEXT)


def test_from_the_start_the_file_is_not_even_read(path: Path) -> None:
    path.write_bytes(b"broken")

    cursor = CursorFile(path, LOOP, from_start=True)

    assert cursor.position == Position()


def test_only_a_file_makes_a_cursor_begun(path: Path) -> None:
    assert CursorFile(path, LOOP, from_start=False).is_begun is False
    assert CursorFile(None, LOOP, from_start=False).is_begun is False
    put(path, eventLineOffset=5)
    assert CursorFile(path, LOOP, from_start=False).is_begun is True


def test_without_a_path_the_position_is_counted_and_nothing_written(tmp_path: Path) -> None:
    cursor = CursorFile(None, LOOP, from_start=False)

    cursor.save_after(batch(7, 9), "/srv/repo")

    assert cursor.position.line == 7
    assert list(tmp_path.iterdir()) == []
