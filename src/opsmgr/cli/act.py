"""Commands that act, or look for the effect of having acted: control, confirm."""

from __future__ import annotations

import asyncio
import getpass
import sys
from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import EXIT_AMBIGUOUS, for_people, note, print_json, printable, reported
from opsmgr.cli.target import Seconds, target_options

if TYPE_CHECKING:
    from opsmgr.cli.target import Target
    from sprite_agent.contract.envelopes import ControlResult

_INTENT = click.option("--intent", type=click.Choice(["cancel", "approve", "reject"]), required=True)
_EFFECT = click.option(
    "--confirm",
    "required",
    type=click.Choice(["completion", "decision"]),
    default="completion",
    show_default=True,
    help="The effect that counts as confirmed. An approve completes only when the run is started again.",
)
_REQUIRED = {"completion": "completed", "decision": "decision_recorded"}


@click.command()
@target_options
@_INTENT
@click.option("--by", help="Who asks. [default: the user's name]")
@click.option("--note", "why", help="Why.")
@click.option("--idempotency-key", help="Asking again with the same key runs nothing twice. [default: a new one]")
@click.option(
    "--timeout-seconds",
    type=Seconds(0, 120),
    default=30.0,
    show_default=True,
    help="How long to look for the effect.",
)
@click.option("--no-confirm", is_flag=True, help="Do not look for the effect.")
@_EFFECT
@click.option("--expected-run-id", help="Refuse unless this is the run at hand.")
@click.option("--expected-iteration", type=click.IntRange(min=0), help="Refuse unless this is the iteration at hand.")
@click.option("--expected-approval-digest", metavar="SHA256", help="Refuse unless approval.json is this one.")
@click.option("--trace-id", help="Correlates logs on both sides.")
@click.option("--pretty", is_flag=True, help="Indented JSON.")
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def control(
    *,
    target: Target,
    intent: Any,
    by: str | None,
    why: str | None,
    idempotency_key: str | None,
    timeout_seconds: float,
    no_confirm: bool,
    required: str,
    expected_run_id: str | None,
    expected_iteration: int | None,
    expected_approval_digest: str | None,
    trace_id: str | None,
    pretty: bool,
    json: bool,
) -> None:
    """Cancels, approves or rejects, exactly once; looks for the effect; records it in intents.jsonl.

    Exits with 0 when confirmed (or run, with --no-confirm), 2 when the effect was not seen in time, 1 when it failed or
    was refused, 3 when no answer came: then ask again with the same --idempotency-key.
    """
    from opsmgr.control import exit_code, new_key, send

    key = idempotency_key or new_key(intent)
    given = {
        "note": why,
        "traceId": trace_id,
        "expectedRunId": expected_run_id,
        "expectedIteration": expected_iteration,
        "expectedApprovalDigest": expected_approval_digest,
    }
    confirmation = {"mode": "wait", "timeoutSeconds": timeout_seconds, "requiredEffect": _REQUIRED[required]}
    request: Any = {
        "loopId": target.loop,
        "intent": intent,
        "requestedBy": getpass.getuser() if by is None else by,
        "idempotencyKey": key,
        "confirmation": {"mode": "skip"} if no_confirm else confirmation,
        **{name: value for name, value in given.items() if value is not None},
    }

    async def run() -> ControlResult:
        from sprite_agent.errors import OpsError

        async with target.connected() as transport:
            try:
                return await send(transport, target.store(), request, tell=note)
            except OpsError as error:
                if error.executed is None:
                    note(f"the outcome is unknown; find out with --idempotency-key {key}")
                raise

    with reported(json=json, trace_id=trace_id, acts=True):
        result = asyncio.run(run())
        if for_people(json=json):
            click.echo(printable(_sentence(result)))
        else:
            print_json(result, pretty=pretty)
        sys.exit(exit_code(result))


@click.command()
@target_options
@_INTENT
@_EFFECT
@click.option("--timeout-seconds", type=Seconds(min=0), default=30.0, show_default=True, help="How long to look.")
@click.option("--interval-seconds", type=Seconds(min=0.05), default=1.0, show_default=True, help="Between two looks.")
@click.option("--trace-id", help="Passed on into logs.")
@click.option("--pretty", is_flag=True, help="Indented JSON.")
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def confirm(
    *,
    target: Target,
    intent: Any,
    required: str,
    timeout_seconds: float,
    interval_seconds: float,
    trace_id: str | None,
    pretty: bool,
    json: bool,
) -> None:
    """Looks whether an intent's effect shows; runs nothing. Exits with 0 when it does, 2 when it does not in time."""

    async def run() -> Any:
        from opsmgr.confirm import confirm

        async with target.connected() as transport:
            return await confirm(
                transport,
                target.loop,
                intent,
                timeout=timeout_seconds,
                interval=interval_seconds,
                required=_REQUIRED[required],  # type: ignore[arg-type]  # two of the three effects
                trace_id=trace_id,
            )

    with reported(json=json, trace_id=trace_id):
        record = asyncio.run(run())
        if for_people(json=json):
            verdict = "confirmed" if record["confirmed"] else "not confirmed"
            click.echo(f"{intent} {verdict}: {record['reason']} (status {record['observedStatus']})")
        else:
            print_json(record, pretty=pretty)
        sys.exit(0 if record["confirmed"] else EXIT_AMBIGUOUS)


@click.command()
@target_options
@click.option("--yes", is_flag=True, help="Do not ask.")
def unfreeze(*, target: Target, yes: bool) -> None:
    """Lets control of the loop go on after its agent's journal went backwards; reaches for no agent.

    Look first what the agent may have forgotten: 'sprite-agent audit' there, intents.jsonl here.
    """
    from opsmgr import agent_memory

    with reported(json=False):
        store = target.store()
        frozen = agent_memory.load_memory(store).frozen
        if frozen is None:
            click.echo("control is not frozen")
            return
        if not yes:
            click.confirm(f"Control is frozen: {printable(frozen)}. Go on", abort=True, err=True)
        agent_memory.unfreeze(store)
        click.echo("control is no longer frozen")


def _sentence(result: ControlResult) -> str:
    replayed = " (recorded earlier)" if result["replayed"] else ""
    detail = f": {result['detail']}" if result["detail"] else ""
    return (
        f"{result['intent']} {result['status']}, {result['reason']}{detail}{replayed}  key {result['idempotencyKey']}"
    )
