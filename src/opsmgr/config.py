"""opsmgr.toml: the targets of a fleet, their defaults, and the settings of the daemon."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsmgr.config_text import Table
from opsmgr.errors import InputInvalid
from opsmgr.passes.thresholds import BALANCED, SETTINGS, load_catalogue, resolve
from opsmgr.targets import Target
from sprite_agent.contract.addresses import is_local
from sprite_agent.contract.loop_ids import check_loop_id
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from opsmgr.config_text import ConfigMistake
    from opsmgr.passes.thresholds import Catalogue, Thresholds

CONFIG_VARIABLE = "OPSMGR_CONFIG"

_PATHS = {
    "repo": "repo",
    "state_folder": "folder",
    "token_file": "token_file",
    "signing_key": "signing_key",
    "tls_ca": "tls_ca",
    "tls_cert": "tls_cert",
    "tls_key": "tls_key",
    "journal_folder": "state_dir",
}
"""Keys that hold paths, and the fields of a target that they are."""
_TEXTS = ("address", "sprite_id", "tls_server_name", "superloop_bin")
_SECRETS = ("token", "password", "secret", "private_key")
DEFAULT_KEYS = (*_PATHS, *_TEXTS, "transport", "thresholds", "fallback", "state_command")
"""Keys of a target that [defaults] can hold as well."""
_TRANSPORTS = ("local", "sprite_service")


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetSettings:
    """Settings of the daemon. Times in seconds."""

    status_file: Path
    poll_seconds: float = 15.0
    """Between two passes over a target that can't be streamed."""
    reproject_seconds: float = 60.0
    """Between two passes over a target of which nothing is heard."""
    settle_seconds: float = 1.0
    """The least time between two passes over a target."""
    max_catch_ups: int = 16
    """So many targets are sent what they missed at once."""
    max_passes: int = 16
    metrics: str | None = None
    """HOST:PORT for /metrics and /healthz."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One opsmgr.toml."""

    path: Path
    targets: tuple[Target, ...]
    fleet: FleetSettings

    def target(self, name: str) -> Target:
        """The target of a name.

        Raises:
            InputInvalid: there is none.
        """
        for target in self.targets:
            if target.name == name:
                return target
        raise InputInvalid(
            f"{self.path} has no target {name!r}; it has {', '.join(t.name for t in self.targets) or 'none'}"
        )


def find_config(path: Path | None) -> Path:
    """The config that is meant: the one given, else $OPSMGR_CONFIG, ./opsmgr.toml, or the user's.

    Raises:
        InputInvalid: there is none.
    """
    found = path or look_for_config()
    if found is None:
        raise InputInvalid("there is no config: give --config, or make ./opsmgr.toml")
    return found


def look_for_config() -> Path | None:
    """The config in its usual places; None where there is none."""
    if given := os.environ.get(CONFIG_VARIABLE):
        return Path(given)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((path for path in (Path("opsmgr.toml"), home / "opsmgr" / "opsmgr.toml") if path.is_file()), None)


def load_config(path: Path) -> Config:
    """Reads a config. Relative paths in it are relative to its folder, and ~ is the user's home.

    Raises:
        InputInvalid: it can't be read or has mistakes: each with its file, line and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputInvalid(f"config {path} can't be read: {error}") from error
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number that is too long, lists that are too deep
        raise InputInvalid(f"config {path} is not TOML: {error}") from error
    mistakes: list[ConfigMistake] = []
    whole = Table(path, text, (), document, mistakes)
    whole.refuse_others("defaults", "targets", "fleet", "thresholds")
    catalogue = _catalogue(whole.table("thresholds"))
    defaults = whole.table("defaults")
    defaults.refuse_others(*DEFAULT_KEYS, secrets=_SECRETS)
    targets = [_target(each, defaults, catalogue) for each in whole.tables("targets")]
    _refuse_doubles(whole, targets)
    fleet = _fleet(whole.table("fleet"))
    if mistakes:
        lines = list(dict.fromkeys(str(mistake) for mistake in sorted(mistakes, key=lambda each: each.line)))
        more = f" (and {len(lines) - 1} more: 'opsmgr config check' tells them all)" if lines[1:] else ""
        raise InputInvalid(f"{lines[0]}{more}", details={"mistakes": "\n".join(lines)})
    return Config(path=path, targets=tuple(targets), fleet=fleet)


def _catalogue(table: Table) -> Catalogue:
    table.refuse_others("file")
    file = table.path("file")
    try:
        return load_catalogue(file)
    except InputInvalid as error:
        table.blame("file", error.message)
        return load_catalogue()


def _target(table: Table, defaults: Table, catalogue: Catalogue) -> Target:
    table.refuse_others("name", "loop", *DEFAULT_KEYS, secrets=_SECRETS)
    loop = table.text("loop") or (table.missing("loop", "the loop's id") if table.value("loop") is None else "loop")
    name = table.text("name") or loop
    try:
        check_loop_id(loop)
    except OpsError as error:
        table.blame("loop", error.message)
    both = table.over(defaults)
    fields: dict[str, Any] = {field: both.path(key) for key, field in _PATHS.items()}
    fields |= {key: both.text(key) for key in _TEXTS}
    if "/" in (fields["superloop_bin"] or ""):  # else it is looked for in $PATH
        fields["superloop_bin"] = str(both.path("superloop_bin"))
    if (fields["address"] or "").startswith("unix:") and fields["address"] != "unix:":
        fields["address"] = f"unix:{both.path('address', prefix='unix:')}"
    transport = both.choice("transport", _TRANSPORTS) or ("sprite_service" if fields["address"] else "local")
    if transport == "sprite_service" and fields["address"] is None:
        table.blame("address", "sprite_service needs the agent's, HOST:PORT or unix:PATH")
    if transport == "local" and fields["address"] is not None:
        both.blame("transport", "is local, but there is an address; leave one of them out")
    if fields["address"] is not None:
        _check_address(both, fields["address"], has_ca=fields["tls_ca"] is not None)
    fallback = both.choice("fallback", ("local",))
    if fields["repo"] is None and (transport == "local" or fallback is not None):
        table.blame("repo", "is missing: the repo on this machine, which local reads")
    return Target(
        name=name,
        loop=loop,
        transport=transport,  # type: ignore[arg-type]  # one of the two
        fallback=fallback,  # type: ignore[arg-type]  # likewise
        thresholds=_thresholds(both, catalogue),
        state_command=tuple(both.texts("state_command")),
        **fields,
    )


def _check_address(table: Table, address: str, *, has_ca: bool) -> None:
    try:
        if not is_local(address) and not has_ca:
            table.blame("address", f"{address} is not on this machine, which needs TLS: give tls_ca")
    except ValueError as error:
        table.blame("address", str(error))


def _thresholds(table: Table, catalogue: Catalogue) -> Thresholds:
    given = table.value("thresholds")
    try:
        if given is None or isinstance(given, str):
            return resolve(catalogue, given)
        inner = table.table("thresholds")
        inner.refuse_others("profile", *SETTINGS)
        return resolve(catalogue, inner.text("profile"), {key: inner.whole(key, least=0) for key in SETTINGS})
    except InputInvalid as error:
        table.blame("thresholds", error.message)
        return BALANCED


def _refuse_doubles(whole: Table, targets: list[Target]) -> None:
    seen: dict[Any, int] = {}
    for number, (target, table) in enumerate(zip(targets, whole.tables("targets"), strict=True), 1):
        where = _files(target)
        for key, value in (("name", target.name), ("loop", where)):
            if (first := seen.setdefault((key, value), number)) != number:
                same = "name" if key == "name" else "folder for the manager's files"
                table.blame(key, f"target {number} has the same {same} as target {first}")


def _files(target: Target) -> Any:
    """What two targets must not share."""
    try:
        return target.store().folder.resolve()
    except (OpsError, OSError, RuntimeError):  # which is told elsewhere
        return target


def _fleet(table: Table) -> FleetSettings:
    table.refuse_others(*FleetSettings.__dataclass_fields__)
    metrics = table.text("metrics")
    if metrics is not None:
        try:
            check_metrics(metrics)
        except ValueError as error:
            table.blame("metrics", str(error))
    times = {key: table.seconds(key) for key in ("poll_seconds", "reproject_seconds", "settle_seconds")}
    counts = {key: table.whole(key, least=1) for key in ("max_catch_ups", "max_passes")}
    given: dict[str, Any] = {key: value for key, value in (times | counts).items() if value is not None}
    return FleetSettings(status_file=table.path("status_file") or default_status_file(), metrics=metrics, **given)


def check_metrics(address: str) -> None:
    """Raises ValueError for what is no HOST:PORT on loopback."""
    if address.startswith("unix:") or not is_local(address):
        raise ValueError(f"{address} is not on loopback: the counts are told to everyone who asks")


def default_status_file() -> Path:
    """Where the daemon tells how its targets are, unless it is told otherwise."""
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "opsmgr" / "status.json"
