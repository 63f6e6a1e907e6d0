"""Who makes a call, as far as that was proved."""

from __future__ import annotations

import os
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """A verified signature: who vouches for one attempt, and for whom."""

    issuer: str
    """The manager that signed."""
    key_id: str
    actor: str | None
    """The person or service the manager acts for."""
    nonce: str
    """Used once: the signature's own id."""
    expires: float
    """Unix time until which the nonce has to be remembered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """One caller. Recorded with what it asked for, never part of what makes two requests equal."""

    identity: str
    """The name limits and records go by: of the token, of the issuer, or how the agent was reached."""
    address: str | None = None
    """Where the call came from."""
    proof: Proof | None = None


THIS_USER = Caller(identity=f"local:{os.getuid()}")
"""Who calls without an agent between: the user of this process."""

ANONYMOUS = Caller(identity="anonymous")
"""Who has proved nothing."""

CALLER: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)
"""Who makes the call at hand; set around its handler."""

CERTIFICATE_NAMES: ContextVar[tuple[str, ...]] = ContextVar("certificate_names", default=())
"""The names in the certificate that the call at hand came with; set around its handler."""
