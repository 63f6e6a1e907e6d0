"""The servicer: unpack, call, pack. It knows gRPC and the mirror, and thinks nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.unknown_fields import UnknownFieldSet

from sprite_agent import __version__
from sprite_agent.callers import CALLER
from sprite_agent.contract import clock, control_mirror, mirror
from sprite_agent.contract.requests import MAX_CONTROL_DEADLINE, MAX_NOTE_CHARACTERS, field_name
from sprite_agent.contract.streaming import DEFAULT_HEARTBEAT, EventQuery
from sprite_agent.control.journal import RETENTION_SECONDS
from sprite_agent.errors import ContractError, DeadlineInvalid, Draining, RequestInvalid, Starting, UnknownFields
from sprite_agent.event_log.newest import MAX_BATCH_EVENTS
from sprite_agent.event_log.records import MAX_RECORD_BYTES
from sprite_agent.face.answers import Answer, OpenCalls, answered
from sprite_agent.face.credential_files import CredentialFiles, CredentialSources
from sprite_agent.face.limits import CallerLimits
from sprite_agent.face.metrics import AgentMetrics
from sprite_agent.v1 import envelopes_pb2, service_pb2_grpc
from sprite_agent.v1 import service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import grpc

    from sprite_agent.contract.agent_state import JournalHead
    from sprite_agent.contract.streaming import EventBatch
    from sprite_agent.repo import Repo

API_REVISION = 1
MAX_REQUEST_BYTES = 64 * 1024
ROUNDING = 1.0
"""Seconds: gRPC sends a deadline rounded up to whole ones, and exactly the maximum must not be refused."""
MAX_STREAM_AGE = 3600.0
"""Seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who this agent is."""

    instance_id: str
    """Random per start."""
    sprite_id: str | None


class SpriteAgentService(service_pb2_grpc.SpriteAgentServiceServicer):
    """Serves one repo. The unary methods are plain: the server runs them in its thread pool."""

    def __init__(
        self,
        repo: Repo,
        identity: Identity,
        *,
        limits: CallerLimits | None = None,
        metrics: AgentMetrics | None = None,
        credentials: CredentialFiles | None = None,
        starting: bool = False,
    ) -> None:
        """`starting`: control has to wait until `recover` is through."""
        self._repo = repo
        self._identity = identity
        self._limits = limits or CallerLimits()
        self._credentials = credentials or CredentialFiles(CredentialSources())
        self._draining = False
        self._starting = starting
        self._made: tuple[EventBatch, JournalHead | None, pb.StreamEventsResponse] | None = None
        """The last message of raw events."""
        self.metrics = metrics or AgentMetrics()
        self.calls = OpenCalls()
        self.streams = OpenCalls()

    def recover(self) -> None:
        """Finishes what an earlier agent left unfinished.

        Raises:
            JournalCorrupt, JournalUnavailable
        """
        try:
            self._repo.recover()
        finally:
            self._starting = False

    def drain(self) -> None:
        """Ends the streams, and refuses new streams and control from now on."""
        self._draining = True
        self._repo.end_streams()

    @answered(pb.GetInfoResponse)
    def GetInfo(self, request: pb.GetInfoRequest, context: grpc.ServicerContext) -> pb.GetInfoResponse:  # noqa: ARG002
        """See the proto."""
        limits = pb.Limits(
            max_request_bytes=MAX_REQUEST_BYTES,
            max_record_bytes=MAX_RECORD_BYTES,
            max_batch_events=MAX_BATCH_EVENTS,
            max_note_characters=MAX_NOTE_CHARACTERS,
            max_streams_per_caller=self._limits.max_streams,
            max_control_rate=self._limits.control_rate,
        )
        limits.max_control_deadline.FromSeconds(int(MAX_CONTROL_DEADLINE))
        limits.max_stream_age.FromSeconds(int(MAX_STREAM_AGE))
        limits.idempotency_retention.FromSeconds(RETENTION_SECONDS)
        return pb.GetInfoResponse(
            agent_version=__version__,
            api_revision=API_REVISION,
            instance_id=self._identity.instance_id,
            sprite_id=self._identity.sprite_id,
            repo_path=str(self._repo.path),
            loops=self._repo.loops(),
            limits=limits,
            server_time=clock.now(),
            journal=_head_to_message(self._repo.journal_head()),
            trusted_keys_digest=self._credentials.in_force().keys_digest,
            isolation=pb.ISOLATION_OWN_USER if self._repo.runs_as_own_user else pb.ISOLATION_SHARED_USER,
        )

    @answered(pb.GetSnapshotResponse)
    def GetSnapshot(
        self,
        request: pb.GetSnapshotRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.GetSnapshotResponse:
        """See the proto."""
        reading = self._repo.read_loop(
            request.loop_id, trace_id=_optional(request, "trace_id"), run_id=_optional(request, "run_id")
        )
        return pb.GetSnapshotResponse(
            snapshot=mirror.snapshot_to_message(reading.snapshot),
            resume_token=reading.resume_token,
            journal=_head_to_message(self._repo.journal_head()),
            findings=[pb.Finding(reason=found.reason, message=found.message) for found in reading.findings],
        )

    async def StreamEvents(
        self, request: pb.StreamEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.StreamEventsResponse]:
        """See the proto."""
        answer = Answer("StreamEvents", request, self.metrics)
        with self.streams:
            try:
                self._refuse_while_draining()
                counted = self._limits.stream(CALLER.get().identity, follow=request.follow)
                with counted, self.metrics.stream() as lag:
                    source = envelopes_pb2.Source(repo_path=str(self._repo.path), loop_id=request.loop_id)
                    streaming = self._repo.stream_events(
                        _query(request),
                        raw=request.raw_events,
                        # A peer that waits for the connection must not wait for the first batch.
                        before_waiting=lambda: context.send_initial_metadata(()),
                    )
                    async with contextlib.aclosing(streaming) as batches:
                        async for batch in batches:
                            left = batch.cursor["eventLineCount"] - batch.cursor["eventLineOffset"]
                            lag.sent(lines_left=left, caught_up=batch.caught_up)
                            self.metrics.sent(events=batch.event_count, skipped=len(batch.skipped))
                            message = self._message(batch, await self._repo.recent_journal_head(), source)
                            del batch  # parsed, it can be many times as large, and a slow reader keeps it waiting
                            yield message
            except (asyncio.CancelledError, GeneratorExit):
                answer.hung_up()
                raise
            except Exception as error:  # noqa: BLE001  # nothing of it may reach the peer; logged with its trace
                answer.fail(error, context)
            else:
                answer.succeed(context)

    @answered(pb.ExecuteControlResponse)
    def ExecuteControl(
        self, request: pb.ExecuteControlRequest, context: grpc.ServicerContext
    ) -> pb.ExecuteControlResponse:
        """See the proto."""
        with self._using_up_its_signature():
            self._limits.count_control(CALLER.get().identity)
            return self._execute(request, context)

    def _execute(self, request: pb.ExecuteControlRequest, context: grpc.ServicerContext) -> pb.ExecuteControlResponse:
        self._refuse_while_draining()
        if self._starting:
            raise Starting("the agent is finding out how the last controls came out; try again", retry_after=0.5)
        remaining = context.time_remaining()
        if not remaining or remaining >= MAX_CONTROL_DEADLINE + ROUNDING:
            raise DeadlineInvalid(f"a control needs a deadline of at most {MAX_CONTROL_DEADLINE:.0f} s")
        _refuse_unknown_fields(request)
        try:
            document = control_mirror.request_from_message(request)
        except ContractError as error:
            raise RequestInvalid(str(error), violations=[(field_name(error.path), error.message)]) from error
        result = self._repo.execute(document, caller=CALLER.get(), deadline=time.monotonic() + remaining)
        self.metrics.controlled(result["intent"], result["status"], replayed=result["replayed"])
        return pb.ExecuteControlResponse(
            result=control_mirror.result_to_message(result), journal=_head_to_message(self._repo.journal_head())
        )

    @answered(pb.GetControlResponse)
    def GetControl(
        self,
        request: pb.GetControlRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.GetControlResponse:
        """See the proto."""
        self._limits.count_control(CALLER.get().identity)
        result = self._repo.get_control(request.loop_id, request.idempotency_key)
        return pb.GetControlResponse(
            result=control_mirror.result_to_message(result), journal=_head_to_message(self._repo.journal_head())
        )

    def _message(
        self, batch: EventBatch, head: JournalHead | None, source: envelopes_pb2.Source
    ) -> pb.StreamEventsResponse:
        """The batch as a message: the same one for all the followers that are given the same batch."""
        if not batch.raw_events:
            return _batch_to_message(batch, head, source)
        if self._made is None or self._made[0] is not batch or self._made[1] is not head:
            self._made = batch, head, _batch_to_message(batch, head, source)
        return self._made[2]

    @contextlib.contextmanager
    def _using_up_its_signature(self) -> Iterator[None]:
        """What was run has its signature in its row; that of a refused call is to be of no use after a restart too."""
        try:
            yield
        except Exception:
            if (proof := CALLER.get().proof) is not None:
                self._repo.use_up(proof)
            raise

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise Draining("the agent is about to stop; try again in a few seconds", retry_after=2.0)


def _query(request: pb.StreamEventsRequest) -> EventQuery:
    interval = request.heartbeat_interval
    return EventQuery(
        loop_id=request.loop_id,
        after_line=request.event_line_offset,
        resume_token=request.resume_token if request.WhichOneof("position") == "resume_token" else None,
        max_events=request.max_events,
        follow=request.follow,
        skip_malformed=request.skip_malformed,
        heartbeat_interval=(
            interval.seconds + interval.nanos / 1e9 if request.HasField("heartbeat_interval") else DEFAULT_HEARTBEAT
        ),
        trace_id=_optional(request, "trace_id"),
    )


def _head_to_message(head: JournalHead | None) -> pb.JournalHead | None:
    return None if head is None else pb.JournalHead(id=head.id, sequence=head.sequence, head=head.head)


def _batch_to_message(
    batch: EventBatch, head: JournalHead | None, source: envelopes_pb2.Source
) -> pb.StreamEventsResponse:
    message = pb.StreamEventsResponse(
        journal=_head_to_message(head),
        resume_token=batch.resume_token,
        caught_up=batch.caught_up,
        emitted_at=batch.emitted_at,
        skipped=[
            pb.SkippedRecord(
                first_line=record.first_line,
                last_line=record.last_line,
                reason=record.reason,
                excerpt=record.excerpt,
                size_bytes=record.size_bytes,
                sha256=record.sha256,
            )
            for record in batch.skipped
        ],
    )
    message.cursor.event_line_offset = batch.cursor["eventLineOffset"]
    message.cursor.event_line_count = batch.cursor["eventLineCount"]
    for event in batch.events:
        mirror.event_to_message(event, message.events.add())
    if batch.raw_events:
        message.source.CopyFrom(source)
        for raw in batch.raw_events:
            message.raw_events.add(line=raw.line, json=raw.text, record_count=raw.record_count)
    return message


def _refuse_unknown_fields(request: pb.ExecuteControlRequest) -> None:
    """A field this agent does not know may be a condition that it would not honour."""
    for name, message in (
        ("", request),
        ("confirmation", request.confirmation),
        ("provenance", request.provenance),
    ):
        unknown = UnknownFieldSet(message)
        if len(unknown):
            raise UnknownFields(
                f"the request has fields this agent (API revision {API_REVISION}) does not know",
                violations=[(name, f"field number {unknown[0].field_number} is unknown")],
            )


def _optional(message: Any, field: str) -> str | None:
    return getattr(message, field) if message.HasField(field) else None
