"""Control from the manager's side: sends one intent, once and for all, and keeps a record of how it came out.

A row in the outbox comes before the first send; what can't be known after a lost answer is asked by its key.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from opsmgr.agent_memory import escalate, load_memory, save_memory
from opsmgr.errors import InputInvalid, NoAnswer, in_doubt
from opsmgr.intents.control_records import Invocation, exit_code
from opsmgr.intents.outbox import Outbox, Row
from sprite_agent.contract import clock
from sprite_agent.contract.requests import check_request, fingerprint
from sprite_agent.errors import ControlNotFound, IdempotencyKeyReused, InternalError, OpsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.agent_memory import AgentMemory
    from opsmgr.store import LoopStore
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult, Intent

__all__ = ["SENDS", "ask", "exit_code", "new_key", "resume", "row_to_resume", "send"]

MANAGER_ID = "opsmgr"
SENDS = 3
"""At most, in one call: each but the first after the agent was asked by the key. A transport retries within each."""

_EXPECTATIONS = ("expectedRunId", "expectedIteration", "expectedApprovalDigest")
_OF_THIS_CALL = ("traceId", "confirmation")
"""May differ between two calls with the same key: neither changes what is run."""


def new_key(intent: Intent) -> str:
    """An idempotency key that no other invocation has."""
    return f"{intent}-{uuid.uuid4()}"


async def send(
    transport: Transport,
    store: LoopStore,
    request: ControlRequest,
    *,
    address: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> ControlResult:
    """Sends an intent and records it, however it comes out.

    A key that has a row is asked about first, and what the row has is sent if anything is: expectations that
    `request` does not name are those of the row. A record that can't be written does not change how the intent
    came out: `tell` is told of it.

    Args:
        transport: the way to the loop.
        store: the manager's files of it.
        request: what to do. It is given a moment and a provenance.
        address: of the agent; kept in the row.
        tell: told what people should know beside the result.

    Raises:
        NoAnswer: what became of it is unknown; `resume` with the same key finds out.
        AgentStateRolledBack: control is frozen, now or since earlier.
        OpsError: `executed` tells whether it was run; None: not known, as for NoAnswer.
    """
    call = Invocation(transport=transport, request=request)
    outbox, row = Outbox(store), None
    try:
        provenance = {"managerId": MANAGER_ID, "host": socket.gethostname(), "attempt": 1}
        fresh: Any = {"requestedAt": clock.now(), **request, "provenance": provenance}
        check_request(fresh)
        row = _known(outbox, fresh)
        if row is None:
            row = Row(
                request=fresh,
                transport=transport.name,
                address=address,
                created_at=clock.now(),
                updated_at=clock.now(),
            )
        # What was asked for in this call, about the same as what the row has.
        of_this_call = {name: request[name] for name in _OF_THIS_CALL if name in request}  # type: ignore[literal-required]  # two of its keys
        call.request = {**row.request, **of_this_call}  # type: ignore[typeddict-item]  # likewise
    except OpsError as error:
        call.failed(store, error, tell=tell)
        raise
    return await _Sending(call, store, outbox, row, address, tell).run()


async def resume(
    transport: Transport,
    store: LoopStore,
    row: Row,
    *,
    address: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> ControlResult:
    """What has become of an intent that was begun; sends it, the same, where the agent does not know its key.

    Raises:
        OpsError: as `send` does.
    """
    if row.result is not None:
        return {**row.result, "replayed": True}
    call = Invocation(transport=transport, request=row.request)
    return await _Sending(call, store, Outbox(store), row, address, tell).run()


async def ask(transport: Transport, loop_id: str, key: str, intent: Intent) -> ControlResult | None:
    """What the agent knows of a key that this manager has no row of; None: nothing.

    Raises:
        IdempotencyKeyReused: it was used for another intent.
        OpsError: it can't be asked.
    """
    try:
        found = await transport.get_control(loop_id, key)
    except ControlNotFound:
        return None
    if found["intent"] != intent:
        raise IdempotencyKeyReused(
            f"key {key} belongs to {found['intent']}, not to {intent}; use another key", details={"idempotencyKey": key}
        )
    return found


def row_to_resume(store: LoopStore, key: str) -> Row | None:
    """The row of a key that can be resumed; None: this manager never used that key.

    Raises:
        InputInvalid: there is nothing to resume, as it was refused; or the row can't be read.
    """
    row = Outbox(store).load(key)
    if row is not None and row.state == "refused":
        reason = (row.error or {}).get("reason", "unknown")
        raise InputInvalid(f"key {key} ended with {reason} and nothing was run for it; send the intent anew")
    return row


@dataclass(slots=True)
class _Sending:
    """One call that settles one row, as far as that can be done."""

    call: Invocation
    store: LoopStore
    outbox: Outbox
    row: Row
    address: str | None
    tell: Callable[[str], None]

    async def run(self) -> ControlResult:
        """The result, recorded; the row has it too."""
        try:
            memory = await self._trusting()
            for other in self.outbox.unsettled():
                if other.key != self.row.key:
                    self.tell(f"{_named(other)} has no outcome yet; unless it is at work: {_hint(other.key)}")
            result = await self._result()
        except OpsError as error:
            self.call.failed(self.store, error, tell=self.tell)
            raise
        except asyncio.CancelledError:
            if self.row.attempts:
                self.tell(f"interrupted; what became of {_named(self.row)} is not known: {_hint(self.row.key)}")
            raise
        # The records come first: a row that is done would have nobody write them later.
        self.call.came_out(self.store, result, tell=self.tell)
        done = result["state"] == "done"
        try:
            self.outbox.save(replace(self.row, state="done", result=result) if done else self._unknown(None))
            self._look(memory)
            save_memory(self.store, memory)
            self.outbox.prune()
        except (InputInvalid, OSError) as error:
            self.tell(f"the outcome is not remembered: {error}")
        if not done:
            self.tell(f"{_named(self.row)} is still being worked on: {_hint(self.row.key)}")
        return result

    async def _trusting(self) -> AgentMemory:
        """The memory of the agent, whose journal has not gone backwards."""
        transport = self.call.transport
        try:
            memory = load_memory(self.store)
            memory.refuse_if_frozen()
            if memory.journal is not None:
                try:
                    await transport.info()  # says how far the journal has got, before it gets any further
                except NoAnswer:
                    if self.row.result is None:  # else nothing is going to be sent
                        raise
                self._look(memory)
                if memory.frozen is not None:
                    save_memory(self.store, memory)
                    memory.refuse_if_frozen()
        except OpsError as error:
            error.executed = self._so_far()
            raise
        return memory

    def _look(self, memory: AgentMemory) -> None:
        """Notes how far the journal has got. That it went back is escalated: once it is saved nobody finds it again."""
        request, transport = self.call.request, self.call.transport
        found = memory.look_at(transport.journal)
        trace_id = request.get("traceId")
        escalate(self.store, found, loop_id=request["loopId"], trace_id=trace_id, transport=transport.name)

    async def _result(self) -> ControlResult:
        """What came of the key: as it is known, as the agent has it, or else of sending."""
        if self.row.result is not None:
            return {**self.row.result, "replayed": True}
        open_ends: OpsError | None = None
        for _ in range(SENDS):
            attached = False
            if self.row.attempts:
                found = await self._asked(open_ends)
                if found is not None and found["state"] == "done":
                    return found
                attached = found is not None
                if not attached:
                    self._refuse_elsewhere()
            try:
                return await self._sent()
            except OpsError as error:
                if error.executed is None:
                    open_ends = error
                    continue
                earlier = self.row.attempts > 1 and (error.retryable or self.row.is_forgotten())
                if open_ends is not None or attached or earlier:
                    told = in_doubt(error)
                    self._keep(self._unknown(told))
                    raise told from None
                self._keep(replace(self.row, state="refused", error=_told(error)))
                raise
        assert open_ends is not None  # noqa: S101  # every way round the loop leaves one
        raise open_ends

    async def _sent(self) -> ControlResult:
        """One send. Its row is on disk first, or nothing is sent."""
        try:
            self.row = self.outbox.save_attempt(self.row)
        except OpsError as error:
            error.executed = self._so_far()
            raise
        request: Any = self.call.request
        request = {**request, "provenance": {**request["provenance"], "attempt": self.row.attempts}}
        try:
            return await self.call.transport.execute(request)
        except OpsError as error:
            if error.executed is None:
                self._keep(self._unknown(error))
            raise
        except OSError as error:  # of this machine, in the midst of what the local transport does
            failed = InternalError(f"{error}; the intent may have been run")
            self._keep(self._unknown(failed))
            raise failed from error

    async def _asked(self, open_ends: OpsError | None) -> ControlResult | None:
        """What the agent knows of the key; None: nothing."""
        try:
            return await self.call.transport.get_control(self.call.request["loopId"], self.row.key)
        except ControlNotFound:
            return None
        except OpsError as error:
            raise open_ends or in_doubt(error) from None

    def _refuse_elsewhere(self) -> None:
        """Returns where the row was sent to: another agent's journal does not know what ran elsewhere."""
        here, there = (self.call.transport.name, self.address), (self.row.transport, self.row.address)
        if here != there:
            error = InputInvalid(
                f"{_named(self.row)} was sent over {_place(*there)}, and nothing is known of it over {_place(*here)};"
                " find out there"
            )
            error.executed = None
            raise error

    def _so_far(self) -> bool | None:
        """Whether something was run for the row, beside what it says: it is not known, or nothing was sent."""
        return None if self.row.attempts and self.row.result is None else False

    def _unknown(self, error: OpsError | None) -> Row:
        return replace(self.row, state="unknown", error=self.row.error if error is None else _told(error))

    def _keep(self, row: Row) -> None:
        try:
            self.row = self.outbox.save(row)
        except InputInvalid as error:
            self.tell(f"the outbox does not have it: {error}")


def _known(outbox: Outbox, request: ControlRequest) -> Row | None:
    """The row of a request's key; None: there is none, or nothing was run for it.

    Raises:
        IdempotencyKeyReused: it is that of another request.
    """
    row = outbox.load(request["idempotencyKey"])
    if row is None or row.state == "refused":
        return None
    expected = {name: value for name, value in row.request.items() if name in _EXPECTATIONS}
    if fingerprint({**expected, **request}) != fingerprint(row.request):  # type: ignore[typeddict-item]  # of its keys
        raise IdempotencyKeyReused(
            f"key {row.key} belongs to another request, {_named(row)}; use another key",
            details={"idempotencyKey": row.key},
        )
    return row


def _named(row: Row) -> str:
    return f"{row.request['intent']} with key {row.key} of {row.created_at}"


def _hint(key: str) -> str:
    return f"opsmgr control --resume {key}"


def _place(transport: str, address: str | None) -> str:
    return transport if address is None else f"{transport} to {address}"


def _told(error: OpsError) -> dict[str, str]:
    return {"reason": error.reason, "message": str(error)[:2000]}
