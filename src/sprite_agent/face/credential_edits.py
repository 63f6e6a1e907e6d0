"""Changes token files and files of trusted keys: each file whole or not at all, and one change at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprite_agent.contract.proofs import TrustedKey
from sprite_agent.contract.secrets import changing, create_private, read_guarded, replace_guarded
from sprite_agent.contract.signatures import PrivateKey, read_private_key
from sprite_agent.face.credential_text import keys_text, parse_keys, parse_tokens, token_in, token_line

if TYPE_CHECKING:
    from pathlib import Path

    from sprite_agent.face.credentials import Token


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedKey:
    """A key as it should be."""

    key_id: str
    issuer: str
    audience: str | None
    """The Sprite it is for; None: any that trusts it."""
    scopes: frozenset[str]
    until: float | None


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a token file.

    Raises:
        ValueError: it can't be read, others may change it, or it is none.
    """
    return _parse_tokens(path, read_guarded(path, "token file"))


def read_keys(path: Path) -> dict[str, TrustedKey]:
    """The keys of a file of trusted keys, by id.

    Raises:
        ValueError: it can't be read, others may change it, or it is none.
    """
    try:
        return parse_keys(read_guarded(path, "file of trusted keys"))
    except ValueError as error:
        raise ValueError(f"file of trusted keys {path}: {error}") from error


def add_token(path: Path, token: Token) -> None:
    """Adds a token to a token file, which is made where there is none.

    Raises:
        ValueError: there is one of this id, or the file is no token file.
        OSError: the file can't be written.
    """
    with changing(path):
        content = read_guarded(path, "token file") if path.exists() else b""
        if any(each.id == token.id for each in _parse_tokens(path, content)):
            raise ValueError(f"token file {path} has a token {token.id} already: revoke it first, or take another id")
        if content and not content.endswith(b"\n"):
            content += b"\n"
        replace_guarded(path, content + token_line(token).encode() + b"\n")


def add_key(wanted: WantedKey, *, private_file: Path, trusted_file: Path | None) -> TrustedKey:
    """A key of which the private half is in one file, and the public half in the other if there is one.

    Halves that are there already are left as they are: asked twice, it changes nothing.

    Raises:
        ValueError: in one of the files there is something else.
        OSError: they can't be written.
    """
    if trusted_file is None:
        return _public(wanted, _private(wanted, private_file))
    with changing(trusted_file):
        trusted = read_keys(trusted_file) if trusted_file.exists() else {}
        known = trusted.get(wanted.key_id)
        if known is not None and (known.issuer, known.scopes, known.not_after is None) != (
            wanted.issuer,
            wanted.scopes,
            wanted.until is None,
        ):
            raise ValueError(f"{trusted_file} has another key {known.key_id} already: revoke it, or take another name")
        if known is not None and not private_file.exists():
            raise ValueError(f"{trusted_file} has key {known.key_id} already, and {private_file} is not there")
        made = _public(wanted, _private(wanted, private_file))
        if known is None:
            replace_guarded(trusted_file, keys_text([*trusted.values(), made]).encode())
        elif known.public != made.public:
            raise ValueError(f"{private_file} is not the private half of key {known.key_id} in {trusted_file}")
        return known or made


def revoke_token(path: Path, token_id: str) -> bool:
    """Takes a token out of a token file; whether there was one.

    Raises:
        ValueError: the file is no token file.
        OSError: it can't be written.
    """
    with changing(path):
        content = read_guarded(path, "token file")
        found = any(token.id == token_id for token in _parse_tokens(path, content))
        if found:
            lines = content.decode().splitlines(keepends=True)
            kept = [line for line in lines if (token := token_in(line)) is None or token.id != token_id]
            replace_guarded(path, "".join(kept).encode())
        return found


def revoke_key(path: Path, key_id: str) -> bool:
    """Takes a key out of a file of trusted keys; whether there was one.

    Raises:
        ValueError: the file is no such file.
        OSError: it can't be written.
    """
    with changing(path):
        trusted = read_keys(path)
        found = trusted.pop(key_id, None) is not None
        if found:
            replace_guarded(path, keys_text(trusted.values()).encode())
        return found


def _parse_tokens(path: Path, content: bytes) -> tuple[Token, ...]:
    try:
        return parse_tokens(content)
    except ValueError as error:
        raise ValueError(f"token file {path}: {error}") from error


def _private(wanted: WantedKey, path: Path) -> PrivateKey:
    """The private half in a file, which is made where there is none."""
    if not path.exists():
        made = PrivateKey.new(key_id=wanted.key_id, issuer=wanted.issuer, audience=wanted.audience)
        create_private(path, made.text)
        return made
    found = read_private_key(path)
    if (found.kid, found.iss, found.aud) != (wanted.key_id, wanted.issuer, wanted.audience):
        raise ValueError(f"{path} holds key {found.kid} of {found.iss}, and is not overwritten: take another file")
    return found


def _public(wanted: WantedKey, private: PrivateKey) -> TrustedKey:
    return TrustedKey(
        key_id=wanted.key_id,
        issuer=wanted.issuer,
        public=private.key.public_key(),
        scopes=wanted.scopes,
        not_after=wanted.until,
    )
