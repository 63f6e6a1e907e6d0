"""The command that supervises a fleet: run."""

from __future__ import annotations

from pathlib import Path

import click

from opsmgr.cli.output import reported


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="The targets. [default: ./opsmgr.toml, else opsmgr/opsmgr.toml below $XDG_CONFIG_HOME]",
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve /metrics and /healthz there. [default: as the config says]")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def run(*, config_file: Path | None, metrics: str | None, log_level: str) -> None:
    """Supervises all the targets of a config until SIGTERM, then drains; SIGHUP reads the config anew.

    Each target's files are kept up to date as by 'reconcile'; 'opsmgr status' tells how they are.
    """
    import asyncio
    import gc
    import signal
    from dataclasses import replace

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the config is read later than this: it need not be read anew

    from opsmgr.config import check_metrics, find_config, load_config
    from opsmgr.fleet import daemon
    from sprite_agent import logs

    if metrics is not None:
        try:
            check_metrics(metrics)
        except ValueError as error:
            raise click.UsageError(f"--metrics: {error}") from error
    logs.configure(log_level)
    with reported(json=False):
        config = load_config(find_config(config_file))
        if metrics is not None:
            config = replace(config, fleet=replace(config.fleet, metrics=metrics))
        gc.freeze()  # what was imported stays: no collection needs to go through it again
        asyncio.run(daemon.run(config))
