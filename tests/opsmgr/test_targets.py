"""A target says where its loop's files are, and how the loop is reached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from opsmgr.errors import InputInvalid
from opsmgr.passes.thresholds import load_catalogue
from opsmgr.targets import Target
from opsmgr.transport.local import LocalTransport


def test_a_target_that_is_read_again_is_the_same_and_one_that_was_changed_is_not() -> None:
    target = Target(name="a", loop="demo", repo=Path("/r"))

    assert target == Target(name="a", loop="demo", repo=Path("/r"))
    assert target != replace(target, thresholds=load_catalogue()["strict"])


def test_the_files_are_in_the_folder_that_was_given_else_in_the_repo(tmp_path: Path) -> None:
    target = Target(name="a", loop="demo", repo=tmp_path)

    assert target.store().folder == tmp_path.resolve() / ".superloop" / "ops-manager" / "demo"
    assert replace(target, folder=tmp_path / "f").store().folder == tmp_path / "f"


def test_the_files_of_agents_at_two_addresses_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    target = Target(name="a", loop="demo", transport="sprite_service", address="127.0.0.1:7443")

    first, second = (replace(target, address=f"127.0.0.1:{port}").store().folder for port in (1, 2))

    assert first != second
    assert first.is_relative_to(tmp_path / "opsmgr")


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        (Target(name="a", loop="demo", transport="sprite_service"), "a has no address"),
        (Target(name="a", loop="demo"), "a has no repo"),
    ],
    ids=["agent", "local"],
)
def test_a_target_that_lacks_its_way_is_refused_when_it_is_connected(target: Target, missing: str) -> None:
    with pytest.raises(InputInvalid, match=missing):
        target.connect()


def test_a_credential_that_can_not_be_read_is_refused_by_its_file(tmp_path: Path) -> None:
    target = Target(
        name="a", loop="demo", transport="sprite_service", address="unix:/a.sock", token_file=tmp_path / "gone"
    )

    with pytest.raises(InputInvalid, match=str(tmp_path / "gone")):
        target.connect()


def test_only_a_target_that_allows_it_falls_back_to_its_repo(tmp_path: Path) -> None:
    agents = Target(name="a", loop="demo", transport="sprite_service", address="unix:/a.sock", repo=tmp_path)
    fallback = replace(agents, fallback="local").local_fallback()

    assert agents.local_fallback() is None
    assert fallback is not None
    assert isinstance(fallback.connect(), LocalTransport)
    assert fallback.store().folder == agents.store().folder
