"""The sprite_service transport: an agent over gRPC. Nothing passes that the schema refuses, either way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2

from opsmgr.errors import InputInvalid, NoAnswer, NotReached, TransportRefused
from opsmgr.transport.base import AgentInfo, Attempts, Snapshot
from opsmgr.transport.credentials import Credentials
from opsmgr.transport.messages import batch_from, result_from, stream_request
from opsmgr.transport.probes import serving
from opsmgr.transport.retry import Retries, RetryPolicy, retried
from opsmgr.transport.silence import Silence, is_cancelled
from sprite_agent.contract import control_mirror, error_details, mirror
from sprite_agent.contract.agent_state import Finding, JournalHead
from sprite_agent.contract.loop_ids import check_loop_id
from sprite_agent.contract.requests import DEFAULT_TIMEOUT, MAX_CONTROL_DEADLINE, check_request
from sprite_agent.contract.streaming import check_query, check_texts
from sprite_agent.contract.validation import validate
from sprite_agent.errors import ContractError, InternalError
from sprite_agent.v1 import service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from opsmgr.transport.base import TransportName
    from opsmgr.transport.credentials import Renewal, TlsFiles
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult
    from sprite_agent.contract.streaming import EventBatch, EventQuery
    from sprite_agent.errors import OpsError

READ_TIMEOUT = 15.0
"""Seconds for one attempt at a read."""
COMMAND_ALLOWANCE = 40.0
"""Seconds a control may take beside its confirmation: waiting for its turn, and the command's time limit."""
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
"""Milliseconds until another try; anything else: no other try."""
RETIREMENT = 3600.0
"""Seconds for which streams may go on over a channel whose certificates were replaced."""
CLOCK_SKEW = 30.0
"""Seconds by which clocks may differ: half of what a signature lasts."""
CLOCK_SKEW_SUSPECT = "CLOCK_SKEW_SUSPECT"
MISSED_HEARTBEATS = 3
"""A following stream that is silent for so many intervals is dropped."""
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # what takes effect: keepalive_timeout_ms alone leaves 60 s
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.http2.bdp_probe", 0),  # with the next: bounded memory for many saturated streams
    ("grpc.http2.lookahead_bytes", 262_144),
    ("grpc.enable_retries", 0),  # retries are ours: only they know what is safe
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

_TOO_LARGE = "larger than max"
"""Part of what gRPC says of a message that no other try makes smaller."""
_SERVICE = pb.DESCRIPTOR.services_by_name["SpriteAgentService"]
_NO_ANSWER = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # of a proxy on the way, or of gRPC itself
}
"""Statuses that say nothing of what the agent did, where it did not send them itself."""


class SpriteServiceTransport:
    """See `base.Transport`. Owns one channel; belongs to one event loop."""

    name: TransportName = "sprite_service"

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        credentials: Credentials | None = None,
        renewal: Renewal | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        """Connects when first used.

        Args:
            target: HOST:PORT or unix:PATH of the agent.
            token: its bearer token, where that is all it asks for.
            credentials: instead of `token`.
            renewal: instead of `credentials`, where their files may change while the transport lives.
            policy: how often to try again.

        Raises:
            InputInvalid: with these credentials `target` can't be reached; the message says why.
        """
        self._target = target
        self._renewal = renewal
        self._credentials = renewal.current() if renewal else credentials or Credentials(token=token)
        self._policy = policy or RetryPolicy()
        self._retired: list[asyncio.Future[None]] = []
        self._is_closed = False
        self._open(self._credentials.read_tls(target))
        self.attempts = Attempts()
        self.journal: JournalHead | None = None
        self.clock_skew_seconds: float | None = None
        """By how much the agent's clock is ahead, give or take a second; None: it did not say."""

    async def info(self) -> AgentInfo:
        """See `base.Transport`."""
        answer: pb.GetInfoResponse = await self._ask("GetInfo", pb.GetInfoRequest(), READ_TIMEOUT)
        return AgentInfo(
            agent_version=answer.agent_version,
            repo_path=answer.repo_path,
            loops=list(answer.loops),
            sprite_id=answer.sprite_id if answer.HasField("sprite_id") else None,
            instance_id=answer.instance_id,
        )

    async def snapshot(self, loop_id: str, *, trace_id: str | None = None, run_id: str | None = None) -> Snapshot:
        """See `base.Transport`."""
        check_loop_id(loop_id)
        check_texts(trace_id=trace_id, run_id=run_id)
        request = pb.GetSnapshotRequest(loop_id=loop_id, trace_id=trace_id, run_id=run_id)
        answer: pb.GetSnapshotResponse = await self._ask("GetSnapshot", request, READ_TIMEOUT)
        envelope = mirror.snapshot_from_message(answer.snapshot)
        validate("loop_run_snapshot", envelope)
        findings = [Finding(found.reason, found.message) for found in answer.findings]
        skew = self.clock_skew_seconds
        if skew is not None and abs(skew) > CLOCK_SKEW:
            direction = "ahead of" if skew > 0 else "behind"
            # Without the figure: one that moves by a second is no new finding.
            findings.append(Finding(CLOCK_SKEW_SUSPECT, f"the agent's clock is far {direction} this one"))
        return Snapshot(envelope=envelope, resume_token=answer.resume_token, findings=findings)

    async def events(self, query: EventQuery) -> AsyncGenerator[EventBatch]:
        """See `base.Transport`."""
        check_query(query)
        body = stream_request(query).SerializeToString()
        metadata = self._renewed().metadata(_path("StreamEvents"), body, actor=None, trace_id=query.trace_id)
        call = self._call("StreamEvents")(body, metadata=metadata)
        silence = Silence(call, MISSED_HEARTBEATS * query.heartbeat_interval if query.follow else READ_TIMEOUT)
        try:
            while True:
                try:
                    with silence:
                        message = await call.read()
                except TimeoutError as error:
                    raise NoAnswer(
                        f"{self._target} was silent for {silence.most:.0f} s", details={"target": self._target}
                    ) from error
                except asyncio.CancelledError as error:
                    if is_cancelled():
                        raise
                    raise self._closed() from error
                if message is grpc.aio.EOF:
                    return
                if not isinstance(message, pb.StreamEventsResponse):
                    raise ContractError("the answer is no message of this method")
                received = [message]
                del message  # nothing of a batch is kept while its reader has it, or waits for its turn to go on
                yield batch_from(received.pop(), query.trace_id)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        finally:
            silence.close()
            call.cancel()

    async def execute(self, request: ControlRequest) -> ControlResult:
        """See `base.Transport`."""
        message = control_mirror.request_to_message(check_request(dict(request)))
        confirmation = request.get("confirmation", {})
        waits = confirmation.get("mode") != "skip"
        timeout = COMMAND_ALLOWANCE + (confirmation.get("timeoutSeconds", DEFAULT_TIMEOUT) if waits else 0)
        answer: pb.ExecuteControlResponse = await self._ask(
            "ExecuteControl", message, min(timeout, MAX_CONTROL_DEADLINE), actor=request["requestedBy"]
        )
        try:
            return result_from(answer.result)
        except ContractError as error:
            raise _not_understood(error) from error

    async def get_control(self, loop_id: str, key: str) -> ControlResult:
        """See `base.Transport`."""
        check_loop_id(loop_id)
        check_texts(idempotency_key=key)
        request = pb.GetControlRequest(loop_id=loop_id, idempotency_key=key)
        answer: pb.GetControlResponse = await self._ask("GetControl", request, READ_TIMEOUT)
        return result_from(answer.result)

    async def serving(self, service: str) -> str:
        """What the agent's health check says of a service: SERVING or not.

        Raises:
            OpsError: it says nothing.
        """
        try:
            return await serving(self._channel, service)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error

    async def close(self) -> None:
        """See `base.Transport`."""
        self._is_closed = True
        await self._channel.close()
        for closing in self._retired:
            closing.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)

    def _renewed(self) -> Credentials:
        """The credentials as they are now; the channel is one that uses them."""
        if self._renewal is not None and (found := self._renewal.current()) is not self._credentials:
            with contextlib.suppress(InputInvalid):  # in the midst of being replaced
                files = found.read_tls(self._target)
                self._credentials = found
                if files != self._tls:
                    self._reopen(files)
        return self._credentials

    def _reopen(self, tls: TlsFiles | None) -> None:
        """Another channel for what is asked from now on. Streams go on over the old one; they live an hour at most."""
        self._retired = [closing for closing in self._retired if not closing.done()]
        self._retired.append(asyncio.ensure_future(self._channel.close(RETIREMENT)))
        self._open(tls)

    def _open(self, tls: TlsFiles | None) -> None:
        self._tls = tls
        self._channel = _channel(self._target, tls, self._credentials.tls_server_name)
        self._calls: dict[str, Any] = {}

    def _call(self, name: str) -> Any:
        """What makes a call of that method, made when it is first asked for: a follower needs one of five."""
        if name not in self._calls:
            method = _SERVICE.methods_by_name[name]
            # By bytes: what is signed is what is sent, and serializing twice need not give the same.
            make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
            self._calls[name] = make(_path(name), response_deserializer=GetMessageClass(method.output_type).FromString)
        return self._calls[name]

    async def _ask(
        self,
        method: str,
        request: Any,
        timeout: float,  # noqa: ASYNC109  # a deadline, sent along
        actor: str | None = None,
    ) -> Any:
        """One unary call, tried again as the policy says. Safe for control: the key is in the request."""
        body = request.SerializeToString()
        trace_id = getattr(request, "trace_id", None) or None

        async def once() -> Any:
            metadata = self._renewed().metadata(_path(method), body, actor=actor, trace_id=trace_id)
            call, began = self._call(method)(body, timeout=timeout, metadata=metadata), time.time()
            try:
                answer = await call
            except grpc.aio.AioRpcError as error:
                self._compare_clocks(error.trailing_metadata(), began)
                raise self._translated(error, acts=method == "ExecuteControl") from error
            except asyncio.CancelledError as error:
                if is_cancelled():
                    raise
                raise self._closed() from error
            self._compare_clocks(await call.trailing_metadata(), began)
            if answer is None:
                raise _not_understood(ContractError("the answer is no message of this method"))
            return answer

        answer = await retried(once, Retries(policy=self._policy, attempts=self.attempts))
        if answer.HasField("journal"):
            self.journal = JournalHead(answer.journal.id, answer.journal.sequence, answer.journal.head)
        return answer

    def _closed(self) -> NoAnswer:
        """What becomes of a call whose channel is closed: gRPC would have it that the caller's task is cancelled."""
        closed = NoAnswer(f"the connection to {self._target} was closed here", details={"target": self._target})
        closed.retryable = not self._is_closed
        return closed

    def _compare_clocks(self, metadata: Any, began: float) -> None:
        """Notes by how much the agent's clock is ahead of this one. Nothing is set by it: the Sprite may lie."""
        said = _text(dict(metadata or ()).get(error_details.SERVER_TIME_TRAILER))
        with contextlib.suppress(TypeError, ValueError):
            moment = datetime.fromisoformat(said or "").timestamp()
            self.clock_skew_seconds = round(moment - (began + time.time()) / 2, 1)

    def _translated(self, error: grpc.aio.AioRpcError, *, acts: bool = False) -> OpsError:
        """The error that the agent sent, or else what is known of the failure."""
        trailers = dict(error.trailing_metadata() or ())
        sent = trailers.get(error_details.STATUS_TRAILER)
        if isinstance(sent, bytes):
            with contextlib.suppress(ContractError, DecodeError):
                refusal = error_details.from_status(
                    status_pb2.Status.FromString(sent),
                    executed=_text(trailers.get(error_details.EXECUTED_TRAILER)) or "unknown",
                    error_id=_text(trailers.get(error_details.ERROR_ID_TRAILER)),
                )
                if isinstance(refusal, InternalError):
                    refusal.retryable = acts  # a control's key makes it safe
                _heed(_text(trailers.get(PUSHBACK_TRAILER)), refusal)
                return refusal
        code = error.code()
        details = {"target": self._target, "grpcStatus": code.name}
        if code in _NO_ANSWER:
            said = f"{code.name}: {error.details()}"
            meaning = self._credentials.explain(said)
            told = said if meaning is None else f"{meaning} ({said})"
            message = f"no answer from {self._target}: {told}"
            if self._credentials.was_unknown(said) and not self._is_closed:
                self._reopen(self._tls)  # else gRPC would not look the name up again for up to two minutes
            if self._credentials.was_connected(said):
                no_answer = NoAnswer(message, details=details)
            else:
                no_answer = NotReached(message, details=details)
            no_answer.retryable = _TOO_LARGE not in said
            _heed(_text(trailers.get(PUSHBACK_TRAILER)), no_answer)
            return no_answer
        return TransportRefused(f"{self._target} refused with {code.name}: {error.details()}", details=details)


def _channel(target: str, tls: TlsFiles | None, name: str | None) -> grpc.aio.Channel:
    with contextlib.suppress(OSError):
        socket.inet_pton(socket.AF_INET, target.rpartition(":")[0])
        target = f"ipv4:{target}"  # else gRPC would look it up like a name, for a tenth of what a connection takes
    if tls is None:
        # What goes without TLS stays on this machine, whatever proxy the environment names.
        return grpc.aio.insecure_channel(target, options=(*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)))
    named = () if name is None else (("grpc.ssl_target_name_override", name),)
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(*tls), options=(*CHANNEL_OPTIONS, *named))


def _path(method: str) -> str:
    return f"/{_SERVICE.full_name}/{method}"


def _heed(pushback: str | None, error: OpsError) -> None:
    """Notes in `error` when it may be tried again, or that it may not, where that was said in gRPC's own way."""
    if pushback is None:
        return
    if pushback.isascii() and pushback.isdigit():
        error.retry_after = int(pushback) / 1000
    else:
        error.retryable = False


def _not_understood(error: ContractError) -> ContractError:
    """An answer came, and nothing can be said of what it answers."""
    error.executed = None
    return error


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
