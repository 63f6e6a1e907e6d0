"""Managers' keys and tokens as the tests need them, and the files an agent knows them by."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt import PyJWS

from sprite_agent.contract.proofs import TrustedKey
from sprite_agent.contract.signatures import Signer, digest
from sprite_agent.face.credential_text import keys_text, token_line
from sprite_agent.face.credentials import new_token
from support.certificates import put

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SPRITE = "sprite-1"
"""As tests/conftest.py has it."""
ALL = ("read", "control")


@dataclass(kw_only=True)
class Clock:
    """Unix time, and as much as a test adds to it."""

    ahead: float = 0.0

    def __call__(self) -> float:
        """The time."""
        return time.time() + self.ahead


@dataclass(frozen=True, kw_only=True)
class Manager:
    """A manager and its key."""

    key_id: str = "m1"
    issuer: str = "opsmgr-1"
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def trusted(self, scopes: Iterable[str] = ALL, **times: float) -> TrustedKey:
        """What an agent knows of it."""
        return TrustedKey(
            key_id=self.key_id,
            issuer=self.issuer,
            public=self.key.public_key(),
            scopes=frozenset(scopes),
            **times,
        )

    def signer(self, **members: Any) -> Signer:
        """What it signs with; each member can be given another value."""
        given = {"key": self.key, "key_id": self.key_id, "issuer": self.issuer, "audience": SPRITE}
        return Signer(**{**given, **members})

    def signed(
        self,
        method: str,
        body: bytes,
        *,
        token: str | None,
        header: dict[str, Any] | None = None,
        payload: bytes | None = None,
        **claims: Any,
    ) -> str:
        """A signature whose header and claims can be given any values, right or wrong; None takes one out."""
        now = int(time.time())
        right = {
            "iss": self.issuer,
            "aud": SPRITE,
            "iat": now,
            "exp": now + 30,
            "jti": f"{time.time_ns()}-of-the-tests",
            "rpc": method,
            "bd": digest(body),
            "bl": len(body),
            "ath": None if token is None else digest(token.encode()),
            "act": "ada",
        }
        given = {name: value for name, value in {**right, **claims}.items() if value is not None}
        text = json.dumps(given).encode() if payload is None else payload
        headers = {"typ": "ops-req+jwt", "kid": self.key_id, **(header or {})}
        return PyJWS().encode(text, self.key, algorithm="EdDSA", headers=headers)


def put_keys(path: Path, *keys: TrustedKey) -> Path:
    """Puts a file of trusted keys in place of the one that is there."""
    return put(path, keys_text(keys).encode(), mode=0o600)


def put_tokens(path: Path, **scopes: Iterable[str]) -> dict[str, str]:
    """Puts a token file in place of the one that is there: a new token for each id; the tokens, by id."""
    made = {name: new_token(name, each) for name, each in scopes.items()}
    put(path, "".join(f"{token_line(token)}\n" for _, token in made.values()).encode(), mode=0o600)
    return {name: text for name, (text, _) in made.items()}
