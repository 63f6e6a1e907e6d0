"""One Superloop repo, as both the agent and a local manager use it: snapshots, events, control."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from sprite_agent.artifacts import ArtifactFiles, loop_paths
from sprite_agent.callers import THIS_USER
from sprite_agent.contract.loop_ids import check_loop_id
from sprite_agent.contract.requests import MAX_CONTROL_DEADLINE, check_request
from sprite_agent.contract.streaming import check_query, check_texts
from sprite_agent.control.attribution import find_unattributed
from sprite_agent.control.command import Runtime
from sprite_agent.control.engine import ControlEngine
from sprite_agent.control.executions import Executions
from sprite_agent.control.state_folder import StateFolder
from sprite_agent.errors import JournalCorrupt, JournalUnavailable
from sprite_agent.event_log.folder_watch import FolderWatch
from sprite_agent.event_log.log import EventLog
from sprite_agent.event_log.stream import StreamEnd, stream_events
from sprite_agent.event_log.tail import Tails
from sprite_agent.event_log.workers import Workers
from sprite_agent.snapshot import build_snapshot, read_artifacts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path
    from typing import Any

    from sprite_agent.callers import Caller, Proof
    from sprite_agent.contract.agent_state import Finding, JournalHead
    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.contract.streaming import EventBatch, EventQuery
    from sprite_agent.control.command import User
    from sprite_agent.errors import OpsError
    from sprite_agent.snapshot import LoopReading


_HEAD_AGE = 1.0
"""Seconds."""


async def _nothing() -> None:
    """What most do before they wait."""


class Repo:
    """Everything that can be asked of a repo. Lives as long as its process; close it at the end.

    Any thread may call, but streams belong to one event loop.
    """

    def __init__(
        self,
        path: Path,
        *,
        state_folder: Path,
        runtime: str | None,
        runtime_sha256: str | None = None,
        user: User | None = None,
        max_stream_age: float = math.inf,
        patience: float = math.inf,
        executors_ahead: bool = False,
    ) -> None:
        """Makes one; nothing is written before control is asked for.

        Args:
            path: the repo.
            state_folder: where the journal and the locks are; not inside the repo.
            runtime: path of the runtime's command, where one is configured.
            runtime_sha256: digest that file must have; None: any.
            user: whom the command runs as; None: the user of this process.
            max_stream_age: seconds after which a stream ends, to be resumed.
            patience: seconds after which a snapshot gives up while the log is still being read.
            executors_ahead: whether to keep a process waiting for the next command, once `recover` is through.

        Raises:
            ValueError: there is no folder at `path`, or none that can be looked at; its name is not UTF-8; or the state
                folder is inside it.
        """
        if not os.path.isdir(path):  # noqa: PTH112  # Path.is_dir() raises where it may not look
            raise ValueError(f"no folder at {path}, or none that this user may look at")
        self.path = path.resolve()
        try:
            str(self.path).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the path of the repo, {str(self.path)!a}, is not UTF-8") from error
        self.folder = StateFolder(state_folder, self.path)
        self.runs_as_own_user = user is not None
        self._files = ArtifactFiles(self.path)
        self._folders = FolderWatch()
        self._workers = Workers()
        self._tails = Tails(str(self.path), self._folders, self._workers)
        self._stream_end = StreamEnd(max_stream_age)
        self._engine = ControlEngine(
            files=self._files,
            folder=self.folder,
            runtime=Runtime(path=runtime, sha256=runtime_sha256, user=user),
            executions=Executions(self.folder.executions, user=user, ahead=executors_ahead),
            read_loop=self.read_loop,
            log_of=self._log,
        )
        # Guards additions to the table of logs; nothing is done under it but that.
        self._lock = threading.Lock()
        self._logs: dict[str, EventLog] = {}
        self._patience = patience
        self._is_closed = False
        self._recent_head: tuple[float, asyncio.Future[JournalHead | None] | None] = (-math.inf, None)

    def close(self) -> None:
        """Ends watching, calls that read a log, and the executor that waits, and closes the journal.

        Streams must have ended.
        """
        self._is_closed = True
        self._folders.close()
        self._workers.close()
        self._engine.close()

    def loops(self) -> list[str]:
        """Ids of the loops that have an artifact folder, sorted."""
        return self._files.loops()

    def read_loop(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> LoopReading:
        """A snapshot of a loop, and the resume token it is consistent with.

        Raises:
            LoopIdInvalid, LoopNotFound, EventsNotFound, ArtifactNotRegular
            EventMalformed: the last complete record of the log is no JSON object.
            ArtifactMalformed: an artifact can't be read as what it should be.
            Starting: the log is still being read.
        """
        check_texts(trace_id=trace_id, run_id=run_id)
        found = read_artifacts(self._files, loop_paths(loop_id), self._log(loop_id).refresh())
        reading = build_snapshot(found, repo=str(self.path), loop_id=loop_id, trace_id=trace_id, run_id=run_id)
        return replace(reading, findings=self._findings(loop_id, found.approval.value))

    def stream_events(
        self, query: EventQuery, *, raw: bool = False, before_waiting: Callable[[], Awaitable[None]] = _nothing
    ) -> AsyncGenerator[EventBatch]:
        """The batches of one subscription; see `event_log.stream.stream_events`.

        Raises:
            LoopIdInvalid, CursorInvalid, ResumeTokenInvalid, RequestInvalid, LoopNotFound, ArtifactNotRegular
        """
        check_query(query)
        return stream_events(
            self._log(query.loop_id),
            query,
            raw=raw,
            before_waiting=before_waiting,
            repo=self.path,
            workers=self._workers,
            tails=self._tails,
            end=self._stream_end,
        )

    def end_streams(self) -> None:
        """Ends every stream, now and from now on, each with a last batch that says where to resume."""
        self._stream_end.requested = True
        self._tails.wake_all()

    def recover(self) -> None:
        """Finishes what an earlier process left unfinished; nothing is run again.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        self._engine.recover()

    def control_fault(self) -> OpsError | None:
        """Why control can't be served at the moment; None: it can."""
        return self._engine.fault()

    def journal_head(self) -> JournalHead | None:
        """How far the journal has got; None: there is none yet, or it can't be read."""
        with contextlib.suppress(JournalCorrupt, JournalUnavailable):
            if self.folder.has_journal():
                return self._engine.journal.head()
        return None

    async def recent_journal_head(self) -> JournalHead | None:
        """The same as known a second ago at most: for those who ask with every batch, however many they are."""
        taken, looking = self._recent_head
        if looking is None or time.monotonic() - taken > _HEAD_AGE:
            looking = asyncio.ensure_future(asyncio.to_thread(self.journal_head))
            self._recent_head = time.monotonic(), looking
        return looking.result() if looking.done() else await asyncio.shield(looking)

    def note_refusal(self, facts: dict[str, Any]) -> None:
        """Notes in the audit that a call was refused before it came here; not each one, if there are very many."""
        self._engine.note_refusal(facts)

    def use_up(self, proof: Proof) -> None:
        """Remembers the signature of a control that was refused, as far as the journal can be written."""
        self._engine.use_up(proof)

    def nonces(self) -> list[tuple[str, str, float]]:
        """(key id, nonce, Unix time until which it counts) of the signatures that controls came with.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        return self._engine.journal.nonces()

    def execute(
        self, document: dict[str, Any], *, caller: Caller = THIS_USER, deadline: float | None = None
    ) -> ControlResult:
        """Runs a control request, at most once for its key; see `control.ControlEngine.execute`."""
        until = time.monotonic() + MAX_CONTROL_DEADLINE if deadline is None else deadline
        return self._engine.execute(check_request(document), caller=caller, deadline=until)

    def get_control(self, loop_id: str, key: str) -> ControlResult:
        """What has become of an idempotency key; see `control.ControlEngine.result`.

        Raises:
            LoopIdInvalid: the loop id can't be one.
        """
        check_loop_id(loop_id)
        check_texts(idempotency_key=key)
        return self._engine.result(loop_id, key)

    def _findings(self, loop_id: str, approval: Any) -> tuple[Finding, ...]:
        """What an operator should look into; without a journal nobody can tell whose a decision is."""
        with contextlib.suppress(JournalCorrupt, JournalUnavailable):
            if self.folder.has_journal():
                found = find_unattributed(loop_id, approval, self._engine.journal.find_execution)
                return () if found is None else (found,)
        return ()

    def _log(self, loop_id: str) -> EventLog:
        """The log of a loop, which says for itself when it is gone again.

        Raises:
            LoopIdInvalid, LoopNotFound, ArtifactNotRegular
        """
        if (known := self._logs.get(loop_id)) is not None:
            return known
        if not self._files.seems_to_have(loop_id):  # else anybody could fill the table with names
            self._files.require_loop(loop_id)
        with self._lock:
            log = EventLog(self._files, loop_id, patience=self._patience, is_over=lambda: self._is_closed)
            return self._logs.setdefault(loop_id, log)
