"""A fleet: agents in processes of their own, loops whose logs grow, and the daemon that supervises them all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from conftest import TOKEN, AgentProgram

from opsmgr.store import LoopStore
from sprite_agent.contract import clock
from sprite_agent.face.config import TOKEN_VARIABLE
from support.observed_manager import NOTE
from support.repos import STANDIN, event, line, put
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from support.repos import Json

TESTS = Path(__file__).parents[1]
_MOST = 3
"""Events that are written to a loop in one go."""


class Loop:
    """One loop's log, and the manager's files of it."""

    def __init__(self, agent: str, loop_id: str, log: Path, store: LoopStore) -> None:
        self.name = f"{agent}.{loop_id}"
        self.loop_id = loop_id
        self.store = store
        self.lines = 0
        """Written so far."""
        self._log = log.open("ab", buffering=0)

    def write(self, count: int, chance: random.Random) -> None:
        """Adds so many events, each in two writes."""
        for _ in range(count):
            self.lines += 1
            text = line(event("role_end", loop_id=self.loop_id, timestamp=clock.now(), data={"n": self.lines}))
            cut = chance.randrange(len(text))
            self._log.write(text[:cut])
            self._log.write(text[cut:])

    def close(self) -> None:
        """Ends the writing."""
        self._log.close()

    def is_covered(self) -> bool:
        """Whether the manager's state and cursor cover the whole log."""
        state, cursor = _read(self.store.state), _read(self.store.cursor)
        if state is None or cursor is None:
            return False
        covered = state["cursor"]["eventLineOffset"], cursor["eventLineOffset"]
        return covered == (self.lines, self.lines)

    def passes(self) -> list[Json]:
        """Telemetry of every pass."""
        return _read_lines(self.store.reconcile_telemetry)

    def handled(self) -> list[int]:
        """The numbers of the events that passes have handled, in their order; from 1 on as they were written."""
        return [int(number) for number in (self.store.folder / NOTE).read_text().split()]

    def escalations(self) -> list[str]:
        """What was escalated."""
        return [record["category"] for record in _read_lines(self.store.escalations)]


class FleetAgent:
    """One agent on a repo with many loops, the first of which runs. Can be started again and again."""

    def __init__(self, folder: Path, *, loops: int) -> None:
        self.name = folder.name
        self.address = f"unix:{folder}/agent.sock"
        self._folder = folder
        self._starts = 0
        runtime = folder / "repo" / ".superloop"
        self.loops = [self._made(runtime, f"loop-{number:02}") for number in range(loops)]
        put(runtime / "state.json", {"active": True, "current_loop_id": "loop-00", "iteration": 1})

    def _made(self, runtime: Path, loop_id: str) -> Loop:
        folder = runtime / "loops" / loop_id
        folder.mkdir(parents=True)
        return Loop(self.name, loop_id, folder / "events.jsonl", LoopStore(self._folder / "manager" / loop_id))

    def start(self, *options: str) -> None:
        """Starts it; it may take its time to serve."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "XDG_STATE_HOME": str(self._folder / "states"),
            TOKEN_VARIABLE: TOKEN,
        }
        place = ("--repo", str(self._folder / "repo"), "--listen", self.address)
        words = (*place, "--state-dir", str(self._folder / "state"), "--superloop-bin", str(STANDIN))
        self._starts += 1
        log = self._folder / f"agent-{self._starts}.log"
        self.program = AgentProgram(log, (*words, "--log-level", "warning", *options), environment)

    def kill(self) -> None:
        """Kills it at once."""
        self.program.end()

    def drain(self) -> None:
        """Has it end in good order."""
        self.program.process.terminate()
        assert self.program.exit_code() == 0, self.program.text

    def freeze(self) -> None:
        """Has it do nothing, and keep its connections."""
        self.program.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Has it go on."""
        self.program.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Ends everything."""
        self.program.end()
        for loop in self.loops:
            loop.close()


class Writer:
    """Writes to loops from a thread, so many rounds with a pause after each. Lives as long as its `with`."""

    def __init__(self, loops: Sequence[Loop], *, rounds: int, pause: float, seed: int = 1) -> None:
        self._loops = loops
        self._rounds = rounds
        self._pause = pause
        self._chance = random.Random(seed)  # noqa: S311  # the same each time
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def has_ended(self, *, within: float) -> bool:
        """Whether it has written everything; waits for that, `within` seconds."""
        self._thread.join(within)
        return not self._thread.is_alive()

    def _write(self) -> None:
        for _ in range(self._rounds):
            for loop in self._chance.sample(self._loops, len(self._loops) // 2):
                loop.write(self._chance.randint(1, _MOST), self._chance)
            if self._stop.wait(self._pause):
                return


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a process has used so far."""

    peak_mib: float
    cpu_seconds: float


class Daemon:
    """One `opsmgr run` for a fleet, which is observed. Lives until it is ended."""

    def __init__(self, folder: Path, agents: Sequence[FleetAgent], **settings: float) -> None:
        self._status_file = folder / "status.json"
        self._log = folder / "opsmgr.log"
        config = folder / "opsmgr.toml"
        config.write_text(_config(folder, agents, self._status_file, settings))
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(TESTS)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "support.observed_manager", "run", "--config", config, "--log-level", "warning"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def rows(self) -> dict[str, Json]:
        """The targets in its status file, by name; none before there is one."""
        document = _read(self._status_file)
        return {} if document is None else {row["name"]: row for row in document["targets"]}

    def usage(self) -> Usage:
        """What it has used."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        peak = next(words.split()[1] for words in status.splitlines() if words.startswith("VmHWM"))
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        ticks = os.sysconf("SC_CLK_TCK")
        return Usage(peak_mib=int(peak) / 1024, cpu_seconds=sum(map(int, times)) / ticks)

    def drain(self) -> int:
        """Has it end in good order; its exit code."""
        self.process.terminate()
        return self.process.wait(DEADLINE)

    def end(self) -> None:
        """Ends it at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)


@contextlib.contextmanager
def serving(agents: Sequence[FleetAgent]) -> Iterator[None]:
    """All of them serve inside the block, unless something befalls them, and end with it."""
    with contextlib.ExitStack() as stack:
        for agent in agents:
            agent.start()
            stack.callback(agent.end)
        for agent in agents:
            socket = Path(agent.address.removeprefix("unix:"))
            until(socket.is_socket, f"{agent.name} serves", deadline=60.0)
        yield


def _config(folder: Path, agents: Sequence[FleetAgent], status_file: Path, settings: dict[str, float]) -> str:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    tables: list[tuple[str, Json]] = [
        ("[fleet]", {"status_file": str(status_file), **settings}),
        ("[defaults]", {"transport": "sprite_service", "token_file": str(token), "state_command": ["echo", "running"]}),
    ]
    for agent in agents:
        for loop in agent.loops:
            way = {"address": agent.address, "state_folder": str(loop.store.folder)}
            tables.append(("[[targets]]", {"name": loop.name, "loop": loop.loop_id, **way}))
    # A value of JSON is one of TOML here: texts, numbers, and a list of texts.
    return "\n".join(
        line for head, table in tables for line in (head, *(f"{key} = {json.dumps(table[key])}" for key in table))
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _read_lines(path: Path) -> list[Json]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
