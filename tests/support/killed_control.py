"""`opsmgr` that kills itself at one place of a control: what tests start in the program's place.

python -m support.killed_control PLACE words of opsmgr ...
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from opsmgr import cli
from opsmgr.intents.control_records import Invocation
from opsmgr.intents.outbox import Outbox
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.errors import ControlNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES = ("before_row", "after_row", "after_send", "after_answer")
"""Of these the first leaves nothing, the others a row."""


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


def _after(real: Callable[..., Any]) -> Callable[..., NoReturn]:
    def then_die(*values: Any) -> NoReturn:
        real(*values)
        _die()

    return then_die


async def _die_once_begun(self: SpriteServiceTransport, request: Any) -> NoReturn:
    """Sends, and dies as soon as the agent has the key: no answer is ever read."""
    sending = asyncio.create_task(_execute(self, request))
    while not sending.done():
        try:
            await self.get_control(request["loopId"], request["idempotencyKey"])
        except ControlNotFound:
            continue
        break
    _die()


_execute = SpriteServiceTransport.execute

_PATCHES: dict[str, tuple[type, str, Any]] = {
    "before_row": (Outbox, "save", _die),
    "after_row": (Outbox, "save", _after(Outbox.save)),
    "after_send": (SpriteServiceTransport, "execute", _die_once_begun),
    "after_answer": (Invocation, "came_out", _die),
}

if __name__ == "__main__":
    setattr(*_PATCHES[sys.argv[1]])
    cli.main(sys.argv[2:])
