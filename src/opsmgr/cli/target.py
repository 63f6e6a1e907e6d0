"""The options that say which loop, and how to reach it; shared by the commands."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsmgr.cli.output import reported

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.targets import Target

_PATH = click.Path(path_type=Path)


def complete_target_names(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """The names in the config that begin so, for the shell."""
    return [target.name for target in _known(context) if target.name.startswith(begun)]


def _loop_ids(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """The loops in the config that begin so, for the shell."""
    return sorted({target.loop for target in _known(context) if target.loop.startswith(begun)})


def _known(context: click.Context) -> tuple[Target, ...]:
    """The targets of the config; none where it can't be read: the shell has no place to say so."""
    from opsmgr.config import find_config, load_config
    from sprite_agent.errors import OpsError

    try:
        return load_config(find_config(context.params.get("config"))).targets
    except OpsError:
        return ()


_NAME = click.option(
    "--target",
    "name",
    shell_complete=complete_target_names,
    help="The target of this name in the config; further options beat what it says.",
)
_LOOP = click.option("--loop", shell_complete=_loop_ids, help="The loop's id. [default: the target's]")
SINGLE_OPTIONS = (
    click.option(
        "--config",
        type=_PATH,
        help="The targets. [default: $OPSMGR_CONFIG, ./opsmgr.toml, else opsmgr/opsmgr.toml below $XDG_CONFIG_HOME]",
    ),
    _LOOP,
    click.option("--repo", type=_PATH, help="The repo; its .superloop/ops-manager holds the manager's files."),
    click.option(
        "--transport",
        type=click.Choice(["local", "sprite_service"]),
        help="The repo on this machine, or an agent. [default: the target's, else local]",
    ),
    click.option("--service-target", metavar="HOST:PORT|unix:PATH", help="Address of the agent."),
    click.option(
        "--service-token-file",
        type=_PATH,
        help="File with the agent's bearer token, mode 600. [default: $OPS_MANAGER_SERVICE_TOKEN]",
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
        help="The runtime's command for local control. [default: $SUPERLOOP_BIN]",
    ),
)


class Seconds(click.FloatRange):
    """A finite number of seconds within a range: click takes "nan" for a number within any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click.ParamType."""
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is no finite number", param, ctx)
        return seconds


OPTIONS = (
    "name",
    "config",
    "loop",
    "repo",
    "transport",
    "service_target",
    "service_token_file",
    "signing_key",
    "sprite_id",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "tls_server_name",
    "state_dir",
    "superloop_bin",
)
_FIELDS = {"service_target": "address", "service_token_file": "token_file"}
"""Options that have other names than the target's fields."""


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, and passes them on as one `target`."""

    @functools.wraps(command)
    def with_target(**options: Any) -> Any:
        refuse_what_is_no_text(options)
        given = {name: options.pop(name) for name in OPTIONS}
        with reported(json=options.get("json", False)):
            target = one_target(given)
        return command(target=target, **options)

    for option in reversed((_NAME, *SINGLE_OPTIONS)):
        with_target = option(with_target)
    return with_target


def loopless_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `target_options`, for a command on all the loops of a repo: the target is of no loop in particular."""

    @functools.wraps(command)
    def with_target(**options: Any) -> Any:
        refuse_what_is_no_text(options)
        given = {"loop": None, **{name: options.pop(name) for name in OPTIONS if name != "loop"}}
        way = given["repo"] or given["service_target"]
        with reported(json=options.get("json", False)):
            target = one_target({**given, "loop": "any" if way and given["name"] is None else None})
        return command(target=target, **options)

    for option in reversed((_NAME, *(option for option in SINGLE_OPTIONS if option is not _LOOP))):
        with_target = option(with_target)
    return with_target


def one_target(given: dict[str, Any]) -> Target:
    """The target that the options mean."""
    from opsmgr.targets import Target

    name, config_file, loop = given.pop("name"), given.pop("config"), given["loop"]
    fields = {_FIELDS.get(option, option): value for option, value in given.items() if value is not None}
    if name is None and loop is not None:
        target = Target(name=loop, **fields)
    else:
        configured = _configured(name, config_file)
        if loop not in {None, configured.loop}:
            fields["folder"] = None  # it holds the files of the target's own loop
        if fields.get("transport") == "local":
            fields.setdefault("address", None)
        target = replace(configured, **fields)
    if target.transport == "sprite_service" and target.address is None:
        raise click.UsageError("--transport sprite_service needs --service-target HOST:PORT or unix:PATH")
    if target.transport == "local" and target.address is not None:
        raise click.UsageError("--service-target needs --transport sprite_service")
    if target.transport == "local" and target.repo is None:
        raise click.UsageError("--transport local needs --repo PATH")
    if target.address is not None:
        _check_way(target)
    return target


def _configured(name: str | None, config_file: Path | None) -> Target:
    """The target of a name in the config, or the only one."""
    from opsmgr.config import find_config, load_config, look_for_config

    if name is None and config_file is None and look_for_config() is None:
        raise click.UsageError("give --loop, or --target for one of the config")
    config = load_config(find_config(config_file))
    if name is not None:
        return config.target(name)
    if len(config.targets) != 1:
        names = ", ".join(each.name for each in config.targets)
        if config_file is None:
            raise click.UsageError(f"give --loop, or --target for one of {config.path}: {names}")
        raise click.UsageError(f"{config.path} has {len(config.targets)} targets; give --target: {names}")
    return config.targets[0]


def _check_way(target: Target) -> None:
    from opsmgr.errors import InputInvalid

    try:
        target.credentials().read_tls(target.address or "")
    except InputInvalid as error:
        raise click.UsageError(str(error)) from error


def refuse_what_is_no_text(options: dict[str, Any]) -> None:
    """Raises click's UsageError for an argument whose bytes are not UTF-8: no document can hold it."""
    for name, value in options.items():
        try:
            (value if isinstance(value, str) else "").encode()
        except UnicodeEncodeError as error:
            raise click.UsageError(f"{_option(name)} {value!a} is not valid UTF-8") from error


def _option(name: str) -> str:
    """What the option of a parameter is called: many have the parameter's name, but not all."""
    return next(each.opts[0] for each in click.get_current_context().command.params if each.name == name)
