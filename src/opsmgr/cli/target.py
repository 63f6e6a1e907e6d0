"""The options that say which loop, and how to reach it; shared by the commands."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from opsmgr.store import LoopStore
    from opsmgr.transport.base import Transport
    from opsmgr.transport.credentials import Credentials

TOKEN_VARIABLE = "OPS_MANAGER_SERVICE_TOKEN"  # noqa: S105  # the name of a variable
RUNTIME_VARIABLE = "SUPERLOOP_BIN"


_PATH = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--loop", required=True, help="The loop's id."),
    click.option("--repo", type=_PATH, help="The repo; its .superloop/ops-manager holds the manager's files."),
    click.option(
        "--transport",
        type=click.Choice(["local", "sprite_service"]),
        default="local",
        show_default=True,
        help="The repo on this machine, or an agent.",
    ),
    click.option("--service-target", metavar="HOST:PORT|unix:PATH", help="Address of the agent."),
    click.option(
        "--service-token-file",
        type=_PATH,
        help=f"File with the agent's bearer token, mode 600. [default: ${TOKEN_VARIABLE}]",
    ),
    click.option(
        "--signing-key",
        type=_PATH,
        help="The manager's private key, made by 'sprite-agent keys pair', mode 600: signs requests for --sprite-id.",
    ),
    click.option(
        "--sprite-id",
        metavar="NAME",
        help="The Sprite that signed requests are for; no other takes them. [default: the one the key file names]",
    ),
    click.option("--tls-ca", type=_PATH, help="CA of the agent's certificate, PEM: connect with TLS, and only to it."),
    click.option("--tls-cert", type=_PATH, help="The manager's certificate, PEM, for an agent that asks for one."),
    click.option("--tls-key", type=_PATH, help="Its private key, PEM, mode 600."),
    click.option(
        "--tls-server-name",
        metavar="NAME",
        help="The name in the agent's certificate, where it is reached by another, as through a tunnel.",
    ),
    click.option("--state-dir", type=_PATH, help="Journal folder for local control. [default: as the agent's]"),
    click.option(
        "--superloop-bin",
        metavar="PATH",
        help=f"The runtime's command for local control. [default: ${RUNTIME_VARIABLE}]",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One loop, and how to reach it."""

    loop: str
    repo: Path | None
    transport: str
    service_target: str | None
    service_token_file: Path | None
    signing_key: Path | None
    sprite_id: str | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    tls_server_name: str | None
    state_dir: Path | None
    superloop_bin: str | None

    def store(self) -> LoopStore:
        """The manager's files of the loop: in the repo that was given, else in the user's state folder."""
        from opsmgr.store import LoopStore, default_folder
        from sprite_agent.contract.loop_ids import check_loop_id

        check_loop_id(self.loop)
        if self.repo is not None:
            return LoopStore(default_folder(self.repo.resolve(), self.loop))
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        name = "".join(char if char.isalnum() or char in ".-" else "_" for char in self.service_target or "")
        return LoopStore(base / "opsmgr" / name / self.loop)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Transport]:
        """The transport to the loop, closed at the end."""
        transport = self._transport()
        try:
            yield transport
        finally:
            await transport.close()

    def _transport(self) -> Transport:
        if self.transport == "sprite_service":
            from opsmgr.errors import InputInvalid
            from opsmgr.transport.sprite_service import SpriteServiceTransport

            if self.service_target is None:
                raise click.UsageError("--transport sprite_service needs --service-target HOST:PORT or unix:PATH")
            try:
                return SpriteServiceTransport(self.service_target, credentials=self._credentials())
            except (InputInvalid, ValueError) as error:
                raise click.UsageError(str(error)) from error
        from opsmgr.transport.local import LocalTransport

        if self.service_target is not None:
            raise click.UsageError("--service-target needs --transport sprite_service")
        if self.repo is None:
            raise click.UsageError("--transport local needs --repo PATH")
        runtime = self.superloop_bin or os.environ.get(RUNTIME_VARIABLE) or None
        return LocalTransport(self.repo, runtime=runtime, state_folder=self.state_dir)

    def _credentials(self) -> Credentials:
        from opsmgr.transport.credentials import Credentials
        from sprite_agent.contract.secrets import read_token

        signer = None
        if self.signing_key is not None:
            from sprite_agent.contract.signatures import load_signer

            signer = load_signer(self.signing_key, audience=self.sprite_id)
        return Credentials(
            token=read_token(self.service_token_file, TOKEN_VARIABLE),
            signer=signer,
            tls_ca=self.tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            tls_server_name=self.tls_server_name,
        )


class Seconds(click.FloatRange):
    """A finite number of seconds within a range: click takes "nan" for a number within any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click.ParamType."""
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is no finite number", param, ctx)
        return seconds


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, and passes them on as one `target`."""

    @functools.wraps(command)
    def with_target(**options: Any) -> Any:
        refuse_what_is_no_text(options)
        fields = {name: options.pop(name) for name in Target.__dataclass_fields__}
        return command(target=Target(**fields), **options)

    for option in reversed(_OPTIONS):
        with_target = option(with_target)
    return with_target


def refuse_what_is_no_text(options: dict[str, Any]) -> None:
    """Raises click's UsageError for an argument whose bytes are not UTF-8: no document can hold it."""
    for name, value in options.items():
        try:
            (value if isinstance(value, str) else "").encode()
        except UnicodeEncodeError as error:
            raise click.UsageError(f"--{name.replace('_', '-')} {value!a} is not valid UTF-8") from error
