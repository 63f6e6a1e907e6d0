"""A row is on disk whole or not at all, keeps to its schema, and is forgotten only when it is settled and old."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest

from conformance import control_documents, documents
from opsmgr.errors import InputInvalid
from opsmgr.intents.outbox import KEPT, Outbox, Row
from opsmgr.store import LoopStore
from sprite_agent.contract.validation import validate
from support.repos import put

if TYPE_CHECKING:
    from pathlib import Path

LONG_AGO = (datetime.now(UTC) - KEPT - timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture
def store(tmp_path: Path) -> LoopStore:
    return LoopStore(tmp_path / "demo")


def row(key: str = "key-1", **members: Any) -> Row:
    """A row about to be sent; each member can be given another value."""
    made = Row(
        request=cast("Any", {**documents.REQUEST, "idempotencyKey": key}),
        transport="local",
        address=None,
        created_at="2026-02-23T05:30:13Z",
        updated_at="2026-02-23T05:30:13Z",
    )
    return replace(made, **members)


def files(store: LoopStore) -> list[Path]:
    return sorted((store.folder / "outbox").iterdir())


def age(store: LoopStore) -> None:
    """Makes every row old."""
    for path in files(store):
        put(path, {**json.loads(path.read_bytes()), "updatedAt": LONG_AGO})


def test_a_row_is_read_as_it_was_written_and_keeps_to_its_schema(store: LoopStore) -> None:
    written = Outbox(store).save(row(state="done", attempts=2, result=cast("Any", documents.RESULT)))

    assert Outbox(store).load("key-1") == written
    [path] = files(store)
    validate("manager_outbox", json.loads(path.read_bytes()))


def test_a_document_of_every_key_is_read(store: LoopStore) -> None:
    Outbox(store).save(row())
    [path] = files(store)
    put(path, control_documents.OUTBOX)

    found = Outbox(store).load("key-1")

    assert found is not None
    assert (found.state, found.attempts, found.address) == ("done", 2, "unix:agent.sock")


@pytest.mark.parametrize("key", ["..", ".", "A", "a", "x" * 128, ":::"])
def test_every_key_has_a_file_of_its_own_in_the_folder(store: LoopStore, key: str) -> None:
    outbox = Outbox(store)
    outbox.save(row("key-1"))
    outbox.save(row(key))

    assert len(files(store)) == 2
    found = outbox.load(key)
    assert found is not None
    assert found.key == key


def test_a_key_without_a_row_has_none(store: LoopStore) -> None:
    assert Outbox(store).load("key-1") is None
    assert Outbox(store).unsettled() == []


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", {**control_documents.OUTBOX, "request": {}}, {"key": "key-1"}]
)
def test_a_damaged_row_is_not_taken_for_none(store: LoopStore, damage: Any) -> None:
    Outbox(store).save(row())
    [path] = files(store)
    put(path, damage)

    with pytest.raises(InputInvalid):
        Outbox(store).load("key-1")


def test_what_is_done_stays_done_whatever_another_manager_saves(store: LoopStore) -> None:
    done = Outbox(store).save(row(state="done", result=cast("Any", documents.RESULT)))

    kept = Outbox(store).save(row(state="unknown"))

    assert kept == done == Outbox(store).load("key-1")


def test_those_without_an_outcome_are_listed_oldest_first(store: LoopStore) -> None:
    outbox = Outbox(store)
    outbox.save(row("younger", state="unknown", created_at="2026-02-23T05:30:14Z"))
    outbox.save(row("older", state="pending"))
    outbox.save(row("refused", state="refused"))
    outbox.save(row("done", state="done", result=cast("Any", documents.RESULT)))
    put(store.folder / "outbox" / "damaged.json", b"{")

    assert [found.key for found in outbox.unsettled()] == ["older", "younger"]


def test_old_settled_rows_are_forgotten_and_old_unknown_ones_are_not(store: LoopStore) -> None:
    outbox = Outbox(store)
    for state in ("pending", "unknown", "refused"):
        outbox.save(row(state, state=cast("Any", state)))
    outbox.save(row("done", state="done", result=cast("Any", documents.RESULT)))
    age(store)
    outbox.save(row("fresh", state="refused"))

    outbox.prune()

    left = {json.loads(path.read_bytes())["key"] for path in files(store)}
    assert left == {"pending", "unknown", "fresh"}


@pytest.mark.parametrize(("theirs", "attempts"), [("unknown", 4), ("refused", 2)])
def test_a_send_is_counted_beside_those_of_another_manager_that_may_have_run_it(
    store: LoopStore, theirs: Any, attempts: int
) -> None:
    Outbox(store).save(row(state=theirs, attempts=3))

    assert Outbox(store).save_attempt(row(attempts=1)).attempts == attempts
