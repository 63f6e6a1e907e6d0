"""The shapes of the v1 documents that cross between the programs. schema/ says what each field means.

Names are the contract's, so they are written as they stand in the JSON.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Json = dict[str, Any]
"""An object of the runtime's own; read from a file or the wire it is an `OpenObject`, with its text."""

RunStatus = Literal["awaiting_approval", "complete", "running", "stopped", "failed", "idle", "unknown"]
Intent = Literal["cancel", "approve", "reject"]
ControlState = Literal["executing", "executed", "done"]
ControlStatus = Literal["confirmed", "executed_unconfirmed", "ambiguous", "failed_command"]
ControlEffect = Literal["none", "decision_recorded", "completed"]


GATES = ("tests", "validation", "prerequisites", "checklist", "evidence", "approval")
"""The gates of the contract, in its order; the runtime may add more."""


class Source(TypedDict):
    """Where the facts were read."""

    repoPath: str
    loopId: str


class Sequence(TypedDict):
    """Position for ordering checks."""

    source: str
    value: int


class Cursor(TypedDict):
    """A position in the event log, in lines."""

    eventLineOffset: int
    eventLineCount: int


class Stuck(TypedDict):
    """How long a loop has made no progress."""

    streak: int
    threshold: int


class ArtifactRef(TypedDict):
    """What was found at an artifact's path."""

    path: str
    exists: bool
    sizeBytes: int
    lineCount: int
    sha256: str | None
    mtimeEpoch: int | None


class SnapshotRun(TypedDict):
    """The latest run."""

    runId: str
    iteration: int
    status: RunStatus
    summary: Json | None


class Runtime(TypedDict):
    """The runtime's own files."""

    superloopState: Json | None
    activeRun: Json | None
    approval: Json | None
    heartbeat: NotRequired[Json | None]


class Artifacts(TypedDict):
    """The files a snapshot was read from."""

    events: ArtifactRef
    runSummary: ArtifactRef
    state: ArtifactRef
    activeRun: ArtifactRef
    approval: ArtifactRef
    heartbeat: NotRequired[ArtifactRef]


class SnapshotHealth(TypedDict):
    """Figures for judging a loop."""

    eventCount: int
    lastEventAt: str | None
    lastEventName: str | None
    lastSummaryAt: str | None
    hasPendingApproval: bool
    gates: dict[str, str] | None
    stuck: Stuck | None


class SnapshotEnvelope(TypedDict):
    """loop_run_snapshot: everything known of one loop at one moment."""

    schemaVersion: Literal["v1"]
    envelopeType: Literal["loop_run_snapshot"]
    emittedAt: str
    traceId: NotRequired[str | None]
    source: Source
    sequence: NotRequired[Sequence]
    run: SnapshotRun
    runtime: Runtime
    artifacts: Artifacts
    cursor: Cursor
    health: SnapshotHealth


class EventRun(TypedDict):
    """The run that an event names."""

    runId: str
    iteration: int


class Event(TypedDict):
    """One event, as the runtime wrote it."""

    timestamp: str
    name: str
    role: str | None
    status: str | None
    message: str | None
    payload: Json | None
    raw: Json


class EventEnvelope(TypedDict):
    """loop_run_event: one event of the log."""

    schemaVersion: Literal["v1"]
    envelopeType: Literal["loop_run_event"]
    emittedAt: str
    traceId: NotRequired[str | None]
    source: Source
    sequence: NotRequired[Sequence]
    cursor: Cursor
    run: EventRun
    event: Event


class ControlConfirmation(TypedDict):
    """Whether and how long to look for the effect."""

    mode: Literal["skip", "wait"]
    timeoutSeconds: NotRequired[float]
    requiredEffect: NotRequired[Literal["decision_recorded", "completed"]]


class Provenance(TypedDict):
    """Which manager sent a request."""

    managerId: str
    host: str
    attempt: int


class ControlRequest(TypedDict):
    """control_request: one intent, run at most once for its key."""

    loopId: str
    intent: Intent
    requestedBy: str
    idempotencyKey: str
    note: NotRequired[str]
    traceId: NotRequired[str]
    confirmation: NotRequired[ControlConfirmation]
    provenance: NotRequired[Provenance]
    expectedRunId: NotRequired[str]
    expectedIteration: NotRequired[int]
    expectedApprovalDigest: NotRequired[str]
    requestedAt: NotRequired[str]


class ConfirmationRecord(TypedDict):
    """What was seen when the effect of an intent was looked for."""

    intent: Intent
    confirmed: bool
    reason: str
    attempts: int
    timeoutSeconds: float
    observedStatus: RunStatus | None
    observedLastEvent: str | None
    observedApprovalStatus: str | None
    observedActive: bool | None
    observedAt: str


class JournalPosition(TypedDict):
    """A row of the agent's journal."""

    id: str
    sequence: int


class ControlResult(TypedDict):
    """control_result: what became of an idempotency key."""

    schemaVersion: Literal["v1"]
    envelopeType: Literal["control_result"]
    traceId: str | None
    loopId: str
    intent: Intent
    requestedBy: str
    note: str | None
    idempotencyKey: str
    state: ControlState
    status: ControlStatus | None
    reason: str | None
    detail: str | None
    effect: ControlEffect
    executed: bool
    replayed: bool
    command: list[str]
    exitCode: int | None
    timedOut: bool
    output: str
    startedAt: str | None
    finishedAt: str | None
    confirmation: ConfirmationRecord | None
    journal: JournalPosition
