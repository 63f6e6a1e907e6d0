"""What `serve` was told, checked once: past this module nobody reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprite_agent.contract.addresses import is_local
from sprite_agent.contract.secrets import read_token
from sprite_agent.state_folder import default_path

if TYPE_CHECKING:
    from pathlib import Path

TOKEN_VARIABLE = "OPS_MANAGER_SERVICE_TOKEN"  # noqa: S105  # the name of a variable
RUNTIME_VARIABLE = "SUPERLOOP_BIN"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """How to serve one repo."""

    repo: Path
    listen: str
    """A gRPC address: HOST:PORT on loopback, or unix:PATH."""
    state_folder: Path
    runtime: str | None
    token: str | None
    sprite_id: str | None


def load_serve_config(
    *,
    repo: Path,
    listen: str,
    state_folder: Path | None,
    runtime: str | None,
    token_file: Path | None,
    sprite_id: str | None,
) -> ServeConfig:
    """The configuration from options and environment; options win.

    Raises:
        ValueError: something in it can't be; the message says what to do.
    """
    check_listen(listen)
    return ServeConfig(
        repo=repo,
        listen=listen,
        state_folder=state_folder or default_path(repo),
        runtime=runtime or os.environ.get(RUNTIME_VARIABLE) or None,
        token=read_token(token_file, TOKEN_VARIABLE),
        sprite_id=sprite_id,
    )


def check_listen(address: str) -> None:
    """Returns if `address` may be listened on.

    Raises:
        ValueError: it is no address, or one that others can reach.
    """
    if not is_local(address):
        raise ValueError(
            f"--listen {address!r} is not loopback: it needs TLS and credentials, and this version has no TLS; "
            "listen on 127.0.0.1:PORT or unix:PATH and reach it through a tunnel"
        )
