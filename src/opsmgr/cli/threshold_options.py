"""The options that say from where on a figure is a reason."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.passes.thresholds import Thresholds

_SETTINGS = (
    ("degraded_ingest_lag_seconds", "Age of the last event from which the loop is degraded."),
    ("critical_ingest_lag_seconds", "Age of the last event from which it is critical."),
    ("degraded_transport_failure_streak", "Failed reconciles in a row from which it is degraded."),
    ("critical_transport_failure_streak", "Failed reconciles in a row from which it is critical."),
    ("degraded_heartbeat_lag_seconds", "Age of the runtime's heartbeat from which it is degraded."),
    ("critical_heartbeat_lag_seconds", "Age of the runtime's heartbeat from which it is critical."),
)
_OPTIONS = (
    click.option(
        "--threshold-profile",
        metavar="NAME",
        help="Profile of thresholds: strict, balanced, relaxed, or one of --thresholds-file. [default: the target's]",
    ),
    click.option(
        "--thresholds-file",
        type=click.Path(path_type=Path),
        help="A catalogue of profiles, in place of the one that comes with opsmgr.",
    ),
    *(
        click.option(f"--{name.replace('_', '-')}", name, type=click.IntRange(min=0), metavar="N", help=text)
        for name, text in _SETTINGS
    ),
)


def threshold_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, and passes them on as one `thresholds`: what they make of the target's."""

    @functools.wraps(command)
    def with_thresholds(**options: Any) -> Any:
        profile, file = options.pop("threshold_profile"), options.pop("thresholds_file")
        settings = {name: options.pop(name) for name, _ in _SETTINGS}

        def thresholds(of_target: Thresholds) -> Thresholds:
            from opsmgr.passes.thresholds import load_catalogue, override, resolve

            if profile is None and file is None:
                return override(of_target, settings)
            return resolve(load_catalogue(file), profile or of_target.profile, settings)

        return command(thresholds=thresholds, **options)

    for option in reversed(_OPTIONS):
        with_thresholds = option(with_thresholds)
    return with_thresholds
