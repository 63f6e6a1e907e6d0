"""One Superloop repo, as both the agent and a local manager use it: snapshots, events, control."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import TYPE_CHECKING

from sprite_agent.artifacts import ArtifactFiles
from sprite_agent.contract.requests import MAX_CONTROL_DEADLINE, check_request
from sprite_agent.contract.streaming import check_query
from sprite_agent.control import ControlEngine
from sprite_agent.event_log import EventLog
from sprite_agent.event_stream import StreamEnd, stream_events
from sprite_agent.folder_watch import FolderWatch
from sprite_agent.snapshot import build_snapshot, read_artifacts
from sprite_agent.state_folder import StateFolder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path
    from typing import Any

    from sprite_agent.contract.envelopes import ControlResult
    from sprite_agent.contract.streaming import EventBatch, EventQuery
    from sprite_agent.snapshot import LoopReading


class Repo:
    """Everything that can be asked of a repo. Lives as long as its process; close it at the end.

    Any thread may call, but streams belong to one event loop.
    """

    def __init__(
        self, path: Path, *, state_folder: Path, runtime: str | None, max_stream_age: float = math.inf
    ) -> None:
        """Makes one; nothing is written before control is asked for.

        Args:
            path: the repo.
            state_folder: where the journal and the locks are; not inside the repo.
            runtime: path of the runtime's command, where one is configured.
            max_stream_age: seconds after which a stream ends, to be resumed.

        Raises:
            ValueError: there is no folder at `path`, or the state folder is inside it.
        """
        if not path.is_dir():
            raise ValueError(f"no folder at {path}")
        self.path = path.resolve()
        self.folder = StateFolder(state_folder, self.path)
        self._files = ArtifactFiles(self.path)
        self._folders = FolderWatch()
        self._stream_end = StreamEnd(max_stream_age)
        self._engine = ControlEngine(files=self._files, folder=self.folder, runtime=runtime, read_loop=self.read_loop)
        # Guards the table of logs; nothing is done under it but looking up.
        self._lock = threading.Lock()
        self._logs: dict[str, EventLog] = {}

    def close(self) -> None:
        """Ends watching and closes the journal. Streams must have ended."""
        self._folders.close()
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
        """
        paths = self._files.require_loop(loop_id)
        found = read_artifacts(self._files, paths, self._log(loop_id).refresh())
        return build_snapshot(found, repo=str(self.path), loop_id=loop_id, trace_id=trace_id, run_id=run_id)

    async def stream_events(self, query: EventQuery) -> AsyncGenerator[EventBatch]:
        """The batches of one subscription; see `event_stream.stream_events` for its promises."""
        check_query(query)
        self._files.require_loop(query.loop_id)
        log = self._log(query.loop_id)
        batches = stream_events(log, query, repo=self.path, folders=self._folders, end=self._stream_end)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                yield batch

    def end_streams(self) -> None:
        """Ends every stream, now and from now on, each with a last batch that says where to resume."""
        self._stream_end.requested = True
        self._folders.wake_all()

    def recover(self) -> None:
        """Finishes what an earlier process left unfinished; nothing is run again."""
        self._engine.recover()

    def execute(self, document: dict[str, Any], *, deadline: float | None = None) -> ControlResult:
        """Runs a control request, at most once for its key; see `control.ControlEngine.execute`."""
        until = time.monotonic() + MAX_CONTROL_DEADLINE if deadline is None else deadline
        return self._engine.execute(check_request(document), deadline=until)

    def get_control(self, loop_id: str, key: str) -> ControlResult:
        """What has become of an idempotency key; see `control.ControlEngine.result`."""
        return self._engine.result(loop_id, key)

    def _log(self, loop_id: str) -> EventLog:
        with self._lock:
            if loop_id not in self._logs:
                self._logs[loop_id] = EventLog(self._files, loop_id)
            return self._logs[loop_id]
