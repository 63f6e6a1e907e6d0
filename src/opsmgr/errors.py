"""What can go wrong on the manager's side, beside what the agent refuses (sprite_agent.errors).

OpsError
├── NoAnswer            it is not known what became of the request: reads may be retried, a control is asked for again
│                       with the same key
│   └── NotReached          no connection was made: nothing was sent
├── TransportRefused    something before the agent refused, for good
├── Refused
│   ├── InputInvalid    a file or value that was given to the manager
│   ├── LoopLocked      another manager works on the loop
│   └── AgentStateRolledBack  the agent's journal went backwards: what it has run, it may not know any more
"""

from __future__ import annotations

from sprite_agent.errors import OpsError, Refused


class NoAnswer(OpsError):
    """No answer came, or none that the agent made. What became of the request is unknown."""

    status = "UNAVAILABLE"
    reason = "NO_ANSWER"
    retryable = True
    executed: bool | None = None


class NotReached(NoAnswer):
    """No connection was made, so nothing was sent, and nothing was run."""

    reason = "NOT_REACHED"
    executed = False

    def __init__(self, told: str, *, details: dict[str, str]) -> None:
        """`told`: why no connection was made."""
        super().__init__(f"{told}; nothing was sent", details=details)
        self.told = told


class TransportRefused(Refused):
    """Something on the way, or no agent at all, refused the call: another try will not do better."""

    status = "UNIMPLEMENTED"
    reason = "TRANSPORT_REFUSED"


class InputInvalid(Refused):
    """A file or value given to the manager is not what it should be."""

    status = "INVALID_ARGUMENT"
    reason = "INPUT_INVALID"


class LoopLocked(Refused):
    """Another manager works on the loop's files."""

    status = "FAILED_PRECONDITION"
    reason = "LOOP_LOCKED"


class AgentStateRolledBack(Refused):
    """The agent's journal went backwards, so a key that was run may count as new. Look into it, then unfreeze."""

    status = "FAILED_PRECONDITION"
    reason = "AGENT_STATE_ROLLED_BACK"


def in_doubt(error: OpsError) -> OpsError:
    """`error` of a try after one that may have been run: it tells of its own only, so what was run is not known."""
    if isinstance(error, NotReached):
        earlier = NoAnswer(error.told, details=error.details, retry_after=error.retry_after)
        earlier.retryable, earlier.attempts = error.retryable, error.attempts
        return earlier
    error.executed = None
    return error
