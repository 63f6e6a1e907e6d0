"""What an operator has to hear of a pass. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from opsmgr.agent_memory import Escalation
    from opsmgr.passes.ingest import Pass


def find_escalations(
    done: Pass, health: dict[str, Any], last_health: dict[str, Any] | None, *, drifted_before: bool
) -> list[Escalation]:
    """What to escalate, each as a category and its evidence.

    What a pass has found in the log (another log, a malformed record) is told by the pass
    that gets past it: one that fails will find it again.
    """
    found: list[Escalation] = list(done.agent)
    if done.state is not None:
        if done.lost is not None:
            found.append((done.lost.reason.lower(), {"message": str(done.lost), **done.lost.details}))
        found += [
            (
                "event_malformed",
                {
                    "firstLine": each.first.first_line,
                    "lastLine": each.last_line,
                    "reason": each.first.reason,
                    "excerpt": each.first.excerpt,
                    **({"records": each.record_count} if each.record_count > 1 else {}),
                },
            )
            for each in done.malformed
        ]
        if done.state["divergence"]["any"]:
            found.append(
                ("divergence_detected", {"flags": done.state["divergence"]["flags"], "cursor": done.state["cursor"]})
            )
        if done.state["sequence"]["driftActive"] and not drifted_before:
            found.append(("ordering_drift_detected", {"violations": done.state["sequence"]["violations"]}))
    changed = any(member(last_health, key) != health[key] for key in ("status", "reasonCodes"))
    if changed and health["status"] != "healthy":
        found.append((f"health_{health['status']}", {"reasons": health["reasons"]}))
    return found
