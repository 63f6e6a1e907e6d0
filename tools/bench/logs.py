"""Event logs that are the same for the same seed, and repos that have them beside what a run leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Kind = Literal["small", "mix"]
KINDS: tuple[Kind, ...] = ("small", "mix")

LOOP = "bench"
LINE_BYTES = (306, 426)
"""Shortest and longest line without a payload, newline included: 366 on average."""
PAYLOAD_BYTES = (2048, 8192)
PAYLOAD_SHARE = 0.25
"""Of the lines of a mix."""

_EPOCH = 1_767_322_800
"""2026-01-02T03:00:00Z, when the logs begin."""
_EVENTS_A_SECOND = 20
_RUN = 1_000
"""Events of one run."""
_CHUNK = 10_000
_EVENTS = (
    ("loop_start", "", "started"),
    ("iteration_start", "", "started"),
    ("role_start", "planner", "running"),
    ("role_end", "planner", "ok"),
    ("role_start", "implementer", "running"),
    ("role_end", "implementer", "ok"),
    ("tests_start", "tester", "running"),
    ("tests_end", "tester", "ok"),
    ("validation_start", "tester", "running"),
    ("validation_end", "tester", "ok"),
    ("role_start", "reviewer", "running"),
    ("role_end", "reviewer", "ok"),
    ("promise_checked", "", "ok"),
    ("gates_evaluated", "", "ok"),
    ("auto_commit_end", "", "ok"),
    ("iteration_end", "", "continuing"),
)
_WORDS = (
    *("the", "tests", "of", "module", "pass", "again", "after", "a", "change", "in", "how", "it", "reads", "its"),
    *("file", "so", "next", "step", "is", "review", "and", "merge"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """One log on disk. Not to be appended to: loops share it."""

    path: Path
    kind: Kind
    lines: int
    size: int
    """Bytes."""
    sha256: str


class LogStore:
    """The logs of one run of the bench, each made once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._made: dict[tuple[Kind, int], Log] = {}

    def log(self, kind: Kind, lines: int) -> Log:
        """The log of this kind and length."""
        if (kind, lines) not in self._made:
            path = self._folder / f"{kind}-{lines}.jsonl"
            digest = hashlib.sha256()
            with path.open("wb") as file:
                for chunk in chunks(kind, lines, self._seed):
                    file.write(chunk)
                    digest.update(chunk)
            found = Log(path=path, kind=kind, lines=lines, size=path.stat().st_size, sha256=digest.hexdigest())
            self._made[kind, lines] = found
        return self._made[kind, lines]


def chunks(kind: Kind, lines: int, seed: int) -> Iterator[bytes]:
    """The text of a log, some thousand lines at a time."""
    chance = random.Random(f"{kind} {seed}")  # noqa: S311  # the same each time
    text = " ".join(chance.choices(_WORDS, k=400))
    payloads = [_payload(chance) for _ in range(256)] if kind == "mix" else []
    shortest, longest = LINE_BYTES
    made: list[str] = []
    for number in range(1, lines + 1):
        name, role, status = _EVENTS[number % len(_EVENTS)]
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_EPOCH + number // _EVENTS_A_SECOND))
        head = (
            f'{{"timestamp":"{moment}","event":"{name}","loop_id":"{LOOP}","run_id":"run-{number // _RUN}",'
            f'"iteration":{number // len(_EVENTS)},"role":"{role}","status":"{status}","message":"'
        )
        tail = f'","data":{{"n":{number}}}}}\n'
        # random() is several times as quick as randint(), and this runs for every line.
        length = shortest + int(chance.random() * (longest - shortest + 1)) - len(head) - len(tail)
        start = int(chance.random() * 1000)
        if payloads and chance.random() < PAYLOAD_SHARE:
            tail = f'","data":{{"n":{number},"report":{payloads[int(chance.random() * len(payloads))]}}}}}\n'
        made.append(f"{head}{text[start : start + length]}{tail}")
        if len(made) == _CHUNK:
            yield "".join(made).encode()
            made.clear()
    yield "".join(made).encode()


def _payload(chance: random.Random) -> str:
    """What a role reports: files it has changed, and what a command has printed."""
    size = chance.randint(*PAYLOAD_BYTES)
    files = [
        {"path": f"src/{chance.choice(_WORDS)}/{chance.choice(_WORDS)}.py", "added": chance.randrange(400)}
        for _ in range(size // 256)
    ]
    report = {"files": files, "output": ""}
    missing = size - len(json.dumps(report, separators=(",", ":")))
    report["output"] = " ".join(chance.choices(_WORDS, k=missing // 2))[:missing]
    return json.dumps(report, separators=(",", ":"))


def add_loop(repo: Path, loop: str, log: Log | None) -> Path:
    """Gives a repo one more loop with the documents of a run; its log's path. None: an empty log, to be appended to."""
    runtime = repo / ".superloop"
    folder = runtime / "loops" / loop
    folder.mkdir(parents=True)
    events = folder / "events.jsonl"
    if log is None:
        events.touch()
    else:
        os.link(log.path, events)
    moment = "2026-01-02T03:00:00Z"
    gates = dict.fromkeys(("tests", "validation", "prerequisites", "checklist", "evidence", "approval"), "ok")
    entry = {"run_id": "run-1", "iteration": 1, "ended_at": moment, "completion_ok": False, "gates": gates}
    _put(
        folder / "run-summary.json",
        {
            "version": 1,
            "loop_id": loop,
            "updated_at": moment,
            "entries": [{**entry, "stuck": {"streak": 0, "threshold": 3}}],
        },
    )
    _put(folder / "heartbeat.v1.json", {"timestamp": moment, "pid": 1, "stage": "role"})
    _put(folder / "approval.json", {"status": "pending", "loop_id": loop, "run_id": "run-1", "iteration": 1})
    _put(runtime / "state.json", {"active": True, "loop_index": 0, "iteration": 1, "current_loop_id": loop})
    _put(runtime / "active-run.json", {"repo": str(repo), "pid": 1, "loop_id": loop, "iteration": 1, "stage": "role"})
    return events


def _put(path: Path, document: object) -> None:
    path.write_text(json.dumps(document) + "\n")


def append(path: Path, number: int) -> None:
    """Appends one small line that bears the moment just before it was written.

    Makes the line as a program does that has nothing prepared, and opens and closes the log
    for it, as the `>>` of the runtime's shell does.
    """
    event = {
        "timestamp": "2026-01-02T04:00:00Z",
        "event": "role_end",
        "loop_id": LOOP,
        "run_id": "run-1",
        "iteration": 1,
        "role": "tester",
        "status": "ok",
        "message": _MESSAGE,
        "data": {"n": number, "at": time.monotonic_ns()},
    }
    line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
    to = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(to, line)
    finally:
        os.close(to)


_MESSAGE = " ".join(_WORDS * 2)[:160]
