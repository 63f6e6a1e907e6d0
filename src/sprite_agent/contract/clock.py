"""Times as the contract writes them."""

from __future__ import annotations

import functools
import time


def now() -> str:
    """This moment: RFC 3339, UTC, whole seconds, Z."""
    return _written(int(time.time()))


@functools.lru_cache(maxsize=1)
def _written(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
