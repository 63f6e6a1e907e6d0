"""Thresholds: from where on a figure is a reason, in profiles of a catalogue that can be replaced."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from opsmgr.errors import InputInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEFAULT_PROFILE: Final = "balanced"
FIGURES: Final = ("ingest_lag_seconds", "transport_failure_streak", "heartbeat_lag_seconds")
SETTINGS: Final = tuple(f"{severity}_{figure}" for figure in FIGURES for severity in ("degraded", "critical"))
"""The names of the settings that beat a profile."""
STATES: Final = ("awaiting_approval", "complete", "running", "stopped", "failed", "idle", "unknown")
"""The lifecycle states that `stale_when` may name."""
_LIMIT: Final = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """From where on a figure is a reason: (degraded, critical)."""

    profile: str
    ingest_lag_seconds: tuple[int, int]
    transport_failure_streak: tuple[int, int]
    heartbeat_lag_seconds: tuple[int, int] = (120, 300)
    stale_when: tuple[str, ...] | None = None
    """The lifecycle states in which a loop can be stale; None: in any, also in one that is not known."""

    def counted(self, lag: int | None, lifecycle_state: str | None) -> int | None:
        """A lag of events or heartbeats, unless a loop in this state can't be stale."""
        return lag if self.stale_when is None or lifecycle_state in self.stale_when else None

    def document(self) -> dict[str, Any]:
        """As it stands in health.json."""
        return {
            "profile": self.profile,
            "degradedIngestLagSeconds": self.ingest_lag_seconds[0],
            "criticalIngestLagSeconds": self.ingest_lag_seconds[1],
            "degradedTransportFailureStreak": self.transport_failure_streak[0],
            "criticalTransportFailureStreak": self.transport_failure_streak[1],
            "degradedHeartbeatLagSeconds": self.heartbeat_lag_seconds[0],
            "criticalHeartbeatLagSeconds": self.heartbeat_lag_seconds[1],
        }


BALANCED: Final = Thresholds(profile="balanced", ingest_lag_seconds=(300, 900), transport_failure_streak=(2, 4))
"""What holds where nobody says anything; the same as in the catalogue."""

Catalogue = dict[str, Thresholds]
"""Profiles by name."""


def load_catalogue(path: Path | None = None) -> Catalogue:
    """The profiles in a file; without one those that come with the manager.

    Raises:
        InputInvalid: it can't be read, or has a mistake; the message names the file and the key.
    """
    where = "thresholds.toml of the package" if path is None else str(path)
    try:
        content = (resources.files("opsmgr.passes") / "thresholds.toml" if path is None else path).read_text("utf-8")
        document = tomllib.loads(content)
    except OSError as error:
        raise InputInvalid(f"{where} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputInvalid(f"{where} is not TOML: {error}") from error
    _refuse_unknown(document, ("profiles",), where, "")
    profiles = document.get("profiles")
    if not isinstance(profiles, dict) or not profiles:
        raise InputInvalid(f"{where}: profiles is not there; begin one with [profiles.{DEFAULT_PROFILE}]")
    return {name: _profile(name, profile, where) for name, profile in profiles.items()}


def resolve(
    catalogue: Catalogue, profile: str | None = None, settings: Mapping[str, int | None] | None = None
) -> Thresholds:
    """The thresholds of a profile, with explicit settings instead of its own.

    Args:
        catalogue: the profiles there are.
        profile: default: balanced.
        settings: by their names in `SETTINGS`; None is not given.

    Raises:
        InputInvalid: there is no such profile, or the settings contradict each other.
    """
    name = DEFAULT_PROFILE if profile is None else profile
    found = catalogue.get(name)
    if found is None:
        raise InputInvalid(f"there is no threshold profile {name!r}, only {', '.join(sorted(catalogue))}")
    return override(found, settings or {})


def override(thresholds: Thresholds, settings: Mapping[str, int | None]) -> Thresholds:
    """The thresholds with explicit settings instead of their own; see `resolve`.

    Raises:
        InputInvalid: a setting is unknown, no count, or contradicts another.
    """
    for name, value in settings.items():
        if name not in SETTINGS:
            raise InputInvalid(f"there is no threshold {name!r}, only {', '.join(SETTINGS)}")
        if value is not None:
            _check_count(value, f"threshold {name}")
    for figure in FIGURES:
        given = [settings.get(f"{severity}_{figure}") for severity in ("degraded", "critical")]
        if given == [None, None]:
            continue
        degraded, critical = (
            own if value is None else value for value, own in zip(given, getattr(thresholds, figure), strict=True)
        )
        if degraded > critical:
            raise InputInvalid(
                f"threshold degraded_{figure} {degraded} is above critical_{figure} {critical}"
                f" (profile {thresholds.profile}); give both"
            )
        changed: dict[str, Any] = {figure: (degraded, critical)}
        thresholds = replace(thresholds, **changed)
    return thresholds


def _profile(name: str, profile: Any, where: str) -> Thresholds:
    key = f"profiles.{name}"
    if not isinstance(profile, dict):
        raise InputInvalid(f"{where}: {key} is no table")
    _refuse_unknown(profile, (*FIGURES, "stale_when"), where, f"{key}.")
    pairs = {figure: _pair(profile.get(figure), f"{where}: {key}.{figure}") for figure in FIGURES}
    states = profile.get("stale_when")
    if states is not None:
        if not isinstance(states, list):
            raise InputInvalid(f"{where}: {key}.stale_when is no list of states")
        for state in states:
            if state not in STATES:
                raise InputInvalid(f"{where}: {key}.stale_when names {state!r}, not one of {', '.join(STATES)}")
    return Thresholds(profile=name, **pairs, stale_when=None if states is None else tuple(states))


def _pair(value: Any, key: str) -> tuple[int, int]:
    if not isinstance(value, dict) or value.keys() != {"degraded", "critical"}:
        raise InputInvalid(f"{key} is not {{ degraded = …, critical = … }}")
    for severity in ("degraded", "critical"):
        _check_count(value[severity], f"{key}.{severity}")
    if value["degraded"] > value["critical"]:
        raise InputInvalid(f"{key}: degraded {value['degraded']} is above critical {value['critical']}")
    return value["degraded"], value["critical"]


def _check_count(value: Any, key: str) -> None:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise InputInvalid(f"{key} is {value!r}, not a whole number >= 0")


def _refuse_unknown(table: dict[str, Any], known: tuple[str, ...], where: str, prefix: str) -> None:
    for name in table:
        if name not in known:
            raise InputInvalid(f"{where}: {prefix}{name} is not a key, only {', '.join(known)}")
