"""The interface of a transport, and what it gives back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sprite_agent.contract.agent_state import Finding, JournalHead
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult, SnapshotEnvelope
    from sprite_agent.contract.streaming import EventBatch, EventQuery

TransportName = Literal["local", "sprite_service"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentInfo:
    """Who answers."""

    agent_version: str
    repo_path: str
    loops: list[str]
    sprite_id: str | None = None
    instance_id: str | None = None
    """Changes when the agent was restarted; None: there is no agent, the core runs here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A snapshot envelope, and the resume token it is consistent with."""

    envelope: SnapshotEnvelope
    resume_token: str
    findings: list[Finding] = field(default_factory=list)
    """What the agent wants looked into beside."""


@dataclass(kw_only=True, slots=True)
class Attempts:
    """What it took to get answers, over a transport's life."""

    retries: int = 0
    waited_seconds: float = 0.0
    codes: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    """Reasons of the last attempts that failed, in their order."""

    def failed(self, reason: str, *, wait: float) -> None:
        """Notes an attempt that failed and is tried again after `wait` seconds."""
        self.retries += 1
        self.waited_seconds += wait
        self.codes.append(reason)


class Transport(Protocol):
    """The loops of one repo, reached one way. Close it at the end.

    Every implementation passes tests/conformance/test_transport.py: the same answers,
    every one valid by its schema, and the same exception for the same failure.
    """

    name: TransportName
    attempts: Attempts
    journal: JournalHead | None
    """How far the journal had got when it answered last; None: it did not say."""

    async def info(self) -> AgentInfo:
        """Who answers."""

    async def snapshot(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> Snapshot:
        """A snapshot of a loop.

        Raises:
            OpsError: as sprite_agent.errors and opsmgr.errors say.
        """

    def events(self, query: EventQuery) -> AsyncGenerator[EventBatch]:
        """One subscription, as StreamEvents promises in the proto; it is not resumed here (see subscription.py).

        Raises:
            OpsError: at any batch; those before it stand.
        """

    async def execute(self, request: ControlRequest) -> ControlResult:
        """Runs an intent, at most once for its key.

        Raises:
            Refused, NotNow: this attempt ran nothing.
            NoAnswer: unknown; ask again with the same key.
        """

    async def get_control(self, loop_id: str, key: str) -> ControlResult:
        """What has become of a key.

        Raises:
            ControlNotFound: nothing was run for it.
        """

    async def close(self) -> None:
        """Ends the transport; subscriptions must have ended."""
