"""The index of an event log, and readers that start anywhere in it."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.artifacts import ArtifactFiles
from sprite_agent.errors import (
    ArtifactNotRegular,
    CursorBeyondEnd,
    EventsNotFound,
    HistoryRewritten,
    LogReplaced,
    LogTruncated,
    LoopNotFound,
    PositionLost,
    ResumeTokenInvalid,
    Starting,
)
from sprite_agent.event_log import index as log_index
from sprite_agent.event_log import log as log_module
from sprite_agent.event_log.index import Aim, LogIndex
from sprite_agent.event_log.log import EventLog
from sprite_agent.event_log.pieces import PIECE, Pace, goes_on
from sprite_agent.event_log.record_reader import RUN_BYTES
from sprite_agent.event_log.records import MAX_RECORD_BYTES, Position
from sprite_agent.event_log.rereading import CHUNK, Rereading, Stamp
from sprite_agent.event_log.resume import WINDOW_BYTES, ResumeToken, parse_token
from sprite_agent.repo import Repo
from support.logs import numbered, records_of, rest, taken
from support.repos import LOOP, LoopFiles, event, line, lines
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sprite_agent.errors import OpsError

MIXED = b"".join(
    [
        line(event(n=1)),
        b"\n",
        lines(event("usage_check", n=2)),
        line(event(n=3)),
        b"not json\n",
        b"{\n",
        line(event(n=4)),
        b"\n\n",
        lines(event("usage_check", n=5)),
        b"[1]\n",
        line(event(n=6)),
        b" \n",
    ]
)
"""Events on one line and on several, blank lines, malformed lines, and a malformed opening."""


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    return LoopFiles(tmp_path / "repo")


@pytest.fixture
def log(loop: LoopFiles) -> EventLog:
    return EventLog(ArtifactFiles(loop.repo), LOOP)


def token_after(log: EventLog, line: int) -> str:
    """A resume token after `line` lines, for a log in which each line is a record."""
    end = log.refresh().end
    with log.reader_after_line(0) as reader:
        while reader.position.line < line:
            assert reader.take(end, Pace(60.0), (1, RUN_BYTES))
        return str(reader.token())


# The index.


def test_an_empty_log_has_no_lines(log: EventLog) -> None:
    view = log.refresh()

    assert (view.lines, view.end, view.last_record) == (0, 0, None)
    assert view.ref["sha256"] == hashlib.sha256(b"").hexdigest()


def test_the_end_is_that_of_the_last_complete_line(log: EventLog, loop: LoopFiles) -> None:
    whole = numbered(2)
    loop.append(whole, b'{"torn')

    view = log.refresh()

    assert (view.lines, view.end) == (2, len(whole))
    assert view.token.position == Position(2, len(whole))


def test_the_index_of_a_log_read_in_steps_is_that_of_one_read_at_once(log: EventLog, loop: LoopFiles) -> None:
    for start in range(0, len(MIXED), 37):
        loop.append(MIXED[start : start + 37])
        stepwise = log.refresh()

        at_once = EventLog(ArtifactFiles(loop.repo), LOOP).refresh()
        assert (stepwise.lines, stepwise.end, stepwise.last_record) == (at_once.lines, at_once.end, at_once.last_record)
        assert (stepwise.token, stepwise.ref) == (at_once.token, at_once.ref)


def test_the_identity_stays_while_the_log_only_grows(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(2))
    before = log.refresh().identity

    loop.append(numbered(2, first=3), b'{"torn')

    assert log.refresh().identity == before


@pytest.mark.parametrize(
    "change",
    [
        lambda loop: loop.truncate(10),
        lambda loop: loop.rewrite(numbered(3, first=5)),
        lambda loop: loop.replace(numbered(3, first=5)),
        lambda loop: loop.replace(loop.log.read_bytes()),
    ],
    ids=["truncated", "rewritten", "replaced", "replaced by a copy"],
)
def test_the_identity_changes_when_the_log_is_no_continuation_or_another_file(
    log: EventLog, loop: LoopFiles, change: Callable[[LoopFiles], None]
) -> None:
    loop.append(numbered(3))
    before = log.refresh().identity

    change(loop)

    assert log.refresh().identity != before


def test_a_missing_log_is_told_from_a_missing_loop(log: EventLog, loop: LoopFiles) -> None:
    loop.log.unlink()
    with pytest.raises(EventsNotFound):
        log.refresh()

    loop.folder.rmdir()
    with pytest.raises(LoopNotFound):
        log.refresh()


def test_a_log_that_is_a_link_is_refused(log: EventLog, loop: LoopFiles) -> None:
    loop.log.rename(loop.folder / "other.jsonl")
    loop.log.symlink_to(loop.folder / "other.jsonl")

    with pytest.raises(ArtifactNotRegular):
        log.refresh()


# Reading after a line.


@pytest.mark.parametrize("offset", range(MIXED.count(b"\n") + 1))
def test_reading_after_a_line_gives_the_records_whose_last_line_comes_later(
    log: EventLog, loop: LoopFiles, offset: int
) -> None:
    loop.append(MIXED)
    everything = records_of(MIXED)

    assert rest(log, log.reader_after_line(offset)) == [record for record in everything if record.last_line > offset]


def test_reading_after_any_line_of_a_long_log_finds_its_place_through_the_index(log: EventLog, loop: LoopFiles) -> None:
    content = b"".join(
        lines(event(n=number, text="x" * 400)) if number % 7 == 0 else line(event(n=number, text="x" * 400))
        for number in range(2500)
    )
    loop.append(content)
    everything = records_of(content)

    for offset in (*range(0, content.count(b"\n"), 397), content.count(b"\n")):
        found = rest(log, log.reader_after_line(offset))
        assert found == [record for record in everything if record.last_line > offset]


def test_reading_after_a_line_inside_an_object_that_is_not_closed_yet_gives_it_once_it_is(
    log: EventLog, loop: LoopFiles
) -> None:
    whole = lines(event("usage_check"))
    loop.append(numbered(1), whole[:-2])
    reader = log.reader_after_line(3)

    loop.append(whole[-2:])

    assert [(record.first_line, record.last_line) for record in rest(log, reader)] == [(2, 8)]


def test_a_line_beyond_the_end_is_refused_with_the_numbers(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(3), b'{"torn')

    with pytest.raises(CursorBeyondEnd, match="reset it or replay from the start") as refused:
        log.reader_after_line(4)

    assert refused.value.details == {"requested": "4", "available": "3"}


def test_a_line_that_no_log_can_have_is_beyond_the_end(log: EventLog) -> None:
    with pytest.raises(CursorBeyondEnd):
        log.reader_after_line(2**63 - 1)


# Reading after a token.


def test_reading_after_each_token_gives_the_remaining_records(log: EventLog, loop: LoopFiles) -> None:
    loop.append(MIXED)
    everything = records_of(MIXED)
    with log.reader_after_line(0) as reader:
        tokens = [(reader.position, str(reader.token()))]
        while reader.take(len(MIXED), Pace(), (1, RUN_BYTES)):
            tokens.append((reader.position, str(reader.token())))

    for place, token in tokens:
        remaining = [record for record in everything if record.last_line > place.line]
        assert rest(log, log.reader_after_token(token)) == remaining
        # By a process that has read nothing yet:
        afresh = EventLog(ArtifactFiles(loop.repo), LOOP)
        assert rest(afresh, afresh.reader_after_token(token)) == remaining


def test_a_token_lasts_while_the_log_grows(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(3))
    token = str(log.refresh().token)

    loop.append(numbered(2, first=4))

    assert [record.last_line for record in rest(log, log.reader_after_token(token))] == [4, 5]


def test_a_token_lasts_when_the_log_is_copied(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(3))
    token = token_after(log, 2)

    loop.replace(loop.log.read_bytes())

    assert [record.last_line for record in rest(log, log.reader_after_token(token))] == [3]


def test_the_token_of_an_empty_log_begins_at_the_first_line_of_whatever_comes(log: EventLog, loop: LoopFiles) -> None:
    token = str(log.refresh().token)

    loop.append(numbered(2))

    assert [record.last_line for record in rest(log, log.reader_after_token(token))] == [1, 2]


def test_a_token_after_an_overlong_line_holds(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(1), b"x" * (2 * MAX_RECORD_BYTES) + b"\n")
    token = str(log.refresh().token)

    loop.append(numbered(1, first=2))

    assert [record.last_line for record in rest(log, log.reader_after_token(token))] == [3]


def test_what_comes_after_the_place_may_be_rewritten(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(3))
    token = token_after(log, 2)

    loop.rewrite(numbered(2) + numbered(2, first=7))

    assert [record.value and record.value["data"]["n"] for record in rest(log, log.reader_after_token(token))] == [7, 8]


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda loop: loop.truncate(0), LogTruncated),
        (lambda loop: loop.truncate(len(numbered(4))), LogTruncated),
        (lambda loop: loop.truncate(len(numbered(5)) - 1), LogTruncated),
        (lambda loop: loop.rewrite(numbered(3)), LogTruncated),
        (lambda loop: loop.replace(numbered(9, first=2)), LogReplaced),
        (lambda loop: loop.replace(numbered(2, first=2)), LogReplaced),
        (lambda loop: loop.rewrite(numbered(9, first=2)), LogReplaced),
        (lambda loop: loop.truncate(10), LogTruncated),
        (lambda loop: loop.rewrite(numbered(3) + numbered(9, first=7)), HistoryRewritten),
        (lambda loop: loop.replace(numbered(3) + numbered(9, first=7)), HistoryRewritten),
        (lambda loop: loop.rewrite(numbered(4) + b"\n" * 200), HistoryRewritten),
        (lambda loop: loop.rewrite(b"\n" * 500), LogReplaced),
        (lambda loop: loop.rewrite(loop.log.read_bytes()[:-1] + b" \n" + numbered(3)), HistoryRewritten),
    ],
    ids=[
        "truncated to nothing",
        "truncated at a line's end",
        "truncated by one byte",
        "rolled back",
        "replaced by a longer one",
        "replaced by a shorter one",
        "rewritten in place from the first line on",
        "truncated within its first line",
        "rolled back and grown anew",
        "replaced by one that begins alike",
        "its last line made blank",
        "made blank",
        "the place is no longer a line's end",
    ],
)
def test_a_token_of_a_log_that_is_no_longer_the_same_before_the_place_is_refused(
    log: EventLog, loop: LoopFiles, change: Callable[[LoopFiles], None], lost: type[OpsError]
) -> None:
    loop.append(numbered(5))
    token = str(log.refresh().token)

    change(loop)

    with pytest.raises(lost, match="replay from the start"):
        log.reader_after_token(token)
    with pytest.raises(lost):
        EventLog(ArtifactFiles(loop.repo), LOOP).reader_after_token(token)


def test_a_truncated_log_is_told_with_the_numbers(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(5))
    token = log.refresh().token
    loop.truncate(300)

    with pytest.raises(LogTruncated) as lost:
        log.reader_after_token(str(token))

    assert lost.value.details["size"] == "300"
    assert lost.value.details["line"] == "5"
    assert lost.value.details["offset"] == str(token.position.offset)


def test_a_token_of_another_loop_is_refused(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(3))
    other = loop.folder.parent / "other"
    other.mkdir()
    (other / "events.jsonl").write_bytes(numbered(3, first=8))
    token = str(EventLog(ArtifactFiles(loop.repo), "other").refresh().token)

    with pytest.raises(LogReplaced):
        log.reader_after_token(token)


GARBAGE = [
    "",
    "r1",
    "r1.",
    "0",
    "17",
    "token",
    "r2.{g}.2.{o}.{d}",
    "R1.{g}.2.{o}.{d}",
    "r1.{g}.2.{o}.{d}.",
    "r1.{g}.2.{o}.{d}\n",
    " r1.{g}.2.{o}.{d}",
    "r1.{g}.2.{o}",
    "r1.{g}.2.{d}.{o}",
    "r1.{g}.-2.{o}.{d}",
    "r1.{g}.02.{o}.{d}",
    "r1.{g}.2.0{o}.{d}",
    "r1.{g}.+2.{o}.{d}",
    "r1.{g}.2e0.{o}.{d}",
    "r1.{g}.\N{ARABIC-INDIC DIGIT TWO}.{o}.{d}",
    "r1.{g}.9999999999999999999.{o}.{d}",
    "r1.{g}.2.{o}.{d}0",
    "r1.{g}0.2.{o}.{d}",
    "r1.g{g}.2.{o}.{d}",
    "r1.\0",
    "x" * 100_000,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_what_is_no_token_is_refused(log: EventLog, loop: LoopFiles, garbage: str) -> None:
    loop.append(numbered(3))
    token = parse_token(token_after(log, 2))

    with pytest.raises(ResumeTokenInvalid) as refused:
        log.reader_after_token(garbage.format(g=token.generation, o=token.position.offset, d=token.digest))

    assert len(str(refused.value)) < 500


def tampered(token: ResumeToken, *, line: int = 0, offset: int = 0, generation: str = "", digest: str = "") -> str:
    """The token with another line, offset, generation or digest."""
    position = Position(token.position.line + line, token.position.offset + offset)
    return str(ResumeToken(position=position, generation=generation or token.generation, digest=digest or token.digest))


@pytest.mark.parametrize("shift", [-2, -1, 1, 2, 10**9])
def test_a_token_with_another_line_is_refused(log: EventLog, loop: LoopFiles, shift: int) -> None:
    loop.append(numbered(5))
    token = parse_token(token_after(log, 3))

    with pytest.raises(ResumeTokenInvalid):
        log.reader_after_token(tampered(token, line=shift))


@pytest.mark.parametrize("shift", [-100, -1, 1, 100])
def test_a_token_with_another_offset_is_refused(log: EventLog, loop: LoopFiles, shift: int) -> None:
    loop.append(numbered(5))
    token = parse_token(token_after(log, 3))

    with pytest.raises(PositionLost):
        log.reader_after_token(tampered(token, offset=shift))


@pytest.mark.parametrize(("part", "lost"), [("generation", LogReplaced), ("digest", HistoryRewritten)])
def test_a_token_with_another_digest_is_refused(
    log: EventLog, loop: LoopFiles, part: str, lost: type[OpsError]
) -> None:
    loop.append(numbered(5))
    token = parse_token(token_after(log, 3))
    value = getattr(token, part)

    with pytest.raises(lost):
        log.reader_after_token(str(token).replace(value, value[1:] + value[0]))


def test_a_token_forged_for_a_place_inside_a_line_is_refused(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(5))
    offset = len(numbered(3)) + 10
    forged = ResumeToken(
        position=Position(3, offset),
        generation=log.refresh().token.generation,
        digest=hashlib.sha256(loop.log.read_bytes()[:offset]).hexdigest()[:32],
    )

    with pytest.raises(ResumeTokenInvalid, match=f"byte {offset}"):
        log.reader_after_token(str(forged))


@pytest.mark.parametrize(("line", "offset"), [(1, 0), (5, 0)])
def test_a_token_for_a_line_that_cannot_end_at_its_offset_is_refused(
    log: EventLog, loop: LoopFiles, line: int, offset: int
) -> None:
    loop.append(numbered(5))

    with pytest.raises(ResumeTokenInvalid):
        log.reader_after_token(str(ResumeToken(position=Position(line, offset), generation="0" * 16, digest="0" * 32)))


# A log that changes while it is read.


@pytest.mark.parametrize("opening", [1, 2, 3, 4])
def test_a_log_replaced_while_a_reader_is_made_is_never_read_from_a_place_of_the_other(
    loop: LoopFiles, opening: int
) -> None:
    old, new = numbered(6), b"".join(line(event(n=number, text="y" * number)) for number in range(20))
    loop.append(old)

    class Replaced(ArtifactFiles):
        """Has the log replaced just before it is opened for the n-th time."""

        left = opening

        def open(self, path: str) -> int | None:
            self.left -= 1
            if self.left == 0:
                loop.replace(new)
            return super().open(path)

    log = EventLog(Replaced(loop.repo), LOOP)
    try:
        found = rest(log, log.reader_after_line(3))
    except PositionLost:
        return
    assert found in ([record for record in records_of(content) if record.last_line > 3] for content in (old, new))


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda loop: loop.rewrite(numbered(5000, first=10000, width=100)), LogReplaced),
        (lambda loop: loop.rewrite(numbered(1) + numbered(9000, first=10000, width=100)), LogReplaced),
        (lambda loop: loop.rewrite(numbered(1, width=100) + numbered(9000, first=10000)), HistoryRewritten),
        (lambda loop: loop.truncate(1000), LogTruncated),
        (lambda loop: loop.truncate(10), LogTruncated),
        (lambda loop: loop.truncate(0), LogTruncated),
        (lambda loop: loop.truncate(len(numbered(5000, width=100)) - 1), LogTruncated),
    ],
    ids=[
        "rewritten",
        "rewritten from its first line on",
        "rewritten after its first line",
        "truncated",
        "truncated within its first line",
        "emptied",
        "truncated beyond the place",
    ],
)
def test_a_log_that_changes_under_a_reader_is_told_by_its_reason(
    log: EventLog, loop: LoopFiles, change: Callable[[LoopFiles], None], lost: type[OpsError]
) -> None:
    loop.append(numbered(5000, width=100))
    end = log.refresh().end
    with log.reader_after_line(0) as reader:
        assert reader.take(end, Pace())

        change(loop)

        with pytest.raises(lost, match="replay from the start"):
            taken(reader, end)


# Rewritten further up than each read looks.


def changed_in_the_middle(loop: LoopFiles) -> None:
    """Changes one byte in the middle of the log, and nothing else."""
    with loop.log.open("r+b") as file:
        file.seek(loop.log.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(b"y" if byte == b"x" else b"x")


def settle(loop: LoopFiles) -> None:
    """Has the log's times lie so far back that whatever changes it changes them."""
    until(lambda: Stamp.of(loop.log.stat()).is_settled(), "the log's times are old enough")


def test_a_change_of_the_same_size_in_the_middle_of_a_log_is_noticed_at_once(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(5000, width=100))
    before = log.refresh()
    settle(loop)

    changed_in_the_middle(loop)

    after = log.refresh()
    assert after.identity != before.identity
    assert after.ref["sha256"] == hashlib.sha256(loop.log.read_bytes()).hexdigest()
    with pytest.raises(HistoryRewritten):
        log.reader_after_token(str(before.token))


def test_a_change_in_the_middle_together_with_new_lines_is_noticed_before_these_are_seen(
    log: EventLog, loop: LoopFiles
) -> None:
    loop.append(numbered(4000, width=100))
    assert loop.log.stat().st_size < log_index.READ_AGAIN_AT_ONCE
    token = str(log.refresh().token)

    changed_in_the_middle(loop)
    loop.append(numbered(1))

    with pytest.raises(HistoryRewritten):
        rest(log, log.reader_after_token(token))


def test_a_change_in_the_same_moment_as_the_last_look_is_noticed_too(log: EventLog, loop: LoopFiles) -> None:
    """The file's times can't tell then: they are kept in ticks."""
    loop.append(numbered(500, width=100))
    before = log.refresh()
    status = loop.log.stat()
    changed_in_the_middle(loop)
    os.utime(loop.log, ns=(status.st_atime_ns, status.st_mtime_ns))

    until(lambda: log.refresh().is_sure, "all was read again")

    assert log.refresh().identity != before.identity


def test_a_large_log_is_read_again_piece_by_piece_beside_other_looks(
    log: EventLog, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_BESIDE", 0.0)  # a chunk each time
    loop.append(numbered(10_000, width=100))
    before = log.refresh()
    changed_in_the_middle(loop)
    loop.append(numbered(1))

    pieces = 0
    while log.lines_read >= 10_000:
        log.reread()
        pieces += 1
        assert pieces < 1000
        settle(loop)

    assert pieces > 2
    assert log.refresh().identity != before.identity


def test_a_log_that_has_not_changed_for_a_while_need_not_be_read_twice(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(10_000, width=100))
    settle(loop)

    view = log.refresh()

    assert view.end > log_index.READ_AGAIN_AT_ONCE
    assert view.is_sure
    assert log.known() == view
    loop.append(numbered(1))
    assert log.known() is None
    assert not log.refresh().is_sure


def test_a_log_that_has_just_changed_is_not_sure_to_be_what_was_read(
    log: EventLog, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(numbered(10_000, width=100))
    loop.log.touch()
    now = loop.log.stat().st_mtime_ns
    monkeypatch.setattr(time, "time_ns", lambda: now)  # however long it takes to read it

    assert not log.refresh().is_sure
    assert log.known() is None


def test_a_log_that_is_changed_while_it_is_read_for_the_first_time_is_read_again(loop: LoopFiles) -> None:
    loop.append(numbered(60_000, width=100))
    settle(loop)
    index, aim = LogIndex(str(loop.log)), Aim()
    with loop.log.open("rb") as file:
        while not index.end:  # a piece may be over before anything was read in it
            assert not index.advance(file.fileno(), aim)
        with loop.log.open("r+b") as changed:
            changed.seek(index.end // 2)
            changed.write(b"#")
        settle(loop)

        until(lambda: index.advance(file.fileno(), aim), "it is read")
        until(lambda: index.advance(file.fileno(), Aim()) and index.view().identity > 1, "the change is found")


def test_a_small_log_is_read_again_in_one_go_however_slow_the_machine_is(loop: LoopFiles) -> None:
    loop.append(numbered(3000, width=100))
    index = LogIndex(str(loop.log))
    with loop.log.open("rb") as file:
        until(lambda: index.advance(file.fileno(), Aim()), "it is read")
        before = index.view()
        changed_in_the_middle(loop)
        loop.append(numbered(1))

        assert not index.advance(file.fileno(), Aim(), background=0.0)
        until(lambda: index.advance(file.fileno(), Aim()), "it is read anew")

        assert CHUNK < before.end < log_index.READ_AGAIN_AT_ONCE
        assert index.view().identity != before.identity


@pytest.mark.parametrize("more", [b"{\n", b'{"torn', numbered(1)], ids=["an open record", "a torn line", "a record"])
def test_a_log_of_which_more_was_read_is_not_where_it_was_seen(log: EventLog, loop: LoopFiles, more: bytes) -> None:
    loop.append(numbered(3))
    seen = log.refresh()

    def is_there() -> bool:
        stamp = log.stamp()
        return stamp is not None and log.is_at(seen, stamp)

    assert is_there()
    loop.append(more)
    assert not is_there()
    log.refresh()
    assert not is_there()


def test_a_log_that_is_cut_off_before_all_of_it_was_read_is_read_to_its_new_end(loop: LoopFiles) -> None:
    content = numbered(60_000, width=100)
    loop.append(content)
    index, aim = LogIndex(str(loop.log)), Aim()
    with loop.log.open("rb") as file:
        while not index.end:  # a piece may be over before anything was read in it
            assert not index.advance(file.fileno(), aim)
        assert index.end < len(content)
        end = content.index(b"\n", (index.end + len(content)) // 2) + 1
        loop.truncate(end)

        until(lambda: index.advance(file.fileno(), aim), "it is read")

    assert index.view().end == end


def test_a_log_that_is_cut_off_just_when_its_status_was_taken_is_read_to_its_new_end(
    loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(numbered(3))
    index, aim, fstat = LogIndex(str(loop.log)), Aim(), os.fstat
    with loop.log.open("rb") as file:
        until(lambda: index.advance(file.fileno(), Aim()), "it is read")

        def cutting_off(descriptor: int) -> os.stat_result:
            found = fstat(descriptor)
            loop.truncate(len(numbered(2)))
            return found

        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", cutting_off)
            assert not index.advance(file.fileno(), aim)
        until(lambda: index.advance(file.fileno(), aim), "it is read")

    assert index.view().lines == 2


@pytest.mark.parametrize("change", [lambda log: log.touch(), lambda log: log.chmod(0o600)], ids=["touched", "chmod"])
def test_a_log_whose_content_is_as_it_was_stays_the_same_log(
    log: EventLog, loop: LoopFiles, change: Callable[[Path], None]
) -> None:
    loop.append(numbered(500, width=100))
    before = log.refresh()
    settle(loop)

    change(loop.log)

    assert log.refresh().identity == before.identity
    assert rest(log, log.reader_after_token(str(before.token))) == []


def test_a_log_that_rests_is_not_read_again_and_again(
    log: EventLog, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(numbered(5000, width=100))
    settle(loop)
    until(lambda: log.refresh().is_sure, "all was read again")
    read = bytes_read(monkeypatch)

    for _ in range(10):
        log.refresh()

    assert sum(read) < 10 * 4 * WINDOW_BYTES


# What looking and resuming cost.


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much each read from now on reads."""
    sizes: list[int] = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting)
    return sizes


def test_a_look_and_a_resume_cost_what_is_new_and_not_what_is_old(
    log: EventLog, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.append(numbered(30_000, width=100))
    token = str(log.refresh().token)
    monkeypatch.setattr(Rereading, "go_on", lambda *_: True)  # the background has its own measure
    loop.append(numbered(10))
    read = bytes_read(monkeypatch)

    log.refresh()
    looking = sum(read)
    found = rest(log, log.reader_after_token(token))
    resuming = sum(read) - looking

    assert len(found) == 10
    assert looking < 8 * WINDOW_BYTES
    assert resuming < 2 * CHUNK


def test_the_index_of_a_large_log_stays_small_and_finds_every_place(
    log: EventLog, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_index, "CHUNK", 1000)
    monkeypatch.setattr(log_index, "_MAX_MARKS", 16)
    content = numbered(3000, width=20)
    loop.append(content)
    everything = records_of(content)

    log.refresh()

    assert len(log._index._marks) <= 16  # noqa: SLF001  # its size is what this is about
    for place in range(0, 3001, 250):
        assert rest(log, log.reader_after_line(place)) == everything[place:]
        assert rest(log, log.reader_after_token(token_after(log, place))) == everything[place:]


def test_a_log_of_many_gibibytes_is_read_in_short_pieces_that_leave_others_their_turn(
    log: EventLog, loop: LoopFiles
) -> None:
    """Sandbox code makes one with a single call: a line without end, most of it a hole."""
    loop.append(numbered(1))
    os.truncate(loop.log, 64 * 1024**3)
    one, another = log.look_steps(), log.look_steps()

    began = time.thread_time()  # what others take of the machine does not count
    for _ in range(10):
        assert goes_on(one)
        assert goes_on(another)

    assert time.thread_time() - began < 10 * 20 * PIECE
    assert log.lines_read == 1


def test_a_call_that_reads_a_log_of_many_gibibytes_ends_when_its_repo_is_closed(
    loop: LoopFiles, tmp_path: Path
) -> None:
    os.truncate(loop.log, 64 * 1024**3)
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(repo.read_loop, LOOP)
        until(lambda: repo._logs, "it reads")  # noqa: SLF001  # nothing else tells

        repo.close()

        assert isinstance(asked.exception(timeout=DEADLINE), Starting)


def test_a_call_gives_up_on_a_log_that_takes_too_long_and_goes_on_from_there_the_next_time(loop: LoopFiles) -> None:
    log = EventLog(ArtifactFiles(loop.repo), LOOP, patience=0.05)
    loop.append(b"x\n" * 200_000)

    with pytest.raises(Starting, match="still being read") as refused:
        log.refresh()

    assert refused.value.retry_after == 1.0
    read = log.lines_read
    assert 0 < read < 200_000
    with pytest.raises(Starting):
        log.reader_after_line(0)
    assert log.lines_read > read


def test_only_so_many_calls_wait_for_a_log_that_is_still_being_read(
    loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(ArtifactFiles(loop.repo), LOOP, patience=30.0)
    loop.append(b"x\n")
    let_go = threading.Event()

    def piece(*_: Any) -> bool:
        """There is always more to read, until all may go."""
        let_go.wait(0.001)
        return let_go.is_set()

    monkeypatch.setattr(LogIndex, "advance", piece)
    monkeypatch.setattr(LogIndex, "view", lambda _: None)
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(log.refresh) for _ in range(20)]
        until(lambda: sum(call.done() for call in calls) >= 12, "all but eight are sent away")
        waiting = [call for call in calls if not call.done()]
        let_go.set()

    assert len(waiting) == 8
    assert all(call.exception() is None for call in waiting)
    assert all(isinstance(call.exception(), Starting) for call in calls if call not in waiting)


@pytest.mark.parametrize("ending", [b"", b"\n"], ids=["not ended yet", "ended"])
def test_a_line_without_end_is_never_held_in_memory(log: EventLog, loop: LoopFiles, ending: bytes) -> None:
    loop.append(numbered(1), b"x" * (40 * MAX_RECORD_BYTES), ending)

    tracemalloc.start()
    try:
        view = log.refresh()
        with log.reader_after_token(token_after(log, 1)) as reader:
            while not reader.at_end(loop.log.stat().st_size):
                reader.read(loop.log.stat().st_size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert view.lines == 1 + len(ending)
    assert peak < 16 * MAX_RECORD_BYTES


def test_readers_share_a_log_each_at_a_pace_of_its_own(log: EventLog, loop: LoopFiles) -> None:
    loop.append(numbered(5000, width=100))
    end = log.refresh().end
    slow = log.reader_after_line(0)
    first = slow.read(end)

    everything = rest(log, log.reader_after_line(0))

    assert [*first, *rest(log, slow)] == everything
    assert len(everything) == 5000
