"""The local transport: the agent's core in this process, for a repo on this machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from opsmgr.errors import InputInvalid
from opsmgr.transport.base import AgentInfo, Attempts, Snapshot
from sprite_agent import __version__
from sprite_agent.control.state_folder import default_path
from sprite_agent.repo import Repo

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from opsmgr.transport.base import TransportName
    from sprite_agent.contract.agent_state import JournalHead
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from sprite_agent.contract.streaming import EventBatch, EventQuery


class LocalTransport:
    """See `base.Transport`. Control uses the same journal as an agent that serves the repo from this machine."""

    name: TransportName = "local"

    def __init__(self, repo: Path, *, runtime: str | None = None, state_folder: Path | None = None) -> None:
        """Opens a repo.

        Raises:
            InputInvalid: there is none at `repo`, or the state folder is inside it.
        """
        try:
            self._repo = Repo(repo, state_folder=state_folder or default_path(repo), runtime=runtime)
        except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: links that lead to themselves
            raise InputInvalid(str(error)) from error
        self.attempts = Attempts()
        self.journal: JournalHead | None = None

    async def info(self) -> AgentInfo:
        """See `base.Transport`."""
        self.journal = await asyncio.to_thread(self._repo.journal_head)
        loops = await asyncio.to_thread(self._repo.loops)
        return AgentInfo(agent_version=__version__, repo_path=str(self._repo.path), loops=loops)

    async def snapshot(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> Snapshot:
        """See `base.Transport`."""
        reading = await asyncio.to_thread(self._repo.read_loop, loop_id, trace_id=trace_id, run_id=run_id)
        self.journal = await asyncio.to_thread(self._repo.journal_head)
        return Snapshot(envelope=reading.snapshot, resume_token=reading.resume_token, findings=list(reading.findings))

    def events(self, query: EventQuery) -> AsyncGenerator[EventBatch]:
        """See `base.Transport`."""
        return self._repo.stream_events(query)

    async def execute(self, request: ControlRequest) -> ControlResult:
        """See `base.Transport`."""
        result = await asyncio.to_thread(self._repo.execute, dict(request))
        self.journal = await asyncio.to_thread(self._repo.journal_head)
        return result

    async def get_control(self, loop_id: str, key: str) -> ControlResult:
        """See `base.Transport`."""
        return await asyncio.to_thread(self._repo.get_control, loop_id, key)

    async def close(self) -> None:
        """See `base.Transport`."""
        self._repo.close()
