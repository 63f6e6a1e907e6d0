"""The servicer: unpack, call, pack. It knows gRPC and the mirror, and thinks nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.unknown_fields import UnknownFieldSet

from sprite_agent import __version__
from sprite_agent.answers import Answer, OpenCalls, answered, refuse_undecodable
from sprite_agent.contract import clock, control_mirror, mirror
from sprite_agent.contract.requests import MAX_CONTROL_DEADLINE, MAX_NOTE_CHARACTERS
from sprite_agent.contract.streaming import DEFAULT_HEARTBEAT, EventQuery
from sprite_agent.errors import ContractError, DeadlineInvalid, Draining, RequestInvalid, UnknownFields
from sprite_agent.event_stream import MAX_BATCH_EVENTS
from sprite_agent.journal import RETENTION_SECONDS
from sprite_agent.records import MAX_RECORD_BYTES
from sprite_agent.v1 import service_pb2 as pb
from sprite_agent.v1 import service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

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

    def __init__(self, repo: Repo, identity: Identity) -> None:
        self._repo = repo
        self._identity = identity
        self._draining = False
        self.calls = OpenCalls()
        self.streams = OpenCalls()

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
            snapshot=mirror.snapshot_to_message(reading.snapshot), resume_token=reading.resume_token
        )

    async def StreamEvents(
        self, request: pb.StreamEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.StreamEventsResponse]:
        """See the proto."""
        answer = Answer("StreamEvents", request, context)
        # At once: a peer that waits for the connection must not wait for the first event.
        await context.send_initial_metadata(())
        with self.streams:
            try:
                refuse_undecodable(request)
                self._refuse_while_draining()
                async with contextlib.aclosing(self._repo.stream_events(_query(request))) as batches:
                    async for batch in batches:
                        yield _batch_to_message(batch)
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
        self._refuse_while_draining()
        remaining = context.time_remaining()
        if not remaining or remaining >= MAX_CONTROL_DEADLINE + ROUNDING:
            raise DeadlineInvalid(f"a control needs a deadline of at most {MAX_CONTROL_DEADLINE:.0f} s")
        _refuse_unknown_fields(request)
        try:
            document = control_mirror.request_from_message(request)
        except ContractError as error:
            raise RequestInvalid(str(error), violations=[(error.path, error.message)]) from error
        result = self._repo.execute(document, deadline=time.monotonic() + remaining)
        return pb.ExecuteControlResponse(result=control_mirror.result_to_message(result))

    @answered(pb.GetControlResponse)
    def GetControl(
        self,
        request: pb.GetControlRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.GetControlResponse:
        """See the proto."""
        result = self._repo.get_control(request.loop_id, request.idempotency_key)
        return pb.GetControlResponse(result=control_mirror.result_to_message(result))

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


def _batch_to_message(batch: EventBatch) -> pb.StreamEventsResponse:
    message = pb.StreamEventsResponse(
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
