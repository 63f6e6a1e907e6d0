"""Token files and files of trusted keys: what they say, and how it is written.

# a token file: id, digest, scopes, and where there is one the end of its validity
opsmgr-1 sha256:<64 hex digits> read,control until=2026-12-31T00:00:00Z
watcher  sha256:<64 hex digits> read

{"keys": [{"kid": "m1", "iss": "opsmgr-1", "x": "<public key>", "nbf": 1767225600, "scopes": ["read", "control"]}]}
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sprite_agent.contract.proofs import TrustedKey
from sprite_agent.contract.signatures import Issuer, KeyId, decode, encode
from sprite_agent.face.credentials import SCOPES, Token

if TYPE_CHECKING:
    from collections.abc import Iterable

_TOKEN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_WITHOUT_END, _WITH_END = 3, 4
"""Words of a line."""


def parse_tokens(content: bytes) -> tuple[Token, ...]:
    """The tokens of a token file.

    Raises:
        ValueError: it is none; the message says which line, and has nothing of it: it might be a secret.
    """
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None
    found: dict[str, Token] = {}
    for number, line in enumerate(lines, 1):
        try:
            token = token_in(line)
        except ValueError as error:
            raise ValueError(f"line {number} {error}") from None
        if token is not None and found.setdefault(token.id, token) is not token:
            raise ValueError(f"line {number} has the id of another: {token.id}")
    return tuple(found.values())


def token_in(line: str) -> Token | None:
    """The token in a line of a token file; None: there is none.

    Raises:
        ValueError: it is no such line.
    """
    words = line.partition("#")[0].split()
    if not words:
        return None
    digest = _DIGEST.fullmatch(words[1]) if len(words) in {_WITHOUT_END, _WITH_END} else None
    if digest is None:
        raise ValueError("is not ID sha256:HEX SCOPES [until=TIME], as sprite-agent keys token writes it")
    try:
        check_token_id(words[0])
    except ValueError as error:
        raise ValueError(f"has an id that {error}") from None
    until = _end(words[3]) if len(words) == _WITH_END else None
    return Token(id=words[0], digest=bytes.fromhex(digest[1]), scopes=_scopes(words[2].split(",")), until=until)


def token_line(token: Token) -> str:
    """A token as a line of a token file."""
    words = [token.id, f"sha256:{token.digest.hex()}", ",".join(in_order(token.scopes))]
    return " ".join(words if token.until is None else [*words, f"until={rfc3339(token.until)}"])


def check_token_id(token_id: str) -> None:
    """Returns if `token_id` can be one.

    Raises:
        ValueError: it can't.
    """
    if not _TOKEN_ID.fullmatch(token_id):
        raise ValueError("is not 1 to 64 of A-Z a-z 0-9 _ -, a letter or digit first")


def check_key_names(key_id: str, issuer: str) -> None:
    """Returns if a key can have these names.

    Raises:
        ValueError: it can't.
    """
    for what, value, form in (("--kid", key_id, KeyId), ("--issuer", issuer, Issuer)):
        try:
            msgspec.convert(value, form)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"{what} {value[:80]!r} is not 1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first"
            ) from error


_Moment = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799)]
"""Unix time, in seconds: what is later than the year 9999 is in other units."""


class _Key(msgspec.Struct, forbid_unknown_fields=True):
    kid: KeyId
    iss: Issuer
    x: str
    scopes: list[str]
    nbf: _Moment | None = None
    naf: _Moment | None = None

    def trusted(self) -> TrustedKey:
        """The key; raises ValueError where it is none."""
        try:
            public = Ed25519PublicKey.from_public_bytes(decode(self.x))
        except ValueError as error:
            raise ValueError("has an x that is no Ed25519 key: 32 bytes, base64url") from error
        return TrustedKey(
            key_id=self.kid,
            issuer=self.iss,
            public=public,
            scopes=_scopes(self.scopes),
            not_before=self.nbf,
            not_after=self.naf,
        )


class _Keys(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Key]


def parse_keys(content: bytes) -> dict[str, TrustedKey]:
    """The keys of a file of trusted keys, by id.

    Raises:
        ValueError: it is none; the message says where.
    """
    try:
        entries = msgspec.json.decode(content, type=_Keys).keys
    except ValueError as error:
        raise ValueError(f'it is not {{"keys": [...]}}: {error}') from error
    found: dict[str, TrustedKey] = {}
    for entry in entries:
        if entry.kid in found:
            raise ValueError(f"it has two keys {entry.kid}")
        try:
            found[entry.kid] = entry.trusted()
        except ValueError as error:
            raise ValueError(f"key {entry.kid} {error}") from error
    return found


def keys_text(keys: Iterable[TrustedKey]) -> str:
    """The content of a file of trusted keys."""
    return json.dumps({"keys": [key_entry(key) for key in keys]}, indent=2) + "\n"


def key_entry(key: TrustedKey) -> dict[str, Any]:
    """A key as an entry of a file of trusted keys."""
    entry: dict[str, Any] = {"kid": key.key_id, "iss": key.issuer, "x": encode(key.public.public_bytes_raw())}
    for name, moment in (("nbf", key.not_before), ("naf", key.not_after)):
        if moment is not None:
            entry[name] = int(moment)
    return {**entry, "scopes": in_order(key.scopes)}


def in_order(scopes: Iterable[str]) -> list[str]:
    """Scopes as they are listed everywhere."""
    return sorted(scopes, key=SCOPES.index)


def rfc3339(moment: float) -> str:
    """A time as token files have it."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _scopes(names: list[str]) -> frozenset[str]:
    if not names or not set(names).issubset(SCOPES):
        raise ValueError(f"has other scopes than {', '.join(SCOPES)}")
    return frozenset(names)


def _end(word: str) -> float:
    name, _, text = word.partition("=")
    try:
        moment = datetime.fromisoformat(text) if name == "until" else None
        moment = moment if moment is None or moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):  # OverflowError: a year before the first, or after the last, in UTC
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError("ends in something else than until=TIME, as in until=2026-12-31T00:00:00Z")
    return moment.timestamp()
