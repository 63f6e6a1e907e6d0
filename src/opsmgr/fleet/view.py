"""What the daemon knows of one target right now, and how that is told: the row of a status document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from opsmgr.overview import build_row
from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member

if TYPE_CHECKING:
    from opsmgr.targets import Target
    from sprite_agent.errors import OpsError

Rung = Literal["stream", "poll", "local", "none"]
"""How a target is read, best first."""

Reach = Literal["starting", "connected", "reconnecting", "unreachable", "suspended"]
"""Whether a target can be read. Suspended: its Sprite sleeps, which is no fault."""

RUNGS: tuple[Rung, ...] = ("stream", "poll", "local", "none")
REACHES: tuple[Reach, ...] = ("starting", "connected", "reconnecting", "unreachable", "suspended")


@dataclass(kw_only=True, slots=True)
class TargetView:
    """One target as it is seen now. Lives as long as it is supervised; changed by its supervision only."""

    target: Target
    rung: Rung = "none"
    reach: Reach = "starting"
    state: dict[str, Any] | None = None
    """The manager's state after the last pass."""
    health: dict[str, Any] | None = None
    frozen: str | None = None
    error: OpsError | None = None
    """Why it could not be read last; None: it could."""
    received_line: int = 0
    """The last line that the subscription has brought."""
    log_lines: int = 0
    """Lines in the log when it was heard of last."""
    retries: int = 0
    reconnects: int = 0
    contact: float | None = None
    """When the target answered last, by the monotonic clock."""
    updated_at: str | None = None

    @property
    def behind_lines(self) -> int:
        """How many lines of the log have not come yet."""
        return max(0, self.log_lines - self.received_line)

    @property
    def runs(self) -> bool:
        """Whether a run was at work when the loop was seen last."""
        return bool(member(member(self.state, "projection"), "status") == "running")

    @property
    def awaits_approval(self) -> bool:
        """Whether an approval was pending when the loop was seen last."""
        return member(member(self.state, "projection"), "hasPendingApproval") is True

    def touch(self) -> None:
        """Notes that something has changed."""
        self.updated_at = clock.now()

    def row(self) -> dict[str, Any]:
        """As it stands in a status document, see schema/manager_status.schema.json."""
        return build_row(
            self.target,
            rung=self.rung,
            reach=self.reach,
            state=self.state,
            health=self.health,
            frozen=self.frozen,
            error=self.error,
            cursor_line=self.received_line,
            behind_lines=self.behind_lines,
            retries=self.retries,
            reconnects=self.reconnects,
            updated_at=self.updated_at,
        )
