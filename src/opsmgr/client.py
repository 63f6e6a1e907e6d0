"""The library: one loop, looked at, followed and controlled from a program of yours."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, Self, TypedDict, Unpack, get_args

from opsmgr.cursors import Position
from opsmgr.errors import InputInvalid
from opsmgr.event_stream import EventStream
from opsmgr.intents.at_hand import look_at
from opsmgr.intents.control import new_key, send
from opsmgr.targets import Target
from opsmgr.transport.base import Snapshot, TransportName
from opsmgr.watch import PATIENT
from sprite_agent.contract.requests import DEFAULT_TIMEOUT
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from opsmgr.transport.base import AgentInfo, Transport
    from opsmgr.transport.retry import RetryPolicy
    from sprite_agent.contract.envelopes import ControlResult, Intent
    from sprite_agent.contract.streaming import SkippedRecord

Confirm = Literal["completion", "decision", "none"]
"""The effect that counts as confirmed; none: it is not looked for."""
_EFFECTS = {"completion": "completed", "decision": "decision_recorded"}


class Settings(TypedDict, total=False):
    """The other fields of a `Target`, as `connect` takes them; a path may be text."""

    name: str
    transport: TransportName
    folder: str | Path
    token_file: str | Path
    signing_key: str | Path
    sprite_id: str
    tls_ca: str | Path
    tls_cert: str | Path
    tls_key: str | Path
    tls_server_name: str
    state_dir: str | Path
    superloop_bin: str


class ControlOptions(TypedDict, total=False):
    """What a control takes; only `by` has to be given."""

    by: Required[str]
    """Who asks."""
    note: str | None
    """Why."""
    key: str | None
    """The idempotency key: asking again with the same one runs nothing twice. Default: a new one, which the result and
    the details of an error have."""
    confirm: Confirm
    """Default: completion. The runtime records an approve at once, and completes it only when the run is started again:
    decision is enough for that."""
    timeout: float
    """Seconds to look for the effect; default 30."""
    expected: Snapshot | None
    """The snapshot that was looked at: refuse if another run, or another approval request, is at hand."""
    trace_id: str | None
    """Correlates logs on both sides."""


_PATHS = {"folder", "token_file", "signing_key", "tls_ca", "tls_cert", "tls_key", "state_dir"}


def connect(
    target: Target | str | None = None,
    *,
    config: str | Path | None = None,
    loop: str | None = None,
    repo: str | Path | None = None,
    address: str | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    **settings: Unpack[Settings],
) -> Client:
    """A client of one loop, to be used in an `async with`. Nothing is opened before that.

    Say which loop in one of three ways: by a `Target`; by the name of a target in a config file; or by `loop` and
    where it is, which is `repo` for one on this machine and `address` for an agent's.

    Args:
        target: the target itself, or its name in the config.
        config: the config file that has the name; default: where the command line looks for it.
        loop: the loop's id.
        repo: the repo on this machine. Beside `address` it only says where the manager's files are.
        address: `HOST:PORT` or `unix:PATH` of the agent.
        token: the agent's bearer token, for a program that has it from elsewhere than a file; never stored.
        tell: told, in a sentence for people, of what went wrong and did not matter to the answer.
        settings: other fields of `Target`: token_file, signing_key, sprite_id, tls_ca, folder and so on. With a
            target or a name they beat what it says.

    Raises:
        InputInvalid: it is not said which loop or where, or the config does not have it.
    """
    if isinstance(target, str):
        target = _named(target, config)
    if unknown := settings.keys() - Settings.__annotations__.keys():
        raise InputInvalid(f"connect does not know {', '.join(sorted(unknown))}; opsmgr.client.Settings has its names")
    if (way := settings.get("transport", "local")) not in get_args(TransportName):
        raise InputInvalid(f"transport is {way!r}; it can be {', '.join(get_args(TransportName))}")
    given: Any = {name: Path(value) if name in _PATHS else value for name, value in settings.items()}  # type: ignore[arg-type]
    if target is not None:
        if loop is not None or repo is not None or address is not None:
            raise InputInvalid("give a target, or a loop and where it is, not both")
        return Client(replace(target, **given), token=token, tell=tell)
    if loop is None:
        raise InputInvalid("connect needs a target, the name of one, or loop=")
    if repo is None and address is None:
        raise InputInvalid(f"connect needs to know where loop {loop} is: repo=PATH, or address=HOST:PORT of its agent")
    made = Target(
        name=loop,
        loop=loop,
        transport="local" if address is None else "sprite_service",
        address=address,
        repo=None if repo is None else Path(repo),
    )
    return Client(replace(made, **given), token=token, tell=tell)


class Client:
    """One loop, reached one way. Made by `connect`; use it in an `async with`, in one event loop.

    Any number of them may be open at once, and any number of calls on one of them. It holds nothing that another
    shares but the manager's files of its loop.
    """

    def __init__(self, target: Target, *, token: str | None = None, tell: Callable[[str], None]) -> None:
        self.target = target
        self._token = token
        self._tell = tell
        self._opened: Transport | None = None
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        """Opens the way to the loop; the first call is what connects.

        Raises:
            InputInvalid: credentials that can't be used, a repo that is not there.
            RuntimeError: it is open.
        """
        if self._opened is not None:
            raise RuntimeError("the client is open already")
        self._opened = self.target.connect(token=self._token)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the streams that are left, and closes."""
        transport, self._opened = self._transport, None
        try:
            for stream in list(self._streams):
                await stream.aclose()
        finally:
            await transport.close()

    async def info(self) -> AgentInfo:
        """Who answers, and which loops are there.

        Raises:
            OpsError: refused, or no answer.
        """
        return await self._transport.info()

    async def snapshot(self, *, trace_id: str | None = None) -> Snapshot:
        """The loop as it is now.

        Raises:
            LoopNotFound: there is no such loop.
            OpsError: refused, or no answer.
        """
        return await self._transport.snapshot(self.target.loop, trace_id=trace_id)

    def events(
        self,
        after: Position | Snapshot | None = None,
        *,
        follow: bool = True,
        on_malformed: Callable[[SkippedRecord], None] | None = None,
        on_retry: Callable[[OpsError, float], None] | None = None,
        policy: RetryPolicy | None = None,
        trace_id: str | None = None,
    ) -> EventStream:
        """Every event after a position, once and in order, over as many connections as it takes.

        Args:
            after: a position that was stored; a snapshot, for what has happened since; None: from the first event.
            follow: wait at the end of the log for more; else end there.
            on_malformed: told of each record that is no event, and it is passed over. Without it such a record
                raises EventMalformed.
            on_retry: told why a connection was lost, and the seconds until it is tried anew.
            policy: how long to try; by default for ever when following, else as a single request.
            trace_id: passed on.

        Raises:
            PositionLost: when iterated: the log is not the one that `after` is of. Begin anew without `after`.
            EventMalformed: when iterated, see on_malformed.
            OpsError: when iterated: refused, or no answer within the policy.
        """
        start = _position(after)
        transport = self._transport
        query = EventQuery(
            loop_id=self.target.loop,
            after_line=start.line,
            resume_token=start.resume_token,
            follow=follow,
            skip_malformed=on_malformed is not None,
            trace_id=trace_id,
        )
        stream = EventStream(
            transport,
            query,
            start=start,
            policy=policy or (PATIENT if follow else None),
            on_malformed=on_malformed or (lambda _: None),
            on_retry=on_retry,
        )
        self._streams.add(stream)
        return stream

    async def approve(self, **options: Unpack[ControlOptions]) -> ControlResult:
        """Approves what the loop asks for, at most once for the key.

        The intent is recorded as by the command line: in intents.jsonl and the outbox of the manager's files.

        Raises:
            InputInvalid: an option can't be what was given; nothing was sent.
            PreconditionRefused: things are not as the request or `expected` needs them; nothing was run.
            AgentStateRolledBack: control is frozen; nothing was sent.
            NoAnswer: what became of it is unknown: ask again with the same key.
            OpsError: `executed` says whether it was run; None: ask again with the same key.
        """
        return await self._control("approve", **options)

    async def reject(self, **options: Unpack[ControlOptions]) -> ControlResult:
        """Rejects what the loop asks for; see `approve`."""
        return await self._control("reject", **options)

    async def cancel(self, **options: Unpack[ControlOptions]) -> ControlResult:
        """Cancels the run; see `approve`."""
        return await self._control("cancel", **options)

    async def control_state(self, key: str) -> ControlResult:
        """What has become of an idempotency key; sends nothing that runs.

        Raises:
            ControlNotFound: nothing was run for it.
            OpsError: refused, or no answer.
        """
        return await self._transport.get_control(self.target.loop, key)

    async def _control(
        self,
        intent: Intent,
        *,
        by: str,
        note: str | None = None,
        key: str | None = None,
        confirm: Confirm = "completion",
        timeout: float = DEFAULT_TIMEOUT,  # noqa: ASYNC109  # how long to look for the effect, not a deadline
        expected: Snapshot | None = None,
        trace_id: str | None = None,
    ) -> ControlResult:
        if confirm not in get_args(Confirm):
            raise InputInvalid(f"confirm is {confirm!r}; it can be {', '.join(get_args(Confirm))}")
        confirmation: dict[str, Any] = {"mode": "skip"}
        if confirm != "none":
            confirmation = {"mode": "wait", "timeoutSeconds": timeout, "requiredEffect": _EFFECTS[confirm]}
        given: dict[str, Any] = {"note": note, "traceId": trace_id}
        if expected is not None:
            given |= (await look_at(self._transport, expected.envelope, intent)).preconditions()
        request: Any = {
            "loopId": self.target.loop,
            "intent": intent,
            "requestedBy": by,
            "idempotencyKey": new_key(intent) if key is None else key,
            "confirmation": confirmation,
            **{name: value for name, value in given.items() if value is not None},
        }
        try:
            return await send(
                self._transport, self.target.store(), request, address=self.target.address, tell=self._tell
            )
        except OpsError as error:
            error.details.setdefault("idempotencyKey", request["idempotencyKey"])
            raise

    @property
    def _transport(self) -> Transport:
        if self._opened is None:
            raise RuntimeError("the client is not open; use it in an 'async with'")
        return self._opened


def _named(name: str, config: str | Path | None) -> Target:
    from opsmgr.config import find_config, load_config  # noqa: PLC0415  # only who has one needs it

    return load_config(find_config(None if config is None else Path(config))).target(name)


def _position(after: Position | Snapshot | None) -> Position:
    if isinstance(after, Snapshot):
        cursor = after.envelope["cursor"]
        return Position(
            line=cursor["eventLineOffset"], line_count=cursor["eventLineCount"], resume_token=after.resume_token
        )
    return after or Position()
