"""Control from the manager's side: sends one intent, and keeps a record of how it came out."""

from __future__ import annotations

import socket
import uuid
from typing import TYPE_CHECKING, Any

from opsmgr import store as files
from opsmgr.agent_memory import load_memory, save_memory
from opsmgr.errors import InputInvalid, NoAnswer
from sprite_agent.contract import clock
from sprite_agent.contract.requests import EXIT_CODES
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.store import LoopStore
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult, Intent

MANAGER_ID = "opsmgr"


def new_key(intent: Intent) -> str:
    """An idempotency key that no other invocation has."""
    return f"{intent}-{uuid.uuid4()}"


async def send(
    transport: Transport, store: LoopStore, request: ControlRequest, *, tell: Callable[[str], None] = lambda _: None
) -> ControlResult:
    """Sends an intent and records it in intents.jsonl, however it comes out.

    A record that can't be written does not change how the intent came out: `tell` is told of it.

    Raises:
        NoAnswer: what became of it is unknown; the same request with the same key finds out.
        AgentStateRolledBack: control is frozen, now or since earlier.
        OpsError: nothing was run, as the error says.
    """
    memory = load_memory(store)
    memory.refuse_if_frozen()
    if memory.journal is not None:
        await transport.info()  # says how far the journal has got, before it gets any further
        if memory.look_at(transport.journal):
            save_memory(store, memory)
            memory.refuse_if_frozen()
    request = {
        "requestedAt": clock.now(),
        **request,
        "provenance": {"managerId": MANAGER_ID, "host": socket.gethostname(), "attempt": 1},
    }
    try:
        result = await transport.execute(request)
    except OpsError as error:
        _keep(store, _record(transport, request, _failed(error)), tell)
        raise
    _keep(store, _record(transport, request, _came_out(result)), tell)
    memory.look_at(transport.journal)
    try:
        save_memory(store, memory)
    except InputInvalid as error:
        tell(f"the agent's journal is not remembered: {error}")
    return result


def _keep(store: LoopStore, record: dict[str, Any], tell: Callable[[str], None]) -> None:
    try:
        files.append(store.intents, record)
    except InputInvalid as error:
        tell(f"the intent is not recorded: {error}")


def _came_out(result: ControlResult) -> dict[str, Any]:
    confirmation = result["confirmation"]
    return {
        "status": result["status"],
        "command": result["command"],
        "exitCode": result["exitCode"],
        "confirmExitCode": None if confirmation is None else 0 if confirmation["confirmed"] else 2,
        "confirmed": result["status"] == "confirmed",
        "commandOutput": result["output"],
        "confirm": confirmation,
    }


def _failed(error: OpsError) -> dict[str, Any]:
    # No answer means: it may have run. That is what ambiguous says; a refusal ran nothing.
    unknown = isinstance(error, NoAnswer) or error.executed is None
    return {
        "status": "ambiguous" if unknown else "failed_command",
        "confirmed": False,
        "commandOutput": f"{error.reason}: {error}",
    }


def _record(transport: Transport, request: ControlRequest, outcome: dict[str, Any]) -> dict[str, Any]:
    record = {
        "timestamp": clock.now(),
        "loopId": request["loopId"],
        "intent": request["intent"],
        "traceId": request.get("traceId"),
        "requestedBy": request["requestedBy"],
        "note": request.get("note"),
        "transport": transport.name,
        "idempotencyKey": request["idempotencyKey"],
        **outcome,
    }
    return {name: value for name, value in record.items() if value is not None}


def exit_code(result: ControlResult) -> int:
    """The exit code of a control command."""
    status = result["status"]
    return EXIT_CODES[status] if status is not None else EXIT_CODES["ambiguous"]
