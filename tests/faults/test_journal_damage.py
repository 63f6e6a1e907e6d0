"""T11: a journal that was damaged in whatever way is refused or whole; keys it has known are never run again."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.control import audit
from sprite_agent.control.journal import Journal
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import JournalCorrupt
from sprite_agent.repo import Repo
from support.driving import add_waiting_loop, decision
from support.figures import found, scaled
from support.repos import LOOP
from support.runtime import script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.repos import LoopFiles

LONG = pytest.mark.timeout(scaled(240, 7200))
KEYS = 6
CHANCE = random.Random(11)  # noqa: S311  # the same damage each time


class Known:
    """A state folder whose journal knows some keys, what was answered for them, and what was run."""

    def __init__(self, repo: LoopFiles, place: Path) -> None:
        self._repo = repo.repo
        self._ran = place / "ran"
        self._runtime = script(place / "superloop", f"echo ran >> {self._ran}")
        self.state = place / "state"
        self.documents = [decision(loopId=f"loop-{number}") for number in range(KEYS)]
        for document in self.documents:
            add_waiting_loop(repo, document["loopId"])
        with self.opened(self.state) as core:
            self.answers = [core.execute(document) for document in self.documents]

    @contextlib.contextmanager
    def opened(self, state: Path) -> Iterator[Repo]:
        """The repo with the journal of a state folder."""
        core = Repo(self._repo, state_folder=state, runtime=self._runtime)
        try:
            yield core
        finally:
            core.close()

    def copied(self) -> Path:
        """A copy of the state folder."""
        copy = self.state.with_name(uuid.uuid4().hex)
        shutil.copytree(self.state, copy)
        return copy

    def asked(self, state: Path) -> str:
        """Asks for every key with the journal of a state folder; whether it was "refused" or "whole".

        Fails when anything was run, a key has another answer, or the loops can't be read.
        """
        with self.opened(state) as core:
            outcomes = [self._ask(core, number) for number in range(KEYS)]
            assert core.read_loop(LOOP).snapshot["envelopeType"] == "loop_run_snapshot"
        assert self._ran.read_text() == "ran\n" * KEYS, f"it was run again: {outcomes}"
        return "refused" if "refused" in outcomes else "whole"

    def _ask(self, core: Repo, number: int) -> str:
        try:
            answer = core.execute(self.documents[number])
        except JournalCorrupt:
            return "refused"
        assert answer == {**self.answers[number], "replayed": True}
        return "whole"


@pytest.fixture
def known(repo: LoopFiles, tmp_path: Path) -> Known:
    return Known(repo, tmp_path)


def truncate(journal: Path) -> None:
    os.truncate(journal, CHANCE.randrange(journal.stat().st_size))


def flip_a_bit(journal: Path) -> None:
    change(journal, lambda content, at: content[at] ^ 1 << CHANCE.randrange(8), most=1)


def overwrite(journal: Path) -> None:
    change(journal, lambda _content, _at: CHANCE.randrange(256), most=512)


def blank(journal: Path) -> None:
    change(journal, lambda _content, _at: 0, most=4096)


def change(journal: Path, to: Callable[[bytearray, int], int], *, most: int) -> None:
    """Changes some bytes in a row."""
    content = bytearray(journal.read_bytes())
    start = CHANCE.randrange(len(content))
    for at in range(start, min(start + CHANCE.randint(1, most), len(content))):
        content[at] = to(content, at)
    journal.write_bytes(content)


def swap_pages(journal: Path) -> None:
    content = bytearray(journal.read_bytes())
    one, other = (4096 * CHANCE.randrange(len(content) // 4096) for _ in range(2))
    content[one : one + 4096], content[other : other + 4096] = content[other : other + 4096], content[one : one + 4096]
    journal.write_bytes(content)


def append(journal: Path) -> None:
    with journal.open("ab") as file:
        file.write(CHANCE.randbytes(CHANCE.randint(1, 5000)))


def change_a_text(journal: Path) -> None:
    """What SQLite has no means to notice: another key, another answer."""
    content = journal.read_bytes()
    word = CHANCE.choice([b'"idempotencyKey":"', b'"exitCode":', b'"state":"', b"loop-", b"done"])
    at = CHANCE.choice([place for place in range(len(content)) if content.startswith(word, place)]) + len(word)
    journal.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


DAMAGE = (truncate, flip_a_bit, flip_a_bit, overwrite, blank, swap_pages, append, change_a_text, change_a_text)


@LONG
def test_a_damaged_journal_is_refused_or_whole(known: Known) -> None:
    rounds = scaled(200, 5_000)
    outcomes: dict[str, Counter[str]] = {}
    for number in range(rounds):
        damage = DAMAGE[number % len(DAMAGE)]
        state = known.copied()
        damage(state / "journal.sqlite3")
        outcomes.setdefault(damage.__name__, Counter())[known.asked(state)] += 1
        shutil.rmtree(state)

    total = sum(outcomes.values(), Counter[str]())
    assert outcomes["truncate"]["whole"] == 0
    assert outcomes["change_a_text"]["whole"] == 0
    found("T11", f"{rounds} journals damaged: {total['refused']} refused, {total['whole']} whole, no key run again")


def in_the_middle_of_a_commit(known: Known, write: Callable[[Any], None]) -> Path:
    """A state folder as a crash leaves it: the journal half written, and beside it what takes that back."""
    copy = known.state.with_name(uuid.uuid4().hex)
    with known.opened(known.state) as core:
        folder = StateFolder(known.state, core.path)
        journal = Journal(folder)
        with contextlib.suppress(_Crash), journal._transaction() as tables:  # noqa: SLF001  # a crash knows no privacy
            tables.execute("PRAGMA cache_size = 1")  # so that some of it is in the file already
            write(tables)
            shutil.copytree(known.state, copy)
            raise _Crash
        journal.close()
    assert (copy / "journal.sqlite3").read_bytes() != (known.state / "journal.sqlite3").read_bytes()
    return copy


class _Crash(Exception):
    """The process ends here."""


def grow(tables: Any) -> None:
    for number in range(10):
        audit.append(tables, "lost", {"number": number, "text": "x" * 4_000})


def free_every_key(tables: Any) -> None:
    tables.execute("UPDATE control SET state = 'released', result = result || ?", (" " * 4_000,))
    grow(tables)


def forget_every_key(tables: Any) -> None:
    tables.execute("DELETE FROM control")
    grow(tables)


WRITES = (grow, free_every_key, forget_every_key)


@pytest.mark.parametrize("write", WRITES)
def test_what_a_crash_has_left_half_written_is_taken_back(known: Known, write: Callable[[Any], None]) -> None:
    state = in_the_middle_of_a_commit(known, write)

    assert known.asked(state) == "whole"


@pytest.mark.parametrize("write", WRITES)
def test_without_what_takes_it_back_a_half_written_journal_is_refused(
    known: Known, write: Callable[[Any], None]
) -> None:
    state = in_the_middle_of_a_commit(known, write)
    (state / "journal.sqlite3-journal").unlink()

    assert known.asked(state) == "refused"


@LONG
def test_whatever_becomes_of_what_takes_it_back_the_journal_is_refused_or_whole(known: Known) -> None:
    rounds = scaled(40, 1_000)
    outcomes: Counter[str] = Counter()
    left = [in_the_middle_of_a_commit(known, write) for write in WRITES]
    for number in range(rounds):
        state = known.state.with_name(uuid.uuid4().hex)
        shutil.copytree(left[number % len(left)], state)
        (truncate, flip_a_bit, overwrite, blank)[number % 4](state / "journal.sqlite3-journal")
        outcomes[known.asked(state)] += 1
        shutil.rmtree(state)

    found("T11", f"{rounds} -journal files damaged: {outcomes['refused']} refused, {outcomes['whole']} whole")


@pytest.mark.parametrize("lost", ["journal.sqlite3", "journal.id"])
def test_a_lost_file_is_not_taken_for_a_new_beginning(known: Known, lost: str) -> None:
    state = known.copied()
    (state / lost).unlink()

    assert known.asked(state) == ("refused" if lost == "journal.sqlite3" else "whole")


def test_an_emptied_journal_and_another_one_are_refused(known: Known, tmp_path: Path) -> None:
    emptied = known.copied()
    (emptied / "journal.sqlite3").write_bytes(b"")
    exchanged = known.copied()
    with known.opened(tmp_path / "other") as other:
        assert other.control_fault() is None
    shutil.copy(tmp_path / "other" / "journal.sqlite3", exchanged)

    assert (known.asked(emptied), known.asked(exchanged)) == ("refused", "refused")


def test_a_schema_that_is_no_text_is_refused(known: Known) -> None:
    state = known.copied()
    content = (state / "journal.sqlite3").read_bytes()
    (state / "journal.sqlite3").write_bytes(content.replace(b"CREATE TABLE control", b"CREATE T\xffBLE control"))

    assert known.asked(state) == "refused"


def test_a_journal_that_has_lost_its_id_is_refused(known: Known) -> None:
    state = known.copied()
    content = (state / "journal.sqlite3").read_bytes()
    before, _, after = content.rpartition(b"journal_id")  # the last is the row's, or its index's
    (state / "journal.sqlite3").write_bytes(before.replace(b"journal_id", b"journal_iX") + b"journal_iX" + after)

    assert known.asked(state) == "refused"
