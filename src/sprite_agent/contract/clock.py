"""Times as the contract writes them."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """This moment: RFC 3339, UTC, whole seconds, Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
