"""A target: one loop, how to reach it, and where the manager keeps its files of it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opsmgr.errors import InputInvalid
from opsmgr.passes.thresholds import BALANCED
from opsmgr.store import LoopStore, default_folder
from sprite_agent.contract.loop_ids import check_loop_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from opsmgr.passes.thresholds import Thresholds
    from opsmgr.transport.base import Transport, TransportName
    from opsmgr.transport.credentials import Credentials
    from opsmgr.transport.retry import RetryPolicy

TOKEN_VARIABLE = "OPS_MANAGER_SERVICE_TOKEN"  # noqa: S105  # the name of a variable
RUNTIME_VARIABLE = "SUPERLOOP_BIN"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One loop. Nothing is opened, read or connected before it is asked for."""

    name: str
    loop: str
    transport: TransportName = "local"
    address: str | None = None
    """The agent's: HOST:PORT or unix:PATH."""
    repo: Path | None = None
    folder: Path | None = None
    """The manager's files; None: in the repo, or below the user's state folder where none is given."""
    token_file: Path | None = None
    signing_key: Path | None = None
    sprite_id: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None
    state_dir: Path | None = None
    """The journal's folder for local control."""
    superloop_bin: str | None = None
    thresholds: Thresholds = BALANCED
    fallback: Literal["local"] | None = None
    """How the daemon may read the loop when its agent can't be reached. Control never falls back."""
    state_command: tuple[str, ...] = ()
    """Prints cold, warm or running: how the platform says the Sprite is."""

    def store(self) -> LoopStore:
        """The manager's files of the loop.

        Raises:
            LoopIdInvalid
            InputInvalid: the repo's path leads nowhere.
        """
        check_loop_id(self.loop)
        if self.folder is not None:
            return LoopStore(self.folder)
        if self.repo is not None:
            try:
                repo = self.repo.resolve()
            except (OSError, RuntimeError, ValueError) as error:  # a link that leads to itself; no path at all
                raise InputInvalid(f"target {self.name}: the repo {self.repo} can't be found: {error}") from error
            return LoopStore(default_folder(repo, self.loop))
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        name = "".join(char if char.isalnum() or char in ".-" else "_" for char in self.address or "")
        return LoopStore(base / "opsmgr" / name / self.loop)

    def connect(self, *, policy: RetryPolicy | None = None, token: str | None = None) -> Transport:
        """The transport to the loop; close it at the end.

        Args:
            policy: how often a request is tried again.
            token: the agent's bearer token, instead of the one that the target or the environment has.

        Raises:
            InputInvalid: it can't be reached this way; the message says why.
        """
        if self.transport == "sprite_service":
            from opsmgr.transport.credentials import Renewal  # noqa: PLC0415  # slow to import
            from opsmgr.transport.sprite_service import SpriteServiceTransport  # noqa: PLC0415  # likewise

            if self.address is None:
                raise InputInvalid(f"target {self.name} has no address of an agent: HOST:PORT or unix:PATH")
            files = (self.token_file, self.signing_key, self.tls_ca, self.tls_cert, self.tls_key)
            renewal = Renewal(lambda: self.credentials(token=token), files)
            return SpriteServiceTransport(self.address, renewal=renewal, policy=policy)
        if token is not None:
            raise InputInvalid(f"a token is for an agent, and target {self.name} is reached without one")
        from opsmgr.transport.local import LocalTransport  # noqa: PLC0415  # likewise

        if self.repo is None:
            raise InputInvalid(f"target {self.name} has no repo on this machine, which the local transport reads")
        runtime = self.superloop_bin or os.environ.get(RUNTIME_VARIABLE) or None
        return LocalTransport(self.repo, runtime=runtime, state_folder=self.state_dir)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Transport]:
        """The transport to the loop, closed at the end. Raises as `connect` does."""
        transport = self.connect()
        try:
            yield transport
        finally:
            await transport.close()

    def local_fallback(self) -> Target | None:
        """The same loop by its repo, where that is allowed."""
        return replace(self, transport="local", address=None) if self.fallback == "local" else None

    def credentials(self, *, token: str | None = None) -> Credentials:
        """What the agent is shown, read from their files; `token` beats the file and the environment.

        Raises:
            InputInvalid: one of them can't be read.
        """
        from opsmgr.transport.credentials import Credentials  # noqa: PLC0415  # slow to import
        from sprite_agent.contract.secrets import check_token, read_token  # noqa: PLC0415  # likewise

        signer = None
        try:
            if self.signing_key is not None:
                from sprite_agent.contract.signatures import load_signer  # noqa: PLC0415  # likewise

                signer = load_signer(self.signing_key, audience=self.sprite_id)
            token = read_token(self.token_file, TOKEN_VARIABLE) if token is None else check_token(token, "token")
        except ValueError as error:
            raise InputInvalid(str(error)) from error
        return Credentials(
            token=token,
            signer=signer,
            tls_ca=self.tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            tls_server_name=self.tls_server_name,
        )
