"""Who may do what: bearer tokens, known by their digests only, and managers' public keys, each with its scopes.

Nothing here is a secret, because sandbox code may be able to read what the agent can.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sprite_agent.contract.proofs import TrustedKey

READ = "read"
CONTROL = "control"
SCOPES = (READ, CONTROL, "control:cancel", "control:approve", "control:reject")
"""What a token or a key may be good for: reading, every control, or one kind of it."""

Requirement = Literal["control", "all", "none"]
"""Which calls have to be signed: those that may run something, all of them, or none."""

_SECRET_BYTES = 32
_SECRET_CHARACTERS = 43
"""The same in base64url."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One bearer token, as the agent knows it."""

    id: str
    digest: bytes = field(repr=False)
    """SHA-256 of the token."""
    scopes: frozenset[str]
    until: float | None = None
    """Unix time after which it does not count; None: it always does."""
    made_here: bool = True
    """It has the form that `new_token` gives, so it can't be guessed from its digest; else it is what was agreed on."""

    def is_valid(self, now: float) -> bool:
        """Whether it counts at a moment."""
        return self.until is None or now <= self.until

    def has_form_of(self, text: str) -> bool:
        """Whether `text` may be it by its form."""
        prefix = _prefix(self.id)
        return not self.made_here or (text.startswith(prefix) and len(text) == len(prefix) + _SECRET_CHARACTERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """All that an agent knows callers by, at one time."""

    tokens: tuple[Token, ...] = ()
    keys: Mapping[str, TrustedKey] = field(default_factory=dict)
    """By key id."""
    keys_digest: str | None = None
    """SHA-256 of the file that the keys are from, lower-case hex; None: there is none."""

    def find_token(self, text: str, now: float) -> Token | None:
        """The token that `text` is; None: none, or one that does not count. It takes the same time for all of these."""
        digest = digest_of(text)
        same = [token for token in self.tokens if hmac.compare_digest(token.digest, digest)]
        return next((token for token in same if token.has_form_of(text) and token.is_valid(now)), None)


def allows(scopes: Iterable[str], needed: str) -> bool:
    """Whether scopes allow what needs `needed`; `control` allows every kind of it."""
    return not {needed, needed.partition(":")[0]}.isdisjoint(scopes)


def allows_some_control(scopes: Iterable[str]) -> bool:
    """Whether scopes allow at least one kind of control."""
    return any(scope.partition(":")[0] == CONTROL for scope in scopes)


def agreed_token(text: str) -> Token:
    """A token that was agreed on in another way, good for everything."""
    scopes = frozenset({READ, CONTROL})
    return Token(id="environment", digest=digest_of(text), scopes=scopes, made_here=False)


def new_token(token_id: str, scopes: Iterable[str], *, until: float | None = None) -> tuple[str, Token]:
    """A new bearer token: its text, which is a secret and kept nowhere, and what the agent has to know of it."""
    text = _prefix(token_id) + secrets.token_urlsafe(_SECRET_BYTES)
    return text, Token(id=token_id, digest=digest_of(text), scopes=frozenset(scopes), until=until)


def digest_of(text: str) -> bytes:
    """SHA-256 of a token."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _prefix(token_id: str) -> str:
    return f"spr1.{token_id}."
