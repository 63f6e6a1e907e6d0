"""The command line of sprite-agent."""

from __future__ import annotations

from pathlib import Path

import click

from sprite_agent import __version__

EXIT_USAGE = 64
click.UsageError.exit_code = EXIT_USAGE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sprite-agent")
def main() -> None:
    """Serves the Superloop runs of a repo inside a Sprite over gRPC."""


@main.command()
@click.option("--repo", type=click.Path(path_type=Path), required=True, help="The repo whose loops to serve.")
@click.option(
    "--listen", required=True, metavar="HOST:PORT|unix:PATH", help="Loopback or a Unix socket. Port 0 takes a free one."
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
    help="File with the bearer token, mode 600. [default: $OPS_MANAGER_SERVICE_TOKEN]",
)
@click.option("--sprite-id", help="The Sprite's name, as GetInfo gives it.")
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
    sprite_id: str | None,
    log_level: str,
) -> None:
    """Serves until SIGTERM, then drains: streams end with a cursor, running control finishes.

    Exits with 0 after a drain, 1 when it can't serve, 64 when it was called wrongly.
    """
    import asyncio

    from sprite_agent import logs
    from sprite_agent.config import load_serve_config
    from sprite_agent.server import ServeError
    from sprite_agent.server import serve as run

    try:
        config = load_serve_config(
            repo=repo,
            listen=listen,
            state_folder=state_dir,
            runtime=superloop_bin,
            token_file=token_file,
            sprite_id=sprite_id,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    logs.configure(log_level)
    try:
        asyncio.run(run(config))
    except ServeError as error:
        raise click.ClickException(str(error)) from error
