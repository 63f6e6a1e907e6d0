"""Which texts are loop ids: single plain path components."""

from __future__ import annotations

import re

from sprite_agent.errors import LoopIdInvalid

LOOP_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_loop_id(loop_id: str) -> None:
    """Returns if `loop_id` can be one.

    Raises:
        LoopIdInvalid: it is not a single plain path component.
    """
    if not LOOP_ID.fullmatch(loop_id):
        raise LoopIdInvalid(
            f"loop id {loop_id[:80]!r} is not valid: 1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first, no '..'",
            details={"loopId": ascii(loop_id[:80])[1:-1]},
            violations=[("loop_id", "must match [A-Za-z0-9][A-Za-z0-9._-]{0,63} and have no '..'")],
        )
