"""Signed requests: a manager's proof that one attempt is its own, made over the bytes as they are sent.

A signature is a compact JWT, made with Ed25519, in the metadata of the call. It names the
Sprite, the method, the bytes and the bearer token that it goes with, so it is of no use for
anything else; and it is good for one attempt, so every other attempt is signed anew.
`proofs` checks them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt import PyJWS

from sprite_agent.contract.secrets import read_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIGNATURE_KEY = "x-ops-signature"
"""The metadata that carries it."""
ALGORITHM = "EdDSA"
TYPE = "ops-req+jwt"
LIFETIME = 30
"""Seconds from when a signature is made until it ends."""
MAX_TRACE_ID = 256
"""Characters; a longer one is not named by itself, but is part of what is signed anyway."""

KeyId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Issuer = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._:-]{0,63}\Z")]

_JWS = PyJWS(algorithms=[ALGORITHM])


class Signer:
    """Signs requests to one Sprite's agent with a key of a manager's. Any thread may call."""

    def __init__(
        self,
        *,
        key: Ed25519PrivateKey,
        key_id: str,
        issuer: str,
        audience: str,
        actor: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Makes one.

        Args:
            key: the private key.
            key_id: its name among the agent's trusted keys.
            issuer: this manager.
            audience: the Sprite's id, as its agent was told; never as the agent tells.
            actor: whom the manager acts for, where a request does not say.
            now: Unix time.
        """
        self.key_id = key_id
        self.issuer = issuer
        self.audience = audience
        self._key = key
        self._actor = actor
        self._now = now

    def sign(
        self, method: str, body: bytes, *, token: str | None, actor: str | None = None, trace_id: str | None = None
    ) -> str:
        """The signature of one attempt to send `body`; another attempt needs another.

        Args:
            method: with its service, as in /sprite_agent.v1.SpriteAgentService/GetInfo.
            body: the very bytes that are sent.
            token: the bearer token that goes along.
            actor: whom the manager acts for; a control needs one.
            trace_id: correlates logs.
        """
        now = int(self._now())
        acting = self._actor if actor is None else actor
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "aud": self.audience,
            "iat": now,
            "exp": now + LIFETIME,
            "jti": str(uuid.uuid4()),
            "rpc": method,
            "bd": digest(body),
            "bl": len(body),
        }
        if token is not None:
            claims["ath"] = digest(token.encode())
        if acting is not None:
            claims["act"] = acting
        if trace_id is not None and len(trace_id) <= MAX_TRACE_ID:
            claims["trc"] = trace_id
        payload = json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()
        return _JWS.encode(payload, self._key, algorithm=ALGORITHM, headers={"typ": TYPE, "kid": self.key_id})


class PrivateKey(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a manager's key file holds."""

    kid: KeyId
    iss: Issuer
    x: str
    """The public half, base64url."""
    d: str
    """The private half, base64url."""
    aud: str | None = None
    """The Sprite whose agent it is for; None: any that trusts it."""

    @classmethod
    def new(cls, *, key_id: str, issuer: str, audience: str | None) -> PrivateKey:
        """A new key."""
        key = Ed25519PrivateKey.generate()
        x, d = encode(key.public_key().public_bytes_raw()), encode(key.private_bytes_raw())
        return cls(kid=key_id, iss=issuer, x=x, d=d, aud=audience)

    def __repr__(self) -> str:
        return f"PrivateKey(kid={self.kid!r}, iss={self.iss!r})"

    @property
    def text(self) -> bytes:
        """The content of its file."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @property
    def key(self) -> Ed25519PrivateKey:
        """The private key."""
        return Ed25519PrivateKey.from_private_bytes(decode(self.d))


def load_signer(path: Path, *, audience: str | None = None, actor: str | None = None) -> Signer:
    """The signer with the private key in a file, as `sprite-agent keys pair` makes it.

    Args:
        path: the file; nobody but its owner may read it.
        audience: the Sprite's id; None: the one that the file names.
        actor: whom the manager acts for, where a request does not say.

    Raises:
        ValueError: it holds no such key, others may read it, or no Sprite is named.
    """
    found = read_private_key(path)
    wanted = audience or found.aud
    if wanted is None:
        raise ValueError(f"key file {path} names no Sprite and none was given: whose agent are the requests for?")
    return Signer(key=found.key, key_id=found.kid, issuer=found.iss, audience=wanted, actor=actor)


def read_private_key(path: Path) -> PrivateKey:
    """What a manager's key file holds.

    Raises:
        ValueError: it holds no such key, or others may read it. The message has nothing of its content.
    """
    content = read_private(path, "key file")
    try:
        found = msgspec.json.decode(content, type=PrivateKey)
        public = encode(found.key.public_key().public_bytes_raw())
    except (ValueError, RecursionError):
        # Without its cause: that would tell of the content.
        raise ValueError(f"key file {path} holds no key: make one with sprite-agent keys pair") from None
    if public != found.x:
        raise ValueError(f"key file {path} holds two halves that do not belong together")
    return found


def encode(content: bytes) -> str:
    """Base64url, without padding."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """The bytes that `text` is the encoding of; they have no other.

    Raises:
        ValueError: there are none.
    """
    content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if encode(content) != text:
        raise binascii.Error("not the way these bytes are written")
    return content


def digest(content: bytes) -> str:
    """SHA-256, base64url."""
    return encode(hashlib.sha256(content).digest())
