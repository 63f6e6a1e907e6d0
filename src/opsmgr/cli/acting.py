"""What a control command does: shows what it is about to act on, asks, sends; or resumes what was begun."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import ago, note, printable
from opsmgr.errors import InputInvalid, NoAnswer
from opsmgr.intents.at_hand import look
from opsmgr.intents.control import ask, resume, row_to_resume, send
from opsmgr.intents.control_records import Invocation
from opsmgr.intents.outbox import Outbox
from sprite_agent.contract.json_text import member
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsmgr.intents.at_hand import AtHand
    from opsmgr.targets import Target
    from sprite_agent.contract.envelopes import ControlRequest, ControlResult, Intent


def resumed(target: Target, key: str, intent: Intent | None) -> ControlResult | None:
    """What has become of a key; None: it is new, and the intent that was given may be sent with it.

    Raises:
        OpsError: it can't be said, or there is nothing to resume.
    """

    async def run() -> ControlResult | None:
        store = target.store()
        row = row_to_resume(store, key)
        if row is None and intent is None:
            raise InputInvalid(f"nothing was begun here with key {key}: there is nothing to resume; give an --intent")
        if row is not None and intent not in (None, row.request["intent"]):
            raise InputInvalid(f"key {key} belongs to {row.request['intent']}, not to {intent}")
        if row is not None and row.result is not None:
            return {**row.result, "replayed": True}
        async with target.connected() as transport:
            if row is not None:
                return await resume(transport, store, row, address=target.address, tell=note)
            return None if intent is None else await ask(transport, target.loop, key, intent)

    with _hinted(key):
        return asyncio.run(run())


def sent(target: Target, request: ControlRequest, *, yes: bool) -> ControlResult:
    """Shows what the intent is about to act on, asks on a terminal unless `yes`, and sends it.

    What was shown must still be so when it arrives, unless the request says itself what must be so.

    Raises:
        OpsError: as opsmgr.intents.control.send says.
        click.Abort: the answer was no.
    """
    store = target.store()
    row = Outbox(store).load(request["idempotencyKey"])
    # One event loop for both calls: gRPC does not do well with a second one.
    with asyncio.Runner() as runner:
        if row is None or row.state == "refused":
            at_hand = runner.run(_looked(target, request))
            if sys.stderr.isatty():
                click.echo(block(at_hand, target), err=True)
                if sys.stdin.isatty() and not yes:
                    # Asked while the loop rests: one that runs would swallow the Ctrl-C that is meant as a no.
                    click.confirm(f"{request['intent'].capitalize()}?", abort=True, err=True)
            request = {**at_hand.preconditions(), **request}  # type: ignore[typeddict-item]  # of its keys

        async def run() -> ControlResult:
            async with target.connected() as transport:
                return await send(transport, store, request, address=target.address, tell=note)

        with _hinted(request["idempotencyKey"]):
            return runner.run(run())


def block(at_hand: AtHand, target: Target) -> str:
    """What is at hand, for people, a line each; the Sprite's words are without control characters."""
    snapshot = at_hand.snapshot
    approval = snapshot["runtime"]["approval"]
    candidate = member(approval, "candidate")
    gates = snapshot["health"]["gates"] or {}
    where = target.transport if target.address is None else f"{target.transport} {target.address}"
    run, iteration = at_hand.run_id or snapshot["run"]["runId"], at_hand.iteration
    facts = {
        "status": f"{snapshot['run']['status']}, over {where}",
        "run": f"{run}, iteration {snapshot['run']['iteration'] if iteration is None else iteration}",
        "gates": ", ".join(f"{name} {verdict}" for name, verdict in gates.items()) or "not reported",
        "promise": _promise(member(candidate, "promise") or member(snapshot["run"]["summary"], "promise")),
        "approval": _approval(approval),
        "digest": at_hand.approval_digest,
    }
    width = max(len(name) for name in facts)
    shown = [f"  {name:<{width}}  {printable(str(fact))}" for name, fact in facts.items() if fact is not None]
    return "\n".join([f"loop {target.loop}", *shown])


@contextlib.contextmanager
def _hinted(key: str) -> Iterator[None]:
    """Says how to find out, where the block ends without an outcome."""
    try:
        yield
    except OpsError as error:
        if error.executed is None:
            note(f"the outcome is unknown; find out with 'opsmgr control --resume {key}'")
        raise


async def _looked(target: Target, request: ControlRequest) -> AtHand:
    """A look at what the request would act on. Where that fails nothing is sent, which is recorded."""
    async with target.connected() as transport:
        call = Invocation(transport=transport, request=request)
        try:
            return await look(transport, request["loopId"], request["intent"], trace_id=request.get("traceId"))
        except OpsError as error:
            error.executed = False
            if isinstance(error, NoAnswer):
                note("nothing was sent: the loop can't be looked at")
            call.failed(target.store(), error, tell=note)
            raise


def _promise(promise: Any) -> str:
    expected, said, matched = (member(promise, name) for name in ("expected", "text", "matched"))
    if matched is True:
        return f"kept: {said}"
    return "not reported" if promise is None else f"not kept: expected {expected}, got {said}"


def _approval(approval: Any) -> str:
    status = member(approval, "status")
    if status is None:
        return "not asked for"
    since = member(approval, "requested_at")
    return str(status) if since is None else f"{status}, asked for {ago(since)}, at {since}"
