"""What `serve` was told, checked once: past this module nobody reads the environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprite_agent.contract.addresses import is_local
from sprite_agent.contract.secrets import read_token
from sprite_agent.control.command import can_change_user, find_user
from sprite_agent.control.state_folder import default_path
from sprite_agent.face.credential_files import CredentialFiles, CredentialSources
from sprite_agent.face.limits import CONTROL_RATE, MAX_STREAMS
from sprite_agent.face.tls import TlsFiles

if TYPE_CHECKING:
    from pathlib import Path

    from sprite_agent.control.command import User
    from sprite_agent.face.credentials import Requirement

TOKEN_VARIABLE = "OPS_MANAGER_SERVICE_TOKEN"  # noqa: S105  # the name of a variable
RUNTIME_VARIABLE = "SUPERLOOP_BIN"
CREDENTIALS = f"--token-file, ${TOKEN_VARIABLE}, --tls-client-ca, or --trusted-keys with --require-signature all"
"""What callers can be told apart by, as messages say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """How to serve one repo."""

    repo: Path
    listen: str
    """A gRPC address: HOST:PORT or unix:PATH."""
    state_folder: Path
    runtime: str | None
    token: str | None
    """Good for everything; not beside a token file."""
    sprite_id: str | None
    token_file: Path | None = None
    """Tokens by their digests, with their scopes."""
    trusted_keys: Path | None = None
    """Public keys that requests may be signed with, with their scopes."""
    require_signature: Requirement = "none"
    """Which calls have to be signed."""
    tls: TlsFiles | None = None
    insecure: bool = False
    """Nobody has to prove who they are."""
    max_streams_per_caller: int = MAX_STREAMS
    max_control_rate: int = CONTROL_RATE
    """Control calls a second, of one caller."""
    runtime_sha256: str | None = None
    """Digest the runtime's command must have; None: any."""
    run_as: User | None = None
    """Whom the runtime's command runs as; None: the agent's own user."""
    metrics: tuple[str, int] | None = None
    """Host and port; None: the counts are not served."""
    channelz: bool = False

    @property
    def credential_sources(self) -> CredentialSources:
        """Where the agent has its credentials from."""
        return CredentialSources(token=self.token, token_file=self.token_file, trusted_keys=self.trusted_keys)


def load_serve_config(
    *,
    repo: Path,
    listen: str,
    state_folder: Path | None,
    runtime: str | None,
    token_file: Path | None,
    sprite_id: str | None,
    trusted_keys: Path | None = None,
    require_signature: Requirement | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_client_ca: Path | None = None,
    insecure: bool = False,
    max_streams_per_caller: int = MAX_STREAMS,
    max_control_rate: int = CONTROL_RATE,
    runtime_sha256: str | None = None,
    run_as: str | None = None,
    metrics: str | None = None,
    channelz: bool = False,
) -> ServeConfig:
    """The configuration from options and environment; options win.

    Raises:
        ValueError: something in it can't be; the message says what to do.
    """
    token = read_token(None, TOKEN_VARIABLE) if token_file is None else None
    signed = _signed(require_signature, trusted_keys, sprite_id, insecure=insecure)
    CredentialFiles(CredentialSources(token=token, token_file=token_file, trusted_keys=trusted_keys))
    tls = _tls_files(tls_cert, tls_key, tls_client_ca)
    proved = token is not None or token_file is not None or tls_client_ca is not None or signed == "all"
    check_listen(listen, tls=tls is not None, proved=proved, insecure=insecure)
    return ServeConfig(
        repo=repo,
        listen=listen,
        state_folder=state_folder or default_path(repo),
        runtime=runtime or os.environ.get(RUNTIME_VARIABLE) or None,
        token=token,
        sprite_id=sprite_id,
        token_file=token_file,
        trusted_keys=trusted_keys,
        require_signature=signed,
        tls=tls,
        insecure=insecure,
        max_streams_per_caller=max_streams_per_caller,
        max_control_rate=max_control_rate,
        runtime_sha256=None if runtime_sha256 is None else _digest(runtime_sha256),
        run_as=None if run_as is None else _user(run_as),
        metrics=None if metrics is None else _metrics_address(metrics),
        channelz=channelz,
    )


def check_listen(address: str, *, tls: bool, proved: bool, insecure: bool) -> None:
    """Returns if `address` may be listened on. Loopback is no exception: sandbox code reaches it as well.

    Args:
        address: where to listen.
        tls: there is a certificate.
        proved: callers have to prove who they are.
        insecure: it was said that they need not.

    Raises:
        ValueError: it is no address, or one that needs more than there is.
    """
    local = is_local(address)
    if insecure and not local:
        raise ValueError(
            f"--insecure is for loopback and Unix sockets, and others can reach {address!r}; "
            "listen on 127.0.0.1:PORT or unix:PATH"
        )
    if insecure and proved:
        raise ValueError("--insecure lets everyone call, and there are credentials as well; leave out one of the two")
    if not local and not tls:
        raise ValueError(
            f"--listen {address!r} is not loopback: it needs --tls-cert, --tls-key and {CREDENTIALS}; "
            "or listen on 127.0.0.1:PORT or unix:PATH and reach it through a tunnel"
        )
    if not proved and not insecure:
        raise ValueError(
            f"everyone who reaches {address!r} could read and control: give {CREDENTIALS}"
            + ("; or say --insecure if that is meant" if local else "")
        )


def _signed(
    asked: Requirement | None, trusted_keys: Path | None, sprite_id: str | None, *, insecure: bool
) -> Requirement:
    """Which calls have to be signed."""
    if trusted_keys is None:
        if asked not in {None, "none"}:
            raise ValueError(f"--require-signature {asked} needs --trusted-keys: whose signatures count?")
        return "none"
    if sprite_id is None:
        raise ValueError(
            "--trusted-keys needs --sprite-id: requests are signed for one Sprite, and must be for this one"
        )
    if insecure:
        raise ValueError(
            "--insecure lets everyone call, and there are --trusted-keys as well; leave out one of the two"
        )
    return asked or "control"


def _tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if cert is None and key is None:
        if client_ca is not None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        return None
    if cert is None or key is None:
        raise ValueError("--tls-cert and --tls-key go together")
    return TlsFiles(cert=cert, key=key, client_ca=client_ca)


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise ValueError(f"--superloop-sha256 {text[:80]!r} is no SHA-256: 64 hex digits")
    return text.lower()


def _user(name: str) -> User:
    user = find_user(name)
    if not can_change_user():
        raise ValueError(f"--run-as {name} needs root, or the capabilities CAP_SETUID, CAP_SETGID and CAP_KILL")
    return user


def _metrics_address(address: str) -> tuple[str, int]:
    if address.startswith("unix:") or not is_local(address):
        raise ValueError(f"--metrics {address!r} is not on loopback: the counts are told to everyone who asks")
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
