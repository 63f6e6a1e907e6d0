"""The commands that look: what they print piped and on a terminal, where nothing the sandbox wrote takes effect."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr import store as files
from opsmgr.store import LoopStore, default_folder
from sprite_agent.contract.validation import validate
from support.repos import LOOP, event, line
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.repos import LoopFiles

PROGRAM = Path(sys.executable).with_name("opsmgr")
HOSTILE = "[red]not red[/red] \x1b[31mnot red\x1b[0m \x1b]0;title\x07\u202eend"
"""Markup, colours, a terminal's title and a change of direction, as a sandbox may write them."""

Json = dict[str, Any]
Ended = subprocess.CompletedProcess[str]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The environment of the programs: nothing of whoever runs the tests."""
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm-256color", "COLUMNS": "200"}


@pytest.fixture
def opsmgr(env: dict[str, str], tmp_path: Path) -> Callable[..., Ended]:
    """The program, run to its end, with its output piped."""

    def run(*words: str | Path, stdin: str = "") -> Ended:
        return subprocess.run(
            [PROGRAM, *words],
            capture_output=True,
            check=False,
            cwd=tmp_path,
            env=env,
            input=stdin,
            text=True,
            timeout=DEADLINE,
        )

    return run


@pytest.fixture
def there(repo: LoopFiles) -> list[str]:
    """The words that mean the loop in the repo."""
    return ["--repo", str(repo.repo), "--loop", LOOP]


@pytest.fixture
def kept(repo: LoopFiles) -> LoopStore:
    """The manager's files of that loop."""
    return LoopStore(default_folder(repo.repo, LOOP))


@pytest.fixture
def two(repo: LoopFiles, tmp_path: Path) -> Path:
    """A config of two targets: the loop, and one in a repo that has none of it."""
    (tmp_path / "empty").mkdir()
    config = tmp_path / "opsmgr.toml"
    config.write_text(
        f'[fleet]\nstatus_file = "{tmp_path}/status.json"\n'
        f'[[targets]]\nname = "here"\nloop = "{LOOP}"\nrepo = "{repo.repo}"\n'
        f'[[targets]]\nname = "lost"\nloop = "{LOOP}"\nrepo = "{tmp_path}/empty"\n'
    )
    return config


def on_a_terminal(*words: str | Path, env: dict[str, str], until_said: str = "", stdout: Any = None) -> tuple[str, int]:
    """What a terminal is sent by the program until its end, or until it has said something and is interrupted.

    Stdout is the same terminal unless it is given.
    """
    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the program has ended
            while piece := os.read(master, 65536):
                seen.extend(piece)

    with subprocess.Popen(
        [PROGRAM, *words], env=env, stdin=subprocess.DEVNULL, stdout=stdout or slave, stderr=slave
    ) as process:
        os.close(slave)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            if until_said:
                until(lambda: until_said.encode() in seen, f"{until_said!r} on the terminal")
                process.send_signal(signal.SIGINT)
            code = process.wait(DEADLINE)
        finally:
            process.kill()
            process.wait()
            reader.join(DEADLINE)
            os.close(master)
    return seen.decode(), code


def printed(ended: Ended) -> list[Json]:
    """What it printed, a document a line; it ended well."""
    assert ended.returncode == 0, ended.stderr
    return [json.loads(text) for text in ended.stdout.splitlines()]


def escalate(store: LoopStore, *categories: str, **evidence: Any) -> None:
    for number, category in enumerate(categories):
        record = {
            "timestamp": f"2026-01-02T03:04:{number:02}Z",
            "loopId": LOOP,
            "traceId": None,
            "category": category,
            "transport": "local",
            "evidence": evidence,
        }
        files.append(store.escalations, record)


# what the sandbox wrote


def assert_harmless(text: str) -> None:
    assert "\x1b[31mnot red" not in text
    assert "\x1b]0;" not in text
    assert "\u202e" not in text
    assert "\x07" not in text
    assert "[red]not red[/red]" in text  # markup stays the text that it is


def test_text_of_an_event_takes_no_effect_on_the_terminal_of_a_watch(
    repo: LoopFiles, there: list[str], env: dict[str, str]
) -> None:
    repo.append(line(event("note", message=HOSTILE)))

    seen, _ = on_a_terminal("watch", *there, "--from-start", "--max-events", "1", env=env)

    assert_harmless(seen)


def test_text_of_an_event_takes_no_effect_in_a_status(repo: LoopFiles, there: list[str], env: dict[str, str]) -> None:
    repo.append(line(event("note", message=HOSTILE)))

    seen, code = on_a_terminal("status", *there, env=env)

    assert code == 0, seen
    assert_harmless(seen)


def test_an_events_name_takes_no_effect_in_the_list_of_loops(repo: LoopFiles, env: dict[str, str]) -> None:
    repo.append(line(event(HOSTILE)))

    seen, code = on_a_terminal("loops", "--repo", repo.repo, env=env)

    assert code == 0, seen
    assert_harmless(seen)


def test_text_of_an_escalation_takes_no_effect(kept: LoopStore, there: list[str], env: dict[str, str]) -> None:
    escalate(kept, "event_malformed", message=HOSTILE)

    seen, code = on_a_terminal("escalations", *there, env=env)

    assert code == 0, seen
    assert_harmless(seen)


@pytest.mark.parametrize("wish", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "TERM=dumb"])
@pytest.mark.parametrize("command", ["watch", "status", "loops"])
def test_no_command_writes_codes_to_a_terminal_that_wants_none(
    repo: LoopFiles, there: list[str], env: dict[str, str], command: str, wish: dict[str, str]
) -> None:
    repo.append(line(event("loop_complete")))
    words = {"watch": [*there, "--from-start", "--max-events", "1"], "loops": there[:2]}.get(command, there)

    seen, code = on_a_terminal(command, *words, env=env | wish)

    assert code == 0, seen
    assert "loop_complete" in seen
    assert not re.search(r"\x1b\[(\d+;)*[349]\d", seen)  # a colour
    assert "TERM" not in wish or "\x1b" not in seen


# status


def test_a_piped_status_of_the_config_is_a_status_document_with_those_in_trouble_first(
    two: Path, kept: LoopStore, repo: LoopFiles, opsmgr: Callable[..., Ended], there: list[str]
) -> None:
    repo.append(line(event()))
    printed(opsmgr("reconcile", *there))
    assert kept.health.exists()

    [document] = printed(opsmgr("status", "--config", two))

    validate("manager_status", document)
    assert document["pid"] is None
    assert {row["name"]: row["cursorLine"] for row in document["targets"]} == {"here": 1, "lost": 0}


def test_one_loop_that_can_not_be_reached_is_told_from_its_files_with_3(
    repo: LoopFiles, there: list[str], opsmgr: Callable[..., Ended], tmp_path: Path
) -> None:
    repo.append(line(event()))
    printed(opsmgr("reconcile", *there))
    gone = ["--transport", "sprite_service", "--service-target", f"unix:{tmp_path}/no.sock"]

    ended = opsmgr("status", *there, *gone)

    assert ended.returncode == 3
    assert len(ended.stderr.splitlines()) == 1
    assert f'"runId":"{event()["run_id"]}"' in ended.stdout


def test_a_silent_agent_is_out_of_reach_before_anybody_loses_patience(
    there: list[str], opsmgr: Callable[..., Ended], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s.sock"))
        silent.listen()
        began = time.monotonic()
        ended = opsmgr("status", *there, "--transport", "sprite_service", "--service-target", f"unix:{tmp_path}/s.sock")

    assert ended.returncode == 3
    assert time.monotonic() - began < 8


def test_a_loop_that_the_agent_does_not_have_is_refused_with_1(repo: LoopFiles, opsmgr: Callable[..., Ended]) -> None:
    ended = opsmgr("status", "--repo", repo.repo, "--loop", "other")

    assert ended.returncode == 1
    assert "[LOOP_NOT_FOUND]" in ended.stderr


def test_a_watched_status_goes_on_until_it_is_interrupted(two: Path, env: dict[str, str]) -> None:
    seen, code = on_a_terminal("status", "--config", two, "--watch", env=env, until_said="lost")

    assert code == 130
    assert "Traceback" not in seen


# watch


def test_a_target_that_fails_stops_no_other(two: Path, repo: LoopFiles, opsmgr: Callable[..., Ended]) -> None:
    repo.append(line(event("one")), line(event("two")))

    ended = opsmgr("watch", "--config", two, "--from-start", "--max-events", "2")

    found = [json.loads(text) for text in ended.stdout.splitlines()]
    assert [each["event"]["name"] for each in found if each.get("envelopeType")] == ["one", "two"]
    assert "lost: " in ended.stderr
    assert ended.returncode == 1


def test_each_line_of_a_merged_watch_has_the_targets_name(two: Path, repo: LoopFiles, env: dict[str, str]) -> None:
    repo.append(line(event("one")))

    seen, _ = on_a_terminal("watch", "--config", two, "--from-start", "--max-events", "1", env=env)

    assert [text for text in seen.splitlines() if " one" in text and "here" in text]


# cursor


def test_a_cursor_is_shown_set_and_reset(
    repo: LoopFiles, kept: LoopStore, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    repo.append(*[line(event())] * 3)
    printed(opsmgr("reconcile", *there))

    [shown] = printed(opsmgr("cursor", "show", *there))
    printed(opsmgr("cursor", "set", *there, "--line", "2"))
    moved = json.loads(kept.cursor.read_text())
    [at_start] = printed(opsmgr("cursor", "reset", *there))

    assert (shown["eventLineOffset"], shown["hasResumeToken"]) == (3, True)
    assert (moved["eventLineOffset"], moved["resumeToken"]) == (2, None)
    assert (at_start["eventLineOffset"], at_start["hasResumeToken"]) == (0, False)


def test_a_cursor_is_not_set_beyond_the_log(
    repo: LoopFiles, kept: LoopStore, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    repo.append(line(event()))

    ended = opsmgr("cursor", "set", *there, "--line", "2")

    assert (ended.returncode, kept.cursor.exists()) == (1, False)


def test_a_cursor_is_not_moved_while_a_manager_works_on_the_loop(
    kept: LoopStore, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    with kept.locked():
        ended = opsmgr("cursor", "reset", *there)

    assert ended.returncode == 1
    assert "[LOOP_LOCKED]" in ended.stderr


def test_a_log_that_is_handled_again_after_a_reset_is_not_called_out_of_order(
    repo: LoopFiles, kept: LoopStore, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    repo.append(*[line(event())] * 3)
    printed(opsmgr("reconcile", *there))
    printed(opsmgr("cursor", "reset", *there))

    [state] = printed(opsmgr("reconcile", *there))

    assert state["sequence"]["violations"] == []
    assert state["cursor"]["eventLineOffset"] == 3


# loops


def test_a_loop_that_can_not_be_read_is_listed_with_its_reason_beside_the_others(
    repo: LoopFiles, opsmgr: Callable[..., Ended]
) -> None:
    repo.append(line(event("fine")))
    broken = repo.runtime / "loops" / "broken"
    broken.mkdir()
    (broken / "events.jsonl").write_bytes(b"not an event\n" * 3)
    (broken / "run-summary.json").write_bytes(b"{torn")

    [found] = printed(opsmgr("loops", "--repo", repo.repo))

    rows = {row["loopId"]: row for row in found["loops"]}
    assert rows[LOOP]["lastEventName"] == "fine"
    assert rows["broken"]["error"]


# validate


def test_each_line_gets_a_verdict_with_its_number_and_what_is_wrong_where(
    repo: LoopFiles, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    repo.append(line(event()))
    good = opsmgr("events", *there).stdout
    bad = json.loads(good)
    bad["cursor"]["eventLineOffset"] = "one"

    ended = opsmgr("validate", "--json", stdin=f"{good}\n{json.dumps(bad)}\n{{torn\n")

    first, second, third = [json.loads(text) for text in ended.stdout.splitlines()]
    assert ended.returncode == 1
    assert (first["line"], first["ok"], first["schema"]) == (1, True, "loop_run_event")
    assert (second["line"], second["ok"]) == (3, False)
    assert "cursor.eventLineOffset" in [each["path"] for each in second["violations"]]
    assert (third["line"], third["ok"]) == (4, False)


def test_a_pretty_document_in_a_file_is_one_document(
    repo: LoopFiles, there: list[str], opsmgr: Callable[..., Ended], tmp_path: Path
) -> None:
    repo.append(line(event()))
    (tmp_path / "snapshot.json").write_text(opsmgr("snapshot", *there, "--pretty").stdout)

    [verdict] = printed(opsmgr("validate", "--json", tmp_path / "snapshot.json"))

    assert (verdict["ok"], verdict["schema"]) == (True, "loop_run_snapshot")


def test_a_manager_document_is_held_against_the_schema_that_is_named(
    kept: LoopStore, repo: LoopFiles, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    repo.append(line(event()))
    printed(opsmgr("reconcile", *there))

    assert opsmgr("validate", "--schema", "manager_health", kept.health).returncode == 0
    assert opsmgr("validate", "--schema", "manager_cursor", kept.health).returncode == 1


def test_nothing_to_read_is_a_wrong_call(opsmgr: Callable[..., Ended]) -> None:
    assert opsmgr("validate", stdin="").returncode == 64


# escalations


def test_the_last_escalations_are_printed_newest_last_from_rotated_files_too(
    kept: LoopStore, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    escalate(kept, "a", "b", "c", "d")
    kept.escalations.rename(kept.escalations.with_name("escalations.jsonl.1"))
    files.append(kept.escalations, {"timestamp": "2026-01-02T03:05:00Z", "category": "e", "evidence": {}})

    found = printed(opsmgr("escalations", *there, "--limit", "3"))

    assert [each["category"] for each in found] == ["c", "d", "e"]


def test_escalations_can_be_narrowed(kept: LoopStore, there: list[str], opsmgr: Callable[..., Ended]) -> None:
    escalate(kept, "a", "b", "a", "b")

    by_category = printed(opsmgr("escalations", *there, "--category", "a"))
    by_time = printed(opsmgr("escalations", *there, "--since", "2026-01-02T03:04:03Z"))

    assert [each["category"] for each in by_category] == ["a", "a"]
    assert [each["timestamp"] for each in by_time] == ["2026-01-02T03:04:03Z"]


def test_escalations_of_the_same_second_keep_their_order(
    kept: LoopStore, there: list[str], opsmgr: Callable[..., Ended]
) -> None:
    for category in "abcde":
        escalate(kept, category)

    assert [each["category"] for each in printed(opsmgr("escalations", *there))] == list("abcde")


def test_followed_escalations_go_on_across_a_rotation(kept: LoopStore, there: list[str], env: dict[str, str]) -> None:
    escalate(kept, "before")
    with subprocess.Popen([PROGRAM, "escalations", *there, "--follow"], env=env, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            told = [json.loads(process.stdout.readline())["category"]]
            escalate(kept, "after")
            kept.escalations.rename(kept.escalations.with_name("escalations.jsonl.1"))
            escalate(kept, "rotated")
            told += [json.loads(process.stdout.readline())["category"] for _ in range(2)]
        finally:
            process.kill()

    assert told == ["before", "after", "rotated"]


# progress


def test_a_watch_from_the_start_shows_how_far_it_is_until_it_has_caught_up(
    repo: LoopFiles, there: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    repo.log.write_bytes(line(event(message="x" * 1000)) * 20_000)

    with (tmp_path / "events").open("wb") as out:
        seen, code = on_a_terminal("watch", *there, "--from-start", "--max-events", "20000", env=env, stdout=out)

    assert code == 0, seen
    assert re.search(r"line \d+ of 20000, \d+ events/s", seen)
    assert seen.endswith("\r\x1b[K")


def test_a_long_replay_shows_on_the_terminal_how_far_it_is_and_takes_that_away(
    repo: LoopFiles, there: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    repo.log.write_bytes(line(event(message="x" * 1000)) * 20_000)

    with (tmp_path / "events").open("wb") as out:
        seen, code = on_a_terminal("events", *there, env=env, stdout=out)

    assert code == 0, seen
    assert re.search(r"line \d+ of 20000, \d+ events/s", seen)
    assert seen.endswith("\r\x1b[K")
    assert (tmp_path / "events").read_bytes().count(b"\n") == 20_000


@pytest.mark.parametrize("command", ["events", "reconcile"])
def test_a_replay_says_nothing_of_it_when_nobody_looks(
    repo: LoopFiles, there: list[str], opsmgr: Callable[..., Ended], command: str
) -> None:
    repo.log.write_bytes(line(event()) * 5_000)

    assert opsmgr(command, *there).stderr == ""


def test_a_replay_leaves_a_dumb_terminal_alone(
    repo: LoopFiles, there: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    repo.log.write_bytes(line(event(message="x" * 1000)) * 20_000)

    with (tmp_path / "state").open("wb") as out:
        seen, code = on_a_terminal("events", *there, env={**env, "TERM": "dumb"}, stdout=out)

    assert (seen, code) == ("", 0)
