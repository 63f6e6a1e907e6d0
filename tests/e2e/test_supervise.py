"""`deploy/supervise.sh`: starts the agent again, and passes on what it is told, once each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parents[2] / "deploy" / "supervise.sh"
AGENT = f"""#!{sys.executable}
# Writes down how it is called and what it is told. Ends with the code in `code`, if there is one; else it drains
# at the first TERM for as long as there is `busy`, and ends at once at the second.
import os, signal, sys, time
from pathlib import Path

here, told = Path(__file__).parent, []

def tell(what):
    with (here / "log").open("a") as log:
        print(os.getpid(), what, file=log, flush=True)

def on_term(number, frame):
    told.append(number)
    tell("TERM")

signal.signal(signal.SIGTERM, on_term)
signal.signal(signal.SIGINT, lambda *_: tell("INT"))
signal.signal(signal.SIGHUP, lambda *_: tell("HUP"))
tell("called with " + " ".join(sys.argv[1:]))
if (here / "code").exists():
    sys.exit(int((here / "code").read_text()))
while not told or (len(told) == 1 and (here / "busy").exists()):
    time.sleep(0.01)
sys.exit(7 if len(told) > 1 else 0)
"""


class Script:
    """The script, in a session of its own as of a terminal. Lives until its test ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        agent = folder / "agent"
        agent.write_text(AGENT)
        agent.chmod(0o755)
        self._log = (folder / "said").open("w+")

    def start(self, *words: str) -> None:
        """Starts it with these words."""
        self.process = subprocess.Popen(
            ["sh", SCRIPT, *words],
            env={**os.environ, "SPRITE_AGENT": str(self.folder / "agent")},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def heard(self, what: str) -> list[int]:
        """The agents, by their process, that have written this."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [int(pid) for pid, _, text in (line.partition(" ") for line in lines) if text == what]

    def agent(self) -> int:
        """The first one, once it is there."""
        return until(lambda: self.heard("called with serve --x"), "an agent")[0]

    def end(self) -> None:
        """Ends it at once, and all of its agents."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        for pid in self.heard("called with serve --x"):
            if Path(f"/proc/{pid}").exists() and str(self.folder) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        self._log.close()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """The script, not started yet."""
    script = Script(tmp_path)
    yield script
    script.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_passes_an_end_on_once_and_ends_with_the_agent(script: Script, number: signal.Signals) -> None:
    (script.folder / "busy").touch()
    script.start("serve", "--x")
    agent = script.agent()
    script.process.send_signal(number)
    until(lambda: script.heard("TERM"), "it is told to drain")
    assert script.process.poll() is None, "it waits for the drain"

    (script.folder / "busy").unlink()

    assert script.process.wait(DEADLINE) == 0
    assert script.heard("TERM") == [agent]


def test_a_second_end_is_passed_on_too_and_the_agents_code_is_its_own(script: Script) -> None:
    (script.folder / "busy").touch()
    script.start("serve", "--x")
    agent = script.agent()
    script.process.terminate()
    until(lambda: script.heard("TERM"), "it is told to drain")

    script.process.terminate()

    assert script.process.wait(DEADLINE) == 7
    assert script.heard("TERM") == [agent, agent]


def test_ctrl_c_of_its_terminal_reaches_the_agent_once(script: Script) -> None:
    script.start("serve", "--x")
    agent = script.agent()

    os.killpg(script.process.pid, signal.SIGINT)

    assert script.process.wait(DEADLINE) == 0
    assert (script.heard("TERM"), script.heard("INT")) == ([agent], [])


def test_a_hang_up_is_passed_on_and_ends_nothing(script: Script) -> None:
    script.start("serve", "--x")
    agent = script.agent()
    script.process.send_signal(signal.SIGHUP)
    until(lambda: script.heard("HUP"), "it is told")
    script.process.send_signal(signal.SIGHUP)

    until(lambda: script.heard("HUP") == [agent, agent], "it is told again, by a script that goes on")
    script.process.terminate()

    assert script.process.wait(DEADLINE) == 0


def test_an_agent_that_ends_by_itself_is_started_again(script: Script) -> None:
    (script.folder / "code").write_text("3")
    script.start("serve", "--x")
    script.agent()
    (script.folder / "code").unlink()

    until(lambda: len(set(script.heard("called with serve --x"))) == 2, "another one")
    assert "sprite-agent ended with 3; starting it again in 1 s" in (script.folder / "said").read_text()
    script.process.terminate()

    assert script.process.wait(DEADLINE) == 0


def test_an_agent_that_was_called_wrongly_is_not_started_again(script: Script) -> None:
    (script.folder / "code").write_text("64")
    script.start("serve", "--x")

    assert script.process.wait(DEADLINE) == 64
    assert len(script.heard("called with serve --x")) == 1
