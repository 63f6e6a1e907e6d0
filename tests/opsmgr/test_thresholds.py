"""Thresholds come from a profile of a catalogue, and explicit settings win; a mistake is named by file and key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.errors import InputInvalid
from opsmgr.passes.thresholds import BALANCED, SETTINGS, STATES, load_catalogue, override, resolve
from sprite_agent.contract.validation import schemas

if TYPE_CHECKING:
    from pathlib import Path

PAIR = "{ degraded = 1, critical = 2 }"
PROFILE = f"""
[profiles.night]
ingest_lag_seconds = {PAIR}
transport_failure_streak = {PAIR}
heartbeat_lag_seconds = {PAIR}
"""


def catalogue_file(folder: Path, text: str) -> Path:
    path = folder / "thresholds.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("profile", "ingest", "streak"),
    [("strict", (120, 300), (1, 2)), ("balanced", (300, 900), (2, 4)), ("relaxed", (600, 1800), (3, 6))],
)
def test_the_catalogue_that_ships_has_the_contracts_profiles(
    profile: str, ingest: tuple[int, int], streak: tuple[int, int]
) -> None:
    found = resolve(load_catalogue(), profile)

    assert found.profile == profile
    assert found.ingest_lag_seconds == ingest
    assert found.transport_failure_streak == streak
    assert found.heartbeat_lag_seconds == (120, 300)
    assert found.stale_when is None


def test_balanced_is_the_default_and_the_same_in_the_catalogue_as_without_it() -> None:
    assert resolve(load_catalogue()) == BALANCED


def test_there_are_no_other_profiles() -> None:
    assert set(load_catalogue()) == {"strict", "balanced", "relaxed"}


def test_a_catalogue_can_be_replaced(tmp_path: Path) -> None:
    catalogue = load_catalogue(catalogue_file(tmp_path, f'{PROFILE}stale_when = ["running"]\n'))

    night = resolve(catalogue, "night")
    assert (night.ingest_lag_seconds, night.stale_when) == ((1, 2), ("running",))
    with pytest.raises(InputInvalid, match="no threshold profile 'balanced', only night"):
        resolve(catalogue)


def test_explicit_settings_win_and_leave_the_rest_of_the_profile() -> None:
    found = resolve(load_catalogue(), "strict", {"degraded_ingest_lag_seconds": 7, "critical_ingest_lag_seconds": None})

    assert found.ingest_lag_seconds == (7, 300)
    assert (found.profile, found.transport_failure_streak) == ("strict", (1, 2))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_one_limit(name: str) -> None:
    severity, figure = name.split("_", 1)
    value = 1 if severity == "degraded" else 10_000

    assert getattr(override(BALANCED, {name: value}), figure)[severity == "critical"] == value


def test_a_profile_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputInvalid, match="no threshold profile 'calm', only balanced, relaxed, strict"):
        resolve(load_catalogue(), "calm")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"degraded_ingest_lag_seconds": 901},
            "degraded_ingest_lag_seconds 901 is above critical_ingest_lag_seconds 900",
        ),
        ({"critical_transport_failure_streak": 1}, "degraded_transport_failure_streak 2 is above critical_"),
        ({"degraded_heartbeat_lag_seconds": -1}, "degraded_heartbeat_lag_seconds is -1, not a whole number"),
        ({"degraded_heartbeat_lag_seconds": True}, "degraded_heartbeat_lag_seconds is True, not a whole number"),
        ({"ingest_lag_seconds": 1}, "no threshold 'ingest_lag_seconds', only degraded_ingest_lag_seconds"),
    ],
)
def test_settings_that_can_not_be_are_refused_by_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputInvalid, match=re.escape(complaint)):
        override(BALANCED, settings)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("profiles = [", "is not TOML"),
        ("", "profiles is not there"),
        ("[profiles]", "profiles is not there"),
        ("[profile.night]", "profile is not a key, only profiles"),
        ("[profiles]\nnight = 3", "profiles.night is no table"),
        (f"{PROFILE}lag = 1", "profiles.night.lag is not a key, only ingest_lag_seconds"),
        (PROFILE.replace(PAIR, "3", 1), "profiles.night.ingest_lag_seconds is not { degraded"),
        (PROFILE.replace(PAIR, "{ degraded = 1 }", 1), "profiles.night.ingest_lag_seconds is not { degraded"),
        (PROFILE.replace("critical = 2", "critical = 2.5", 1), "ingest_lag_seconds.critical is 2.5, not a whole"),
        (PROFILE.replace("degraded = 1", "degraded = 3", 1), "ingest_lag_seconds: degraded 3 is above critical 2"),
        ("[profiles.night]", "profiles.night.ingest_lag_seconds is not { degraded"),
        (f"{PROFILE}stale_when = 'running'", "profiles.night.stale_when is no list"),
        (f"{PROFILE}stale_when = ['asleep']", "profiles.night.stale_when names 'asleep', not one of awaiting_approval"),
    ],
)
def test_a_mistake_in_a_catalogue_is_named_by_file_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    path = catalogue_file(tmp_path, text)

    with pytest.raises(InputInvalid, match=f"^{re.escape(str(path))}.*{re.escape(complaint)}"):
        load_catalogue(path)


def test_a_catalogue_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputInvalid, match=r"thresholds\.toml can't be read: No such file"):
        load_catalogue(tmp_path / "thresholds.toml")


def test_stale_when_may_name_every_state_of_the_contract() -> None:
    assert list(STATES) == schemas()["common"]["$defs"]["runStatus"]["enum"]
