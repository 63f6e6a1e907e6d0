"""The options of commands that take one target, several, or all of the config."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import reported
from opsmgr.cli.target import OPTIONS, SINGLE_OPTIONS, complete_target_names, one_target, refuse_what_is_no_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NAMES = click.option(
    "--target",
    "names",
    multiple=True,
    shell_complete=complete_target_names,
    help="A target of the config; may be given several times. [default: all]",
)


def targets_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, and passes on `targets`: the one that --loop or --target means, those named, or all there are.

    `config` is the config they are of; None where it was not needed.
    """

    @functools.wraps(command)
    def with_targets(**options: Any) -> Any:
        refuse_what_is_no_text(options)
        names: tuple[str, ...] = options.pop("names")
        given = {name: options.pop(name) for name in OPTIONS if name != "name"}
        with reported(json=options.get("json", False)):
            config, targets = _targets(names, given)
        return command(targets=targets, config=config, **options)

    for option in reversed((_NAMES, *SINGLE_OPTIONS)):
        with_targets = option(with_targets)
    return with_targets


def _targets(names: tuple[str, ...], given: dict[str, Any]) -> tuple[Any, list[Any]]:
    from opsmgr.config import find_config, load_config

    config_file: Path | None = given["config"]
    alone = [name for name, value in given.items() if value is not None and name != "config"]
    if alone and len(names) < 2:  # noqa: PLR2004  # options of one target
        return None, [one_target({"name": names[0] if names else None, **given})]
    if alone:
        raise click.UsageError(f"--{alone[0].replace('_', '-')} is of one target; there are {len(names)}")
    config = load_config(find_config(config_file))
    return config, [config.target(name) for name in names] or list(config.targets)
