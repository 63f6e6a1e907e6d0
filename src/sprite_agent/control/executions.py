"""Executions: commands run by an executor process that outlives the agent, and what they leave behind.

Each has a folder of its own in the state folder, from which its outcome can be told
whoever was killed meanwhile; see `executor.py` for the files in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sprite_agent.control import executor, failpoints
from sprite_agent.control.command import build_environment
from sprite_agent.control.executors import Executors
from sprite_agent.control.processes import is_alive, name_from_stat, pid_of
from sprite_agent.errors import InternalError, NotExecuted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from sprite_agent.control.command import User
    from sprite_agent.control.executors import ExecutorProcess

COMMAND_TIMEOUT = 30.0
"""Seconds a command may run; a cancel takes up to about 12."""
MAX_OUTPUT_BYTES = 8 * 1024

_RECORDING = 5.0
"""Seconds an executor may take beyond its command's time, to start and to record."""
_POLL = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandOutcome:
    """How a command ended."""

    exit_code: int | None
    """Negative: ended by that signal; None: it could not be started."""
    timed_out: bool
    output: str
    """The end of what it printed, both streams."""


class Executions:
    """The executions of one repo. Lives as long as its engine; any thread may call."""

    def __init__(
        self, folder: Path, *, user: User | None = None, timeout: float = COMMAND_TIMEOUT, ahead: bool = False
    ) -> None:
        """Makes nothing yet.

        Args:
            folder: where their folders are.
            user: whom the commands run as.
            timeout: seconds after which a command's process group is killed.
            ahead: whether to keep an executor waiting for the next command; `close` ends it.
        """
        self._folder = folder
        self._user = user
        self._timeout = timeout
        self._executors = Executors(folder, changes_user=user is not None, ahead=ahead)

    def close(self) -> None:
        """Ends the executor that waits, if one does."""
        self._executors.close()

    def prepare(self) -> None:
        """Has an executor wait for the first command, if that is to be done ahead."""
        self._executors.prepare()

    @contextlib.contextmanager
    def ready(self, execution_id: str, command: list[str], lane: int) -> Iterator[Execution]:
        """An executor that has the command for the block, and runs it if it is told to: once the row is committed.

        Args:
            execution_id: names its folder.
            command: the argument vector.
            lane: descriptor of the lock that executor and command go on holding if this process is killed. A
                command that was run to its end leaves it free after the block.

        Raises:
            NotExecuted: it can't be started, and nothing was run.
        """
        try:
            execution = self._hand_over(execution_id, command, lane)
            try:
                yield execution
            finally:
                if execution.was_released:
                    # Not before the outcome is recorded: while its agent lives it leaves the lane to it.
                    self._executors.later(execution.process.end)
                else:
                    execution.process.end(kill=True)
                    self.forget(execution_id)
        finally:
            self._executors.prepare()

    def run(self, execution: Execution) -> CommandOutcome | None:
        """Has the command run to its end; None: its executor was killed, and how it ended is not known.

        Raises:
            NotExecuted: it was not run, and won't be.
        """
        try:
            execution.release()
        except OSError as error:
            raise NotExecuted(f"the command could not be started: {error.strerror}", retry_after=1.0) from error
        failpoints.hit("released")
        return self._outcome_of(execution)

    def outcome(self, execution_id: str) -> CommandOutcome | None:
        """How a command ended, as its executor has recorded; None: it has not.

        Raises:
            InternalError: that can't be told at the moment.
        """
        text = self._left(execution_id, executor.RESULT)
        try:
            found = json.loads(text or b"")
        except ValueError:
            return None  # what is damaged is not known
        return CommandOutcome(exit_code=found["exitCode"], timed_out=found["timedOut"], output=found["output"])

    def was_started(self, execution_id: str) -> bool:
        """Whether the command was started, or may have been: on this boot of the machine the mark tells."""
        return (self._folder / execution_id / executor.STARTED).exists()

    def end_orphan(self, execution_id: str, *, within: float) -> None:
        """Ends a command whose executor is gone: after `within` seconds its process group is killed, if it still lives.

        Raises:
            InternalError: which process it is can't be told at the moment.
        """
        name = name_from_stat(self._left(execution_id, executor.PROCESS) or b"")
        until = time.monotonic() + within
        while name is not None and is_alive(name):
            if time.monotonic() >= until:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid_of(name), signal.SIGKILL)
            time.sleep(_POLL)

    def forget(self, execution_id: str) -> None:
        """Removes what an execution has left, now or soon; its outcome is in the journal."""
        self._executors.later(lambda: shutil.rmtree(self._folder / execution_id, ignore_errors=True))

    def forget_all_but(self, kept: Iterable[str]) -> None:
        """Removes what executions have left that nobody asks for any more."""
        keeping = set(kept)
        with contextlib.suppress(OSError):  # there is none yet; or it takes its room until the next start
            for left in {entry.name for entry in self._folder.iterdir()} - keeping:
                self.forget(left)

    def _left(self, execution_id: str, name: str) -> bytes | None:
        """What an execution has left in a file; None: nothing. A file that can't be opened now may say all later."""
        try:
            return (self._folder / execution_id / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InternalError(
                f"what execution {execution_id} has left can't be read: {error.strerror}; ask with the same key"
            ) from error

    def _hand_over(self, execution_id: str, command: list[str], lane: int) -> Execution:
        """An executor that was given the command, and waits at its gate."""
        place = self._folder / execution_id
        plan = {
            "execution": execution_id,
            "command": command,
            "environment": build_environment(self._user),
            "timeoutSeconds": self._timeout,
            "outputBytes": MAX_OUTPUT_BYTES,
            "user": asdict(self._user) if self._user else None,
            "umask": 0o022,
        }
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            place.mkdir(mode=0o700)
            try:
                failpoints.hit("prepared")
                process = self._executors.hand_over(plan, lane)
            except OSError:
                self.forget(execution_id)
                raise
        except OSError as error:
            raise NotExecuted(f"the command could not be started: {error.strerror}", retry_after=1.0) from error
        failpoints.hit("spawned")
        return Execution(execution_id, process)

    def _outcome_of(self, execution: Execution) -> CommandOutcome | None:
        """How the command of a working executor ended, once it has; see `run`."""
        until = time.monotonic() + self._timeout
        process, execution_id = execution.process, execution.id
        if not process.is_done(self._timeout + _RECORDING):
            process.end(kill=True)  # it is stuck: its command is ended below
        outcome = self.outcome(execution_id)
        if outcome is not None:
            return outcome
        exit_code = process.end()
        # A folder that is gone tells nothing: only an executor that says so, or one without its mark, ran nothing.
        unmarked = (self._folder / execution_id).is_dir() and not self.was_started(execution_id)
        if exit_code == executor.NEVER_RUN or unmarked:
            raise NotExecuted("the command's executor ended before it began; try again", retry_after=1.0)
        self.end_orphan(execution_id, within=until - time.monotonic())
        return None


class Execution:
    """A command that an executor has, and runs once it is released. Belongs to one thread."""

    def __init__(self, execution_id: str, process: ExecutorProcess) -> None:
        self.id = execution_id
        self.process = process
        self.was_released = False
        """Whether it was tried: then what it has left behind tells what it did."""

    def release(self) -> None:
        """Has it run.

        Raises:
            OSError: the executor has ended, and has run nothing.
        """
        self.was_released = True
        try:
            self.process.open_gate()
        except OSError:
            self.process.end(kill=True)
            raise
