"""What tests of both programs stand on: a repo with a loop, an agent that serves it, and both transports to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.config import CONFIG_VARIABLE
from opsmgr.transport.local import LocalTransport
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.event_log.pieces import Pace
from sprite_agent.face.config import RUNTIME_VARIABLE, TOKEN_VARIABLE, ServeConfig
from sprite_agent.face.server import running
from support.figures import all_found, found
from support.repos import STANDIN, LoopFiles
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from opsmgr.transport.base import Transport

TOKEN = "token-of-the-tests"  # noqa: S105  # of no use elsewhere
QUICK = RetryPolicy(attempts=4, budget=5.0, base=0.01, cap=0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agent:
    """An agent that runs in this process, and what a client needs to reach it."""

    address: str
    token: str
    config: ServeConfig

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call must carry."""
        return (("authorization", f"Bearer {self.token}"),)


class AgentProgram:
    """One `sprite-agent serve` in a process of its own. Lives until it ends, or its test does."""

    def __init__(self, log: Path, words: tuple[str, ...], environment: dict[str, str]) -> None:
        self._log = log
        program = Path(sys.executable).with_name("sprite-agent")
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [program, "serve", *words], env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )

    @property
    def text(self) -> str:
        """Everything it has printed so far."""
        return self._log.read_text()

    def said(self, value: str, *, by: str = "event") -> list[dict[str, Any]]:
        """Its log lines so far that have `value` for their event, or for another key."""
        complete = self.text.rpartition("\n")[0].splitlines()
        records = [json.loads(line) for line in complete if line.startswith("{")]
        return [record for record in records if record[by] == value]

    def address(self) -> str:
        """Where it listens, once it serves."""
        return str(until(lambda: self.said("serving"), f"the agent serves; it said: {self.text}")[0]["address"])

    def exit_code(self) -> int:
        """How it ended, once it has."""
        return self.process.wait(DEADLINE)

    def end(self) -> None:
        """Ends it at once, frozen or not."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Has a worker's figures told by the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = all_found()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes in the figures of a worker that has ended."""
    for note in getattr(node, "workeroutput", {}).get("figures", ()):
        found(*note.split(": ", 1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the figures that the fault tests have reached."""
    if notes := all_found():
        terminalreporter.section("figures")
        for note in notes:
            terminalreporter.write_line(note)


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The programs of the tests leave nothing in anybody's home, and have nothing of what the README exports."""
    # What is run in the background may ignore it, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name in (TOKEN_VARIABLE, RUNTIME_VARIABLE, CONFIG_VARIABLE):
            patch.delenv(name, raising=False)
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("states")))
        yield


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not stand still: no piece of work is over, and no batch made, before there is no more."""
    monkeypatch.setattr(Pace, "over", lambda _: False)


@pytest.fixture
def repo(tmp_path: Path) -> LoopFiles:
    """A repo with one loop, whose log is empty."""
    return LoopFiles(tmp_path / "repo")


@pytest.fixture
def config(repo: LoopFiles, tmp_path: Path) -> ServeConfig:
    """How the agent serves the repo: on a Unix socket, with a token, and the stand-in as its runtime."""
    return ServeConfig(
        repo=repo.repo,
        listen=f"unix:{tmp_path}/agent.sock",
        state_folder=tmp_path / "state",
        runtime=str(STANDIN),
        token=TOKEN,
        sprite_id="sprite-1",
    )


@pytest.fixture
async def agent(config: ServeConfig) -> AsyncIterator[Agent]:
    """A real server on the repo."""
    async with running(config) as address:
        yield Agent(address=address, token=TOKEN, config=config)


@pytest.fixture
async def local(config: ServeConfig) -> AsyncIterator[LocalTransport]:
    """The local transport to the repo, over the agent's own journal."""
    transport = LocalTransport(config.repo, runtime=config.runtime, state_folder=config.state_folder)
    yield transport
    await transport.close()


@pytest.fixture
async def remote(agent: Agent) -> AsyncIterator[SpriteServiceTransport]:
    """The transport to the agent."""
    transport = SpriteServiceTransport(agent.address, token=agent.token, policy=QUICK)
    yield transport
    await transport.close()


@pytest.fixture(params=["local", "sprite_service"])
def transport(request: pytest.FixtureRequest, local: LocalTransport, remote: SpriteServiceTransport) -> Transport:
    """Each of the two transports to the same repo."""
    return local if request.param == "local" else remote


@pytest.fixture
def start_agent(repo: LoopFiles, tmp_path: Path) -> Iterator[Callable[..., AgentProgram]]:
    """Starts agents on the repo as processes: options as words, settings of the environment by keyword."""
    started: list[AgentProgram] = []

    def start(*words: str, **settings: str) -> AgentProgram:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "XDG_STATE_HOME": str(tmp_path / "states"),
            TOKEN_VARIABLE: TOKEN,
            **settings,
        }
        options = ("--repo", str(repo.repo), "--superloop-bin", str(STANDIN))
        program = AgentProgram(tmp_path / f"agent-{len(started)}.log", (*options, *words), environment)
        started.append(program)
        return program

    yield start
    for program in started:
        program.end()
