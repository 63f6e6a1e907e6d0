"""Single flight: of all the calls of a process that are about one key, one works on it and the others wait."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from sprite_agent.errors import ControlBusy

if TYPE_CHECKING:
    from collections.abc import Iterator


class Flights:
    """The keys that are being worked on. Lives as long as its engine; any thread may call."""

    def __init__(self) -> None:
        # Guards the table; nothing is done under it but looking up.
        self._lock = threading.Lock()
        self._flying: dict[tuple[str, str], threading.Event] = {}

    @contextlib.contextmanager
    def join(self, place: tuple[str, str], deadline: float) -> Iterator[bool]:
        """Gives True to the call that leads; the others are held up until it has landed, and then given False.

        Raises:
            ControlBusy: it has not by the deadline, a moment on the monotonic clock.
        """
        with self._lock:
            landed = self._flying.get(place)
            leads = landed is None
            if landed is None:
                landed = self._flying[place] = threading.Event()
        if not leads:
            if not landed.wait(max(0.0, deadline - time.monotonic())):
                raise ControlBusy(
                    f"key {place[1]!r} is still being worked on; ask again with the same key", retry_after=1.0
                )
            yield False
            return
        try:
            yield True
        finally:
            with self._lock:
                del self._flying[place]
            landed.set()
