"""A snapshot says what the artifacts say, or fails closed."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.artifacts import MAX_DOCUMENT_BYTES, MAX_MARKS, MAX_SUMMARY_BYTES
from sprite_agent.contract import json_text
from sprite_agent.contract.json_text import OpenObject
from sprite_agent.errors import ArtifactMalformed, EventMalformed
from sprite_agent.event_log.rereading import Rereading
from sprite_agent.repo import Repo
from support.repos import LOOP, MOMENT, LoopFiles, event, line, lines, put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprite_agent.contract.envelopes import SnapshotEnvelope

GATES = dict.fromkeys(("tests", "validation", "prerequisites", "checklist", "evidence", "approval"), "ok")


@pytest.fixture
def loop(tmp_path: Path) -> LoopFiles:
    return LoopFiles(tmp_path / "repo")


@pytest.fixture
def repo(loop: LoopFiles, tmp_path: Path) -> Iterator[Repo]:
    repo = Repo(loop.repo, state_folder=tmp_path / "state", runtime=None)
    yield repo
    repo.close()


def snapshot(repo: Repo) -> SnapshotEnvelope:
    return repo.read_loop(LOOP).snapshot


# What an empty loop says.


def test_an_empty_log_alone_makes_a_snapshot_of_nulls(repo: Repo, loop: LoopFiles) -> None:
    found = snapshot(repo)

    assert found["source"] == {"repoPath": str(loop.repo), "loopId": LOOP}
    assert found["sequence"] == {"source": "cursor_event_line_offset", "value": 0}
    assert found["run"] == {"runId": "unknown", "iteration": 0, "status": "unknown", "summary": None}
    assert found["runtime"] == {"superloopState": None, "activeRun": None, "approval": None, "heartbeat": None}
    assert found["cursor"] == {"eventLineOffset": 0, "eventLineCount": 0}
    assert found["health"] == {
        "eventCount": 0,
        "lastEventAt": None,
        "lastEventName": None,
        "lastSummaryAt": None,
        "hasPendingApproval": False,
        "gates": None,
        "stuck": None,
    }
    assert found["traceId"] is None


def test_the_trace_id_is_passed_on(repo: Repo) -> None:
    assert repo.read_loop(LOOP, trace_id="trace-1").snapshot["traceId"] == "trace-1"


# The last event.


@pytest.mark.parametrize("last", [b"not json", b'{"a": NaN}', b"[1]", b"3", b'{"a": "\xff"}', b"}"])
def test_a_last_record_that_is_no_json_object_fails_and_its_line_is_named(
    repo: Repo, loop: LoopFiles, last: bytes
) -> None:
    loop.append(line(event()), b"\n", last + b"\n", b"\n")

    with pytest.raises(EventMalformed, match="line 3 of the event log is malformed") as malformed:
        snapshot(repo)

    assert malformed.value.details == {"line": "3", "lastLine": "3"}


def test_a_malformed_record_that_is_not_the_last_one_does_not_matter(repo: Repo, loop: LoopFiles) -> None:
    loop.append(b"not json\n", line(event("loop_start")), b"{\n", line(event("loop_stop")))

    assert snapshot(repo)["health"]["lastEventName"] == "loop_stop"
    assert snapshot(repo)["health"]["eventCount"] == 4


@pytest.mark.parametrize(
    ("last", "name", "moment"),
    [
        ({"timestamp": MOMENT}, None, MOMENT),
        ({"event": "loop_start"}, "loop_start", None),
        ({"type": "loop_start"}, "loop_start", None),
        ({"event": "", "timestamp": ""}, None, None),
        ({"event": None, "timestamp": None}, None, None),
        ({}, None, None),
        ({"event": "loop_start", "timestamp": "no date"}, "loop_start", "no date"),
    ],
)
def test_a_last_record_without_name_or_timestamp_gives_nulls(
    repo: Repo, loop: LoopFiles, last: dict[str, Any], name: str | None, moment: str | None
) -> None:
    loop.append(line(event("before")), line(last))

    health = snapshot(repo)["health"]
    assert (health["lastEventName"], health["lastEventAt"]) == (name, moment)


@pytest.mark.parametrize(
    ("last", "path"),
    [
        ({"event": 3}, "health.lastEventName"),
        ({"event": ["loop_stop"]}, "health.lastEventName"),
        ({"event": "x", "timestamp": 1771824606}, "health.lastEventAt"),
        ({"event": "x", "run_id": 7}, "run.runId"),
    ],
)
def test_a_last_record_that_leads_to_what_the_schema_refuses_fails(
    repo: Repo, loop: LoopFiles, last: dict[str, Any], path: str
) -> None:
    loop.append(line(last))

    with pytest.raises(ArtifactMalformed, match=path) as malformed:
        snapshot(repo)

    assert malformed.value.details["path"] == path


def test_a_last_event_over_several_lines_is_the_last_event(repo: Repo, loop: LoopFiles) -> None:
    loop.append(line(event()), lines(event("usage_check", run_id="run-2")))

    found = snapshot(repo)
    assert found["health"]["lastEventName"] == "usage_check"
    assert found["run"]["runId"] == "run-2"
    assert found["cursor"]["eventLineCount"] == 8


def test_a_torn_last_line_is_not_counted_but_is_part_of_the_file(repo: Repo, loop: LoopFiles) -> None:
    whole = line(event("loop_start"))
    loop.append(whole, b'{"event": "loop_st')

    found = snapshot(repo)
    assert found["health"]["eventCount"] == 1
    assert found["health"]["lastEventName"] == "loop_start"
    assert found["artifacts"]["events"]["lineCount"] == 1
    assert found["artifacts"]["events"]["sizeBytes"] == len(whole) + 18
    assert found["artifacts"]["events"]["sha256"] == hashlib.sha256(loop.log.read_bytes()).hexdigest()


def test_the_lines_of_an_object_that_is_not_closed_yet_are_counted_but_are_no_event(
    repo: Repo, loop: LoopFiles
) -> None:
    loop.append(line(event("loop_start")), b'{\n"event": "usage_check",\n')

    found = snapshot(repo)
    assert found["health"]["eventCount"] == 3
    assert found["health"]["lastEventName"] == "loop_start"


# The run.


@pytest.mark.parametrize(
    ("override", "entry", "last", "run_id"),
    [
        ("mine", "of-summary", "of-event", "mine"),
        ("", "of-summary", "of-event", "of-summary"),
        (None, "of-summary", "of-event", "of-summary"),
        (None, "", "of-event", "of-event"),
        (None, None, "of-event", "of-event"),
        (None, None, "", "unknown"),
        (None, None, None, "unknown"),
    ],
)
def test_the_run_id_is_the_callers_else_the_summarys_else_the_last_events(
    repo: Repo, loop: LoopFiles, *, override: str | None, entry: str | None, last: str | None, run_id: str
) -> None:
    loop.append(line(event(run_id="earlier")), line(event(run_id=last)))
    loop.summarize({"run_id": "earlier"}, {"run_id": entry})

    assert repo.read_loop(LOOP, run_id=override).snapshot["run"]["runId"] == run_id


def test_a_missing_run_id_counts_as_none(repo: Repo, loop: LoopFiles) -> None:
    loop.append(line({"event": "x"}))
    loop.summarize({"iteration": 1})

    assert snapshot(repo)["run"]["runId"] == "unknown"


@pytest.mark.parametrize(
    ("entry", "last", "state", "iteration"),
    [
        ({"iteration": 3}, {"iteration": 2}, {"iteration": 1}, 3),
        ({"iteration": 0}, {"iteration": 2}, {"iteration": 1}, 0),
        ({}, {"iteration": 2}, {"iteration": 1}, 2),
        ({"iteration": None}, {"iteration": None}, {"iteration": 1}, 1),
        ({}, {}, {"iteration": 1}, 1),
        ({}, {}, {}, 0),
        ({"iteration": "three"}, {"iteration": 2}, {}, 0),
    ],
)
def test_the_iteration_is_of_the_first_of_summary_event_and_state_that_has_one(
    repo: Repo,
    loop: LoopFiles,
    *,
    entry: dict[str, Any],
    last: dict[str, Any],
    state: dict[str, Any],
    iteration: int,
) -> None:
    loop.append(line({"event": "x", **last}))
    loop.summarize(entry)
    put(loop.state, state)

    assert snapshot(repo)["run"]["iteration"] == iteration


@pytest.mark.parametrize(
    ("written", "iteration"),
    [
        (b"7", 7),
        (b"7.0", 7),
        (b"7e0", 7),
        (b'"7"', 7),
        (b'"7.0"', 7),
        (b'"1e2"', 100),
        (b"9223372036854775807", 2**63 - 1),
        (b'"9223372036854775807"', 2**63 - 1),
        (b'"seven"', 0),
        (b'""', 0),
        (b'"0x7"', 0),
        (b'"NaN"', 0),
        (b"true", 0),
        (b"false", 0),
        (b"null", 0),
        (b"[7]", 0),
        (b'{"n": 7}', 0),
    ],
)
def test_numbers_and_numeric_strings_count_as_iteration_and_anything_else_is_0(
    repo: Repo, loop: LoopFiles, written: bytes, iteration: int
) -> None:
    put(loop.run_summary, b'{"entries": [{"iteration": ' + written + b"}]}")

    assert snapshot(repo)["run"]["iteration"] == iteration
    assert type(snapshot(repo)["run"]["iteration"]) is int


@pytest.mark.parametrize(
    "written",
    [
        b"-1",
        b"2.5",
        b'"-1"',
        b'"2.5"',
        b"9223372036854775808",
        b"1e300",
        b'"1e300"',
        b'"1e400"',
        b'"' + b"9" * 400 + b'"',
    ],
)
def test_an_iteration_that_is_a_number_but_not_a_whole_one_from_0_on_fails(
    repo: Repo, loop: LoopFiles, written: bytes
) -> None:
    put(loop.run_summary, b'{"entries": [{"iteration": ' + written + b"}]}")

    with pytest.raises(ArtifactMalformed) as malformed:
        snapshot(repo)

    assert malformed.value.details["path"] == "run.iteration"


def test_the_status_is_that_of_the_artifacts(repo: Repo, loop: LoopFiles) -> None:
    put(loop.state, {"active": True, "current_loop_id": LOOP})
    assert snapshot(repo)["run"]["status"] == "running"

    loop.ask_approval()
    assert snapshot(repo)["run"]["status"] == "awaiting_approval"
    assert snapshot(repo)["health"]["hasPendingApproval"] is True


# The run summary.


@pytest.mark.parametrize("entries", [[], None])
def test_without_entries_there_is_no_summary(repo: Repo, loop: LoopFiles, entries: Any) -> None:
    put(loop.run_summary, {"entries": entries})

    assert snapshot(repo)["run"]["summary"] is None


def test_the_summary_is_the_last_entry_whole(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize({"run_id": "a"}, {"run_id": "b", "unknown": [1, {"x": None}]})

    assert snapshot(repo)["run"]["summary"] == {"run_id": "b", "unknown": [1, {"x": None}]}


@pytest.mark.parametrize("entries", [{}, "text", 3, True, {"0": {}}, [{}, None], [{}, 3], [{}, []], [{}, "text"]])
def test_entries_that_are_no_list_of_objects_fail_and_the_file_is_named(
    repo: Repo, loop: LoopFiles, entries: Any
) -> None:
    put(loop.run_summary, {"entries": entries})

    with pytest.raises(ArtifactMalformed, match=r"run-summary\.json") as malformed:
        snapshot(repo)

    assert malformed.value.details["path"] == f".superloop/loops/{LOOP}/run-summary.json"


def test_a_long_summary_with_a_last_entry_of_the_usual_size_is_read(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize(*({"run_id": f"run-{number}", "text": "x" * MAX_DOCUMENT_BYTES} for number in range(8)), {"n": 1})

    assert snapshot(repo)["run"]["summary"] == {"n": 1}


@pytest.mark.parametrize("item", ["[],", "{},", "1,", '{"":0},', "[" * 200 + "]" * 200 + ","])
def test_a_summary_that_would_be_a_hundred_times_as_large_when_parsed_fails_and_is_not_parsed(
    repo: Repo, loop: LoopFiles, item: str
) -> None:
    loop.run_summary.write_text('{"entries":[' + item * (MAX_SUMMARY_BYTES // len(item) - 100) + "{}]}")

    with pytest.raises(ArtifactMalformed, match=rf"run-summary\.json has more than {MAX_MARKS} commas"):
        snapshot(repo)


def test_a_last_entry_larger_than_a_document_may_be_fails_and_the_file_is_named(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize({"text": "x" * MAX_DOCUMENT_BYTES})

    with pytest.raises(ArtifactMalformed, match=rf"run-summary\.json: .*larger than {MAX_DOCUMENT_BYTES} bytes"):
        snapshot(repo)


def test_a_summary_without_bounds_is_not_read(repo: Repo, loop: LoopFiles) -> None:
    loop.summarize({"text": "x" * MAX_SUMMARY_BYTES})

    with pytest.raises(ArtifactMalformed, match=rf"run-summary\.json is larger than {MAX_SUMMARY_BYTES} bytes"):
        snapshot(repo)


@pytest.mark.parametrize(
    ("updated", "ended", "last_summary"),
    [(MOMENT, "later", MOMENT), ("", "later", "later"), (None, "later", "later"), (None, "", None), (None, None, None)],
)
def test_the_time_of_the_summary_is_its_own_else_its_latest_entrys(
    repo: Repo, loop: LoopFiles, updated: str | None, ended: str | None, last_summary: str | None
) -> None:
    loop.summarize({"ended_at": ended}, updated_at=updated)

    assert snapshot(repo)["health"]["lastSummaryAt"] == last_summary


def test_gates_and_stuck_are_the_latest_entrys_and_further_gates_are_kept(repo: Repo, loop: LoopFiles) -> None:
    gates = {**GATES, "lifecycle": "ok", "": "x"}
    loop.summarize({"gates": GATES}, {"gates": gates, "stuck": {"streak": 1, "threshold": 3}})

    health = snapshot(repo)["health"]
    assert health["gates"] == gates
    assert health["stuck"] == {"streak": 1, "threshold": 3}


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        *(({"gates": {name: "ok" for name in GATES if name != gone}}, "health.gates") for gone in GATES),
        ({"gates": {**GATES, "tests": None}}, "health.gates"),
        ({"gates": {**GATES, "lifecycle": True}}, "health.gates"),
        ({"gates": []}, "health.gates"),
        ({"gates": "ok"}, "health.gates"),
        ({"stuck": {"streak": 1}}, "health.stuck"),
        ({"stuck": {"streak": -1, "threshold": 3}}, "health.stuck"),
        ({"stuck": {"streak": 1.5, "threshold": 3}}, "health.stuck"),
        ({"stuck": {"streak": "1", "threshold": 3}}, "health.stuck"),
        ({"stuck": {"streak": 1, "threshold": 3, "more": 1}}, "health.stuck"),
        ({"ended_at": 3}, "health.lastSummaryAt"),
        ({"run_id": ["a"]}, "run.runId"),
    ],
)
def test_a_summary_that_leads_to_what_the_schema_refuses_fails_and_says_where(
    repo: Repo, loop: LoopFiles, entry: dict[str, Any], path: str
) -> None:
    loop.summarize(entry, updated_at=None)

    with pytest.raises(ArtifactMalformed) as malformed:
        snapshot(repo)

    assert malformed.value.details["path"].startswith(path)


# The runtime's own documents.


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("state", "superloopState"),
        ("active_run", "activeRun"),
        ("approval", "approval"),
        ("heartbeat", "heartbeat"),
    ],
)
def test_a_document_is_shown_byte_for_byte(repo: Repo, loop: LoopFiles, file: str, shown: str) -> None:
    text = '{ "b":1.0,\n"a" : 1e2, "n": 18446744073709551616, "s": "\\u00e9é\\/", "b": [ ] }'
    put(getattr(loop, file), text.encode() + b"\n")

    found = snapshot(repo)

    value = found["runtime"][shown]  # type: ignore[literal-required]
    assert isinstance(value, OpenObject)
    assert value.text == text
    assert text.replace("\n", " ") in json_text.encode(found).decode()


@pytest.mark.parametrize("key", ["entries", "\\u0065ntries"])
def test_the_summary_is_shown_byte_for_byte(repo: Repo, loop: LoopFiles, key: str) -> None:
    text = '{ "iteration":1.0,\n"a" : 1e2, "n": 18446744073709551616, "s": "\\u00e9é\\/", "a": [ ] }'
    put(loop.run_summary, f'{{"entries": 3, "{key}":[ {{}} ,\n{text} ]}}'.encode())

    summary = snapshot(repo)["run"]["summary"]

    assert isinstance(summary, OpenObject)
    assert summary.text == text
    assert summary == {"iteration": 1, "a": [], "n": 2**64, "s": "éé/"}


@pytest.mark.parametrize("file", ["run_summary", "state", "active_run", "approval", "heartbeat"])
@pytest.mark.parametrize("content", [b"", b'{"active": tr', b"[]", b'{"a": NaN}', b"null", b'{"a": "\\ud800"}'])
def test_a_document_that_is_no_json_object_fails_and_is_named(
    repo: Repo, loop: LoopFiles, file: str, content: bytes
) -> None:
    path = getattr(loop, file)
    put(path, content)

    with pytest.raises(ArtifactMalformed, match=path.name) as malformed:
        snapshot(repo)

    assert malformed.value.details["path"] == str(path.relative_to(loop.repo))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("log", "events"),
        ("run_summary", "runSummary"),
        ("state", "state"),
        ("active_run", "activeRun"),
        ("approval", "approval"),
        ("heartbeat", "heartbeat"),
    ],
)
def test_a_reference_says_what_the_file_is(repo: Repo, loop: LoopFiles, file: str, name: str) -> None:
    path = getattr(loop, file)
    put(path, b'{"event":"x"}\n\n')
    os.utime(path, (1771824606.9, 1771824606.9))

    assert snapshot(repo)["artifacts"][name] == {  # type: ignore[literal-required]
        "path": str(path.relative_to(loop.repo)),
        "exists": True,
        "sizeBytes": 15,
        "lineCount": 2,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "mtimeEpoch": 1771824606,
    }


# The log as it changes.


def events(count: int, first: int = 0, width: int = 0) -> bytes:
    """Lines with events."""
    return b"".join(line(event(n=number, text="x" * width)) for number in range(first, first + count))


def check_log(found: SnapshotEnvelope, loop: LoopFiles) -> None:
    """What a snapshot says of the log is what the file says."""
    content = loop.log.read_bytes()
    last = [json.loads(text) for text in content.split(b"\n")[:-1]][-1:]
    assert found["artifacts"]["events"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["artifacts"]["events"]["sizeBytes"] == len(content)
    assert found["artifacts"]["events"]["lineCount"] == content.count(b"\n")
    assert found["cursor"] == {"eventLineOffset": content.count(b"\n"), "eventLineCount": content.count(b"\n")}
    assert found["health"]["lastEventName"] == (last[0]["event"] if last else None)


def test_the_log_is_followed_as_it_grows_torn_lines_included(repo: Repo, loop: LoopFiles) -> None:
    for part in (events(3), events(1)[:40], events(1)[40:], events(2), line(event("loop_stop"))):
        loop.append(part)
        check_log(snapshot(repo), loop)


def test_of_a_log_that_has_grown_only_what_is_new_is_read(
    repo: Repo, loop: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is read again in the background, which test_rereading.py is about."""
    monkeypatch.setattr(Rereading, "go_on", lambda *_: True)
    loop.append(events(2000, width=500))
    snapshot(repo)
    news = events(3, first=2000)
    loop.append(news)
    reads: list[tuple[int, int]] = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        reads.append((offset, len(data)))
        return data

    monkeypatch.setattr(os, "pread", counted)
    found = snapshot(repo)
    monkeypatch.undo()

    check_log(found, loop)
    assert sum(size for _, size in reads) < len(news) + 5 * 4096
    before = loop.log.stat().st_size - len(news)
    assert all(offset + size <= 4096 or offset >= before - 4096 for offset, size in reads)


def make_anew(loop: LoopFiles) -> None:
    loop.log.unlink()
    loop.append(events(3))


CHANGES: dict[str, Callable[[LoopFiles], None]] = {
    "truncated to nothing": lambda loop: loop.truncate(0),
    "truncated at a line's end": lambda loop: loop.truncate(len(events(5))),
    "truncated inside a line": lambda loop: loop.truncate(len(events(5)) + 10),
    "rewritten in place, shorter": lambda loop: loop.rewrite(events(5, first=100)),
    "rewritten in place, as long": lambda loop: loop.rewrite(events(10, first=200)),
    "rewritten in place, longer": lambda loop: loop.rewrite(events(20, first=300)),
    "replaced by a shorter one": lambda loop: loop.replace(events(5, first=100)),
    "replaced by one as long": lambda loop: loop.replace(events(10, first=200)),
    "replaced by a longer one": lambda loop: loop.replace(events(20, first=300)),
    "replaced by a copy": lambda loop: loop.replace(loop.log.read_bytes()),
    "replaced by a copy that goes on": lambda loop: loop.replace(loop.log.read_bytes() + line(event("loop_stop"))),
    "removed and made anew": make_anew,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_log_that_is_no_continuation_is_read_anew(
    repo: Repo, loop: LoopFiles, change: Callable[[LoopFiles], None]
) -> None:
    loop.append(events(10))
    check_log(snapshot(repo), loop)

    change(loop)

    check_log(snapshot(repo), loop)


def test_a_log_replaced_by_one_that_begins_otherwise_and_ends_alike_is_read_anew(repo: Repo, loop: LoopFiles) -> None:
    loop.append(events(50, width=500))
    snapshot(repo)

    loop.replace(events(1, first=9, width=500) + loop.log.read_bytes().partition(b"\n")[2])

    check_log(snapshot(repo), loop)


def test_a_repo_with_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder at"):
        Repo(tmp_path / "gone", state_folder=tmp_path / "state", runtime=None)


def test_reading_writes_nothing(repo: Repo, loop: LoopFiles, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    snapshot(repo)

    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("moment", [1771824606_999_999_999, 1771824606_000_000_001, -1_500_000_000])
def test_the_log_and_a_document_of_one_moment_have_the_same_whole_second(
    repo: Repo, loop: LoopFiles, moment: int
) -> None:
    loop.summarize()
    for path in (loop.log, loop.run_summary):
        os.utime(path, ns=(moment, moment))

    artifacts = snapshot(repo)["artifacts"]

    assert artifacts["events"]["mtimeEpoch"] == artifacts["runSummary"]["mtimeEpoch"] == moment // 10**9
