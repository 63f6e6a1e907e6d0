"""What an intent would act on: the run, its iteration and its approval request, as the operator is shown them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sprite_agent.contract.events import whole_number
from sprite_agent.contract.json_text import member
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.envelopes import EventEnvelope, Intent, SnapshotEnvelope

_MAX_RUN_ID = 256
"""Characters of a run id that a request can expect."""
_FURTHER = 16
"""Times as many lines in each look for the last event as in the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AtHand:
    """One look at a loop, for one intent."""

    snapshot: SnapshotEnvelope
    run_id: str | None
    """The run that the agent would hold an expectation against; None: it is not known."""
    iteration: int | None
    """Likewise its iteration; None also for a cancel, which is meant for the run whatever its iteration."""
    approval_digest: str | None
    """SHA-256 of the approval request; None: there is none, or a cancel does not care."""

    def preconditions(self) -> dict[str, Any]:
        """The members of a request that have it refused unless this is still so."""
        expected = {
            "expectedRunId": self.run_id,
            "expectedIteration": self.iteration,
            "expectedApprovalDigest": self.approval_digest,
        }
        return {name: value for name, value in expected.items() if value is not None}


async def look(transport: Transport, loop_id: str, intent: Intent, *, trace_id: str | None = None) -> AtHand:
    """Looks at what an intent would act on.

    Raises:
        OpsError: the loop can't be read.
    """
    snapshot = (await transport.snapshot(loop_id, trace_id=trace_id)).envelope
    return await look_at(transport, snapshot, intent)


async def look_at(transport: Transport, snapshot: SnapshotEnvelope, intent: Intent) -> AtHand:
    """What an intent would act on that is decided by this snapshot.

    Raises:
        OpsError: the loop can't be read.
    """
    if intent == "cancel":
        # Not the snapshot's run: a run that has just started has no summary yet, and this would be the one before.
        run_id = await _run_of_last_event(transport, snapshot) or snapshot["run"]["runId"]
        return AtHand(snapshot=snapshot, run_id=_expectable(run_id), iteration=None, approval_digest=None)
    approval = snapshot["runtime"]["approval"]
    iteration = member(approval, "iteration")
    return AtHand(
        snapshot=snapshot,
        run_id=_expectable(member(approval, "run_id") or snapshot["run"]["runId"]),
        iteration=_whole(snapshot["run"]["iteration"] if iteration is None else whole_number(iteration)),
        approval_digest=snapshot["artifacts"]["approval"]["sha256"],
    )


async def _run_of_last_event(transport: Transport, snapshot: SnapshotEnvelope) -> str | None:
    """The run of the last event; None: there is no event, or it can't be read."""
    last = await last_event(transport, snapshot)
    return None if last is None or last["run"]["runId"] == "unknown" else last["run"]["runId"]


async def last_event(transport: Transport, snapshot: SnapshotEnvelope) -> EventEnvelope | None:
    """The last event up to where a snapshot was taken; None: there is none, or it can't be read.

    The last line need not be one: it may be blank, or of an object that is not closed yet. So it is looked for ever
    further back.
    """
    end = snapshot["cursor"]["eventLineOffset"]
    found: EventEnvelope | None = None
    with contextlib.suppress(OpsError):
        back = 1
        while found is None and back < end * _FURTHER:
            query = EventQuery(loop_id=snapshot["source"]["loopId"], after_line=max(0, end - back), skip_malformed=True)
            async with contextlib.aclosing(transport.events(query)) as batches:
                async for batch in batches:
                    within = [event for event in batch.events if event["cursor"]["eventLineOffset"] <= end]
                    found = within[-1] if within else found
            back *= _FURTHER
    return found


def _expectable(run_id: Any) -> str | None:
    return run_id if isinstance(run_id, str) and run_id != "unknown" and 0 < len(run_id) <= _MAX_RUN_ID else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None
