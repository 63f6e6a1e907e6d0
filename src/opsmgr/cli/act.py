"""Commands that act, or look for the effect of having acted: control and its short forms, confirm, unfreeze."""

from __future__ import annotations

import getpass
import sys
from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import EXIT_AMBIGUOUS, for_people, print_json, printable, reported
from opsmgr.cli.target import Seconds, target_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.targets import Target
    from sprite_agent.contract.envelopes import ControlResult, Intent

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
_CONTROL = (
    click.option("--by", help="Who asks. [default: the user's name]"),
    click.option("--note", "why", help="Why."),
    click.option("--idempotency-key", help="Asking again with the same key runs nothing twice. [default: a new one]"),
    click.option(
        "--resume",
        metavar="KEY",
        help="Find out what has become of an intent that was begun; send it, the same, where its key is not known.",
    ),
    click.option("--yes", is_flag=True, help="Do not ask, on a terminal."),
    click.option(
        "--timeout-seconds",
        type=Seconds(0, 120),
        default=30.0,
        show_default=True,
        help="How long to look for the effect.",
    ),
    click.option("--no-confirm", is_flag=True, help="Do not look for the effect."),
    _EFFECT,
    click.option("--expected-run-id", help="Refuse unless this is the run at hand. [default: as shown]"),
    click.option(
        "--expected-iteration",
        type=click.IntRange(min=0),
        help="Refuse unless this is the iteration at hand. [default: as shown]",
    ),
    click.option(
        "--expected-approval-digest",
        metavar="SHA256",
        help="Refuse unless approval.json is this one. [default: as shown]",
    ),
    click.option("--trace-id", help="Correlates logs on both sides."),
    click.option("--pretty", is_flag=True, help="Indented JSON."),
    click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors."),
)


def _control_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_CONTROL):
        command = option(command)
    return command


@click.command()
@target_options
@click.option("--intent", type=click.Choice(["cancel", "approve", "reject"]), help="Required, but for what is resumed.")
@_control_options
def control(*, intent: Intent | None, **options: Any) -> None:
    """Cancels, approves or rejects, exactly once; looks for the effect; records it in intents.jsonl.

    On a terminal it shows what it is about to act on, and asks. The intent is refused when that has changed by the
    time it arrives. Exits with 0 when confirmed (or run, with --no-confirm), 2 when the effect was not seen in time,
    1 when it failed or was refused, 3 when no answer came: --resume with the key finds out.
    """
    if intent is None and options["resume"] is None:
        raise click.UsageError("Missing option '--intent'.")
    _control(intent=intent, **options)


@click.command()
@target_options
@_control_options
def approve(**options: Any) -> None:
    """Approves what the loop asks for: control --intent approve."""
    _control(intent="approve", **options)


@click.command()
@target_options
@_control_options
def reject(**options: Any) -> None:
    """Rejects what the loop asks for: control --intent reject."""
    _control(intent="reject", **options)


@click.command()
@target_options
@_control_options
def cancel(**options: Any) -> None:
    """Cancels the run: control --intent cancel."""
    _control(intent="cancel", **options)


def _control(
    *,
    target: Target,
    intent: Intent | None,
    by: str | None,
    why: str | None,
    idempotency_key: str | None,
    resume: str | None,
    yes: bool,
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
    if resume is not None and idempotency_key not in (None, resume):
        raise click.UsageError("--resume names the key; leave out --idempotency-key")
    from opsmgr.cli import acting
    from opsmgr.intents.control import exit_code, new_key

    given = {
        "note": why,
        "traceId": trace_id,
        "expectedRunId": expected_run_id,
        "expectedIteration": expected_iteration,
        "expectedApprovalDigest": expected_approval_digest,
    }
    confirmation = {"mode": "wait", "timeoutSeconds": timeout_seconds, "requiredEffect": _REQUIRED[required]}

    with reported(json=json, trace_id=trace_id, acts=True):
        result: ControlResult | None = None
        if resume is not None:
            result = acting.resumed(target, resume, intent)
        if result is None and intent is not None:
            request: Any = {
                "loopId": target.loop,
                "intent": intent,
                "requestedBy": getpass.getuser() if by is None else by,
                "idempotencyKey": resume or idempotency_key or new_key(intent),
                "confirmation": {"mode": "skip"} if no_confirm else confirmation,
                **{name: value for name, value in given.items() if value is not None},
            }
            result = acting.sent(target, request, yes=yes)
        assert result is not None  # noqa: S101  # what can't be resumed without an intent is refused
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
    import asyncio

    async def run() -> Any:
        from opsmgr.intents.confirm import confirm

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
