"""The command line of sprite-agent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sprite_agent import __version__, journal_cli, keys_cli
from sprite_agent.face.limits import CONTROL_RATE, MAX_STREAMS

if TYPE_CHECKING:
    from sprite_agent.face.credentials import Requirement

EXIT_USAGE = 64
click.UsageError.exit_code = EXIT_USAGE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sprite-agent")
def main() -> None:
    """Serves the Superloop runs of a repo inside a Sprite over gRPC."""
    # Before gRPC is imported: strangers could make it write lines that are no JSON into the log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


main.add_command(journal_cli.audit)
main.add_command(journal_cli.journal)
main.add_command(keys_cli.keys)


@main.command()
@click.option("--repo", type=click.Path(path_type=Path), required=True, help="The repo whose loops to serve.")
@click.option(
    "--listen",
    required=True,
    metavar="HOST:PORT|unix:PATH",
    help="Port 0 takes a free one. Beyond loopback it needs TLS and credentials.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    help="Journal and locks; outside the repo. [default: below $XDG_STATE_HOME]",
)
@click.option("--superloop-bin", metavar="PATH", help="The runtime's command. [default: $SUPERLOOP_BIN]")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="Digests of bearer tokens with their scopes, as sprite-agent keys token writes it."
    " [default: one token, $OPS_MANAGER_SERVICE_TOKEN]",
)
@click.option(
    "--trusted-keys",
    type=click.Path(path_type=Path),
    help="Managers' public keys with their scopes, as sprite-agent keys pair writes it. Needs --sprite-id."
    " Both files are read anew when they change.",
)
@click.option(
    "--require-signature",
    type=click.Choice(["control", "all", "none"]),
    help="Which calls have to be signed. [default: control where there are --trusted-keys, else none]",
)
@click.option(
    "--tls-cert",
    type=click.Path(path_type=Path),
    help="The agent's certificate and those between it and its CA, PEM. Read anew when it changes, as the next two.",
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM, mode 600.")
@click.option(
    "--tls-client-ca",
    type=click.Path(path_type=Path),
    help="Callers must have a certificate of one of these CAs, PEM.",
)
@click.option(
    "--insecure", is_flag=True, help="Everyone who reaches the address may read and control; only where that is local."
)
@click.option(
    "--max-streams-per-caller",
    type=click.IntRange(1, 10_000),
    default=MAX_STREAMS,
    show_default=True,
    help="A manager follows each loop of the repo by a stream of its own.",
)
@click.option(
    "--max-control-rate",
    type=click.IntRange(1, 100_000),
    default=CONTROL_RATE,
    show_default=True,
    help="Control calls a second, of one caller; four seconds' worth may come at once.",
)
@click.option(
    "--superloop-sha256", metavar="HEX", help="Refuse to run the runtime's command unless it has this digest."
)
@click.option(
    "--run-as",
    metavar="USER",
    help="Whom the runtime's command runs as, without capabilities. Needs root, or CAP_SETUID, _SETGID and _KILL.",
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve counts for Prometheus there, on loopback. [default: not]")
@click.option("--channelz", is_flag=True, help="Serve what gRPC knows of its connections, to callers that may read.")
@click.option("--sprite-id", help="The Sprite's name, as GetInfo gives it and requests are signed for.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def serve(
    *,
    repo: Path,
    listen: str,
    state_dir: Path | None,
    superloop_bin: str | None,
    token_file: Path | None,
    trusted_keys: Path | None,
    require_signature: Requirement | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    insecure: bool,
    max_streams_per_caller: int,
    max_control_rate: int,
    superloop_sha256: str | None,
    run_as: str | None,
    metrics: str | None,
    channelz: bool,
    sprite_id: str | None,
    log_level: str,
) -> None:
    """Serves until SIGTERM, then drains: streams end with a cursor, running control finishes.

    Exits with 0 after a drain, 1 when it can't serve, 64 when it was called wrongly.
    """
    import asyncio

    from sprite_agent import logs
    from sprite_agent.face.config import load_serve_config
    from sprite_agent.face.server import ServeError
    from sprite_agent.face.server import serve as run

    try:
        config = load_serve_config(
            repo=repo,
            listen=listen,
            state_folder=state_dir,
            runtime=superloop_bin,
            token_file=token_file,
            trusted_keys=trusted_keys,
            require_signature=require_signature,
            sprite_id=sprite_id,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            insecure=insecure,
            max_streams_per_caller=max_streams_per_caller,
            max_control_rate=max_control_rate,
            runtime_sha256=superloop_sha256,
            run_as=run_as,
            metrics=metrics,
            channelz=channelz,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    logs.configure(log_level)
    try:
        asyncio.run(run(config))
    except ServeError as error:
        raise click.ClickException(str(error)) from error
