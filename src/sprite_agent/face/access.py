"""Who may make a call: decided by what came with it, and by its bytes, before anything looks into them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sprite_agent.contract.proofs import verify
from sprite_agent.contract.signatures import SIGNATURE_KEY
from sprite_agent.errors import (
    ActorInvalid,
    ScopeMissing,
    SignatureAmbiguous,
    SignatureKeyExpired,
    SignatureKeyUnknown,
    SignatureMissing,
    TokenInvalid,
    TokenMissing,
)
from sprite_agent.face.credentials import CONTROL, READ, allows, allows_some_control
from sprite_agent.face.replay import Replays
from sprite_agent.v1 import control_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sprite_agent.callers import Proof
    from sprite_agent.contract.proofs import TrustedKey
    from sprite_agent.face.credential_files import CredentialFiles
    from sprite_agent.face.credentials import Credentials, Requirement, Token

CONTROL_METHOD = "/sprite_agent.v1.SpriteAgentService/ExecuteControl"
"""The one that needs more than to read."""

_SCHEME = "bearer"
_NEEDED: Mapping[int, str] = {
    control_pb2.INTENT_CANCEL: "control:cancel",
    control_pb2.INTENT_APPROVE: "control:approve",
    control_pb2.INTENT_REJECT: "control:reject",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What the head of a call says of who makes it."""

    method: str
    """With its service."""
    bearer: str | None = field(repr=False)
    token: Token | None
    """What the bearer token was found to be; None: none is needed."""
    signatures: tuple[str, ...] = field(repr=False)
    credentials: Credentials = field(repr=False)
    """Those in force then."""

    @property
    def is_control(self) -> bool:
        """Whether it may run something."""
        return self.method == CONTROL_METHOD


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A call that may be made."""

    proof: Proof | None
    """Who has signed it; None: nobody, and nobody has to."""
    scopes: tuple[frozenset[str], ...]
    """Of all that it came with, token and key; each has to allow what it asks for."""
    key: TrustedKey | None = None
    """The one it is signed with, as it was known then: its id may be given to another."""


class Access:
    """Decides for one agent. Lives as long as its server; any thread may call."""

    def __init__(
        self,
        credentials: CredentialFiles,
        *,
        audience: str | None = None,
        require: Requirement = "none",
        now: Callable[[], float] = time.time,
    ) -> None:
        """Makes one.

        Args:
            credentials: whom to let in.
            audience: this Sprite's id, which signatures have to be made for.
            require: which calls have to be signed. Where keys are trusted, all that are signed are checked.
            now: Unix time.

        Raises:
            ValueError: there are trusted keys, and no audience.
        """
        self._credentials = credentials
        self._checks_signatures = credentials.sources.trusted_keys is not None
        if audience is None and self._checks_signatures:
            raise ValueError("signatures can't be checked without the Sprite's id")
        self._audience = audience or ""
        self._require = require
        self._now = now
        self.replays = Replays(now=now)

    def identify(self, method: str, metadata: Iterable[tuple[str, Any]]) -> Call:
        """What the head of a call says.

        Raises:
            TokenMissing, TokenInvalid: it has not the token it needs.
        """
        given: list[str] = []
        signatures: list[str] = []
        for key, value in metadata:
            if key == "authorization":
                given.append(str(value))
            elif key == SIGNATURE_KEY:
                signatures.append(str(value))
        scheme, _, text = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        bearer = text if scheme.lower() == _SCHEME else None
        token = None
        credentials = self._credentials.in_force()
        if self._credentials.sources.need_token:
            if not given:
                raise TokenMissing("no bearer token came with the call; send metadata 'authorization: Bearer <token>'")
            if bearer is not None:
                token = credentials.find_token(bearer, self._now())
            if token is None:
                raise TokenInvalid("the bearer token is not this agent's")
        return Call(method=method, bearer=bearer, token=token, signatures=tuple(signatures), credentials=credentials)

    def check_unsigned(self, call: Call) -> None:
        """Returns if a call may be made of which there are no bytes to sign: it sends a stream of requests.

        Raises:
            SignatureMissing, ScopeMissing
        """
        if self._require == "all":
            raise SignatureMissing("calls must be signed here, and one that sends a stream of requests can't be")
        _check_scopes(call, _scopes_of(call))

    def admit(self, call: Call, content: bytes, certificate_names: tuple[str, ...]) -> Admission:
        """Lets a call pass by its bytes; what it asks for may need more, see `check_control`.

        A signature that has come as far as here is used up by it.

        Raises:
            SignatureRefused, ScopeMissing
        """
        keys = self._credentials.in_force().keys
        proof = self._proof(call, content, keys)
        scopes = _scopes_of(call)
        key = None
        if proof is not None:
            if certificate_names and proof.issuer not in certificate_names:
                raise SignatureKeyUnknown(f"the caller's certificate is not that of issuer {proof.issuer!r}")
            key = keys[proof.key_id]
            scopes += (key.scopes,)
        _check_scopes(call, scopes)
        if proof is not None:
            self.replays.take(proof)  # last: nothing is remembered of a signature that is good for nothing
        return Admission(proof=proof, scopes=scopes, key=key)

    def check_still(self, call: Call, admission: Admission) -> None:
        """Returns if a stream may go on: what it was opened with may have ended, or been revoked, since.

        Raises:
            TokenInvalid, SignatureKeyUnknown, SignatureKeyExpired, ScopeMissing
        """
        found, now = self._credentials.in_force(), self._now()
        if call.token is not None and not (found is call.credentials and call.token.is_valid(now)):
            same = [token for token in found.tokens if token.digest == call.token.digest and token.is_valid(now)]
            if not same:
                raise TokenInvalid("the bearer token is no longer this agent's")
            _check_scopes(call, [token.scopes for token in same])
        if admission.key is not None:
            key = found.keys.get(admission.key.key_id)
            if key is None or (key.issuer, key.public) != (admission.key.issuer, admission.key.public):
                raise SignatureKeyUnknown(f"key {admission.key.key_id!r} is no longer trusted")
            if not key.is_valid(now):
                raise SignatureKeyExpired(f"key {key.key_id!r} is no longer valid")
            _check_scopes(call, [key.scopes])

    def _proof(self, call: Call, content: bytes, keys: Mapping[str, TrustedKey]) -> Proof | None:
        if not self._checks_signatures:
            return None
        if not call.signatures:
            if self._require == "all" or (self._require == "control" and call.is_control):
                raise SignatureMissing(f"this call must be signed; send metadata '{SIGNATURE_KEY}'")
            return None
        if len(call.signatures) > 1:
            raise SignatureAmbiguous(f"{len(call.signatures)} signatures came with the call")
        return verify(
            call.signatures[0],
            keys=keys,
            audience=self._audience,
            method=call.method,
            body=content,
            token=call.bearer,
            now=self._now(),
        )


def check_control(request: Any, admission: Admission) -> None:
    """Returns if a control request may be made: its intent is allowed, and it is asked for whom it is signed for.

    Raises:
        ScopeMissing, ActorInvalid
    """
    needed = _NEEDED.get(request.intent, CONTROL)
    for scopes in admission.scopes:
        if not allows(scopes, needed):
            raise _missing(needed)
    proof = admission.proof
    if proof is not None and proof.actor != request.requested_by:
        signed_for = "nobody" if proof.actor is None else ascii(proof.actor[:80])
        raise ActorInvalid(
            f"{request.requested_by[:80]!a} asks, and the request is signed for {signed_for}",
            violations=[("requested_by", "must be the actor that the signature names")],
        )


def _scopes_of(call: Call) -> tuple[frozenset[str], ...]:
    return () if call.token is None else (call.token.scopes,)


def _check_scopes(call: Call, scopes: Iterable[frozenset[str]]) -> None:
    """Returns if each of `scopes` allows the method; for control, some intent of it."""
    for each in scopes:
        if not (allows_some_control(each) if call.is_control else allows(each, READ)):
            raise _missing(CONTROL if call.is_control else READ)


def _missing(scope: str) -> ScopeMissing:
    return ScopeMissing(f"the caller lacks the scope {scope}", details={"required": scope})
