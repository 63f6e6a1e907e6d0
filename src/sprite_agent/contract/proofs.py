"""What a signed request proves: checked with nothing but public keys, before anything looks into the request."""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from jwt import InvalidTokenError, PyJWS

from sprite_agent.callers import Proof
from sprite_agent.contract.signatures import ALGORITHM, TYPE, Issuer, KeyId, decode, digest  # noqa: TC001  # msgspec reads them
from sprite_agent.errors import (
    SignatureBodyMismatch,
    SignatureInvalid,
    SignatureKeyExpired,
    SignatureKeyUnknown,
    SignatureMalformed,
    SignatureStale,
    SignatureWrongAudience,
    SignatureWrongMethod,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_SIGNATURE = 4096
"""Characters."""
MAX_LIFETIME = 60
"""Seconds that a signature may last."""
SKEW = 30
"""Seconds by which the two clocks may differ."""

_JWS = PyJWS(algorithms=[ALGORITHM])
_Time = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrustedKey:
    """One key of a manager's, as the agent knows it: to check with, not to sign."""

    key_id: str
    issuer: str
    """The manager."""
    public: Ed25519PublicKey
    scopes: frozenset[str]
    not_before: float | None = None
    """Unix time; None: from ever."""
    not_after: float | None = None
    """Unix time; None: for ever."""

    def is_valid(self, now: float) -> bool:
        """Whether it counts at a moment."""
        begun = self.not_before is None or self.not_before <= now
        return begun and (self.not_after is None or now <= self.not_after)


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    alg: Literal["EdDSA"]
    typ: Literal["ops-req+jwt"]
    kid: KeyId


class _Claims(msgspec.Struct):
    """Others are allowed: they say more of where a request comes from, and nothing rests on them."""

    iss: Issuer
    aud: str
    iat: _Time
    exp: _Time
    jti: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{16,64}\Z")]
    rpc: str
    bd: str
    bl: int
    ath: str | None = None
    act: str | None = None


def verify(
    signature: str,
    *,
    keys: Mapping[str, TrustedKey],
    audience: str,
    method: str,
    body: bytes,
    token: str | None,
    now: float,
) -> Proof:
    """What a signature proves. Whether its key may do this, and whether it was used before, is left to the caller.

    Args:
        signature: as it came.
        keys: the trusted ones, by id.
        audience: this Sprite's id.
        method: the one that is called, with its service.
        body: the bytes that came.
        token: the bearer token that came along.
        now: Unix time.

    Raises:
        SignatureRefused: it proves nothing; by the first check that fails.
    """
    key = _trusted(_header(signature).kid, keys, now)
    claims = _claims(_signed(signature, key))
    if claims.iss != key.issuer:
        raise SignatureKeyUnknown(f"key {key.key_id!r} is another issuer's", details={"keyId": key.key_id})
    if not _same(claims.aud, audience):
        named = ascii(claims.aud[:80])
        raise SignatureWrongAudience(f"the request was signed for {named}, not for this Sprite")
    _check_time(claims, now)
    if not _same(claims.rpc, method):
        raise SignatureWrongMethod(f"the request was signed for another method than {method}")
    if claims.bl != len(body) or not _same(claims.bd, digest(body)):
        raise SignatureBodyMismatch(f"the {len(body)} bytes that came are not those that were signed")
    if not _same(claims.ath or "", "" if token is None else digest(token.encode())):
        raise SignatureBodyMismatch("the request was signed to go with another token than the one that came along")
    return Proof(
        issuer=claims.iss, key_id=key.key_id, actor=claims.act, nonce=claims.jti, expires=float(claims.exp + SKEW)
    )


def _header(signature: str) -> _Header:
    if len(signature) > MAX_SIGNATURE:
        raise SignatureMalformed(f"the signature has {len(signature)} characters; {MAX_SIGNATURE} are the most")
    try:
        # All three, though PyJWT decodes them as well: it takes several texts for the same bytes.
        header, _, _ = map(decode, signature.split("."))
    except ValueError as error:
        raise SignatureMalformed("the signature is no compact JWT") from error
    try:
        return msgspec.convert(_members(header), _Header)
    except ValueError as error:
        wanted = f'{{"alg":"{ALGORITHM}","typ":"{TYPE}","kid":…}}'
        raise SignatureMalformed(f"the signature's header is not {wanted} and nothing else") from error


def _trusted(key_id: str, keys: Mapping[str, TrustedKey], now: float) -> TrustedKey:
    key = keys.get(key_id)
    if key is None:
        raise SignatureKeyUnknown(f"no trusted key has the id {key_id!r}", details={"keyId": key_id})
    if not key.is_valid(now):
        moment = _time(now)
        raise SignatureKeyExpired(
            f"key {key_id!r} is not valid at {moment}, this agent's time",
            details={"keyId": key_id, "serverTime": moment},
        )
    return key


def _signed(signature: str, key: TrustedKey) -> bytes:
    """The text of the claims, which `key` has signed."""
    try:
        payload: bytes = _JWS.decode(signature, key.public, algorithms=[ALGORITHM])
    except InvalidTokenError as error:
        raise SignatureInvalid(f"the signature was not made with key {key.key_id!r}") from error
    return payload


def _claims(text: bytes) -> _Claims:
    try:
        claims = msgspec.convert(_members(text), _Claims)
    except ValueError as error:
        raise SignatureMalformed(f"what is signed is not as it must be: {str(error)[:160]}") from error
    if not 0 <= claims.exp - claims.iat <= MAX_LIFETIME:
        raise SignatureMalformed(f"a signature lasts {MAX_LIFETIME} s at most, this one {claims.exp - claims.iat} s")
    return claims


def _check_time(claims: _Claims, now: float) -> None:
    if now - SKEW <= claims.exp and claims.iat <= now + SKEW:
        return
    age = now - claims.iat
    raise SignatureStale(
        f"the signature was made {abs(age):.0f} s {'before' if age > 0 else 'after'} {_time(now)}, this agent's time;"
        " sign anew, and compare the clocks if that does not help",
        details={"serverTime": _time(now), "skewSeconds": round(age)},
    )


def _members(text: bytes) -> dict[str, Any]:
    """The members of the object that `text` is, each of which is there once.

    Raises:
        ValueError: it is no such text.
    """
    try:
        members = json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(members, dict):
        raise ValueError("no object")  # noqa: TRY004  # it is a text that is at fault
    return members


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _same(one: str, other: str) -> bool:
    """In constant time."""
    return hmac.compare_digest(one.encode(errors="surrogatepass"), other.encode(errors="surrogatepass"))


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
