"""The runtime's command is found, trusted or not, and given an argument vector and an environment of its own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprite_agent.control.command import Runtime, User, build_command, build_environment, find_runtime
from sprite_agent.errors import RuntimeMissing, RuntimeUntrusted
from support.runtime import request, script

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ControlRequest

BY = "ada#0123456789abcdef"
SOMEBODY = User(uid=os.getuid() + 1, gid=os.getgid() + 1, groups=(os.getgid() + 1,), home="/home/somebody")


# The vector.


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (request("cancel"), ["cancel", "--repo", "/repo"]),
        (request("cancel", note="why"), ["cancel", "--repo", "/repo"]),
        (request("approve"), ["approve", "--repo", "/repo", "--loop", "demo", "--by", BY]),
        (
            request("approve", note="a b; $(c) 'd'"),
            ["approve", "--repo", "/repo", "--loop", "demo", "--by", BY, "--note", "a b; $(c) 'd'"],
        ),
        (request("reject"), ["approve", "--repo", "/repo", "--loop", "demo", "--by", BY, "--reject"]),
        (
            request("reject", note="--approve"),
            ["approve", "--repo", "/repo", "--loop", "demo", "--by", BY, "--reject", "--note", "--approve"],
        ),
    ],
)
def test_each_intent_has_its_vector(document: dict[str, Any], words: list[str]) -> None:
    command = build_command(Path("/bin/superloop"), Path("/repo"), cast("ControlRequest", document), BY)

    assert command == ["/bin/superloop", *words]


# Finding it.


@pytest.mark.parametrize("configured", [None, ""])
def test_a_runtime_that_is_not_configured_is_missing(configured: str | None) -> None:
    with pytest.raises(RuntimeMissing, match="not configured"):
        find_runtime(Runtime(path=configured))


def test_a_runtime_that_cannot_be_executed_is_missing(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch(mode=0o644)
    (tmp_path / "loop").symlink_to("loop")

    for configured in (tmp_path / "gone", tmp_path, plain, plain / "below", tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(RuntimeMissing, match=f"{configured} is no executable file"):
            find_runtime(Runtime(path=str(configured)))


def test_a_runtime_given_by_a_relative_path_or_a_link_is_run_by_its_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "superloop", "exit 0")
    (tmp_path / "link").symlink_to("superloop")
    monkeypatch.chdir(tmp_path)

    assert find_runtime(Runtime(path="./superloop")) == tmp_path.resolve() / "superloop"
    assert find_runtime(Runtime(path="link")) == tmp_path.resolve() / "superloop"


# Trusting it.


def test_a_runtime_with_the_configured_digest_is_the_one(tmp_path: Path) -> None:
    path = script(tmp_path / "superloop", "exit 0")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    assert find_runtime(Runtime(path=path, sha256=digest)) == Path(path).resolve()


def test_a_runtime_that_was_changed_is_untrusted(tmp_path: Path) -> None:
    path = script(tmp_path / "superloop", "exit 0")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    script(tmp_path / "superloop", "exit 1")

    with pytest.raises(RuntimeUntrusted, match="is not the one that was configured") as untrusted:
        find_runtime(Runtime(path=path, sha256=digest))
    assert untrusted.value.details["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert untrusted.value.executed is False


@pytest.mark.parametrize("configured", [{"sha256": "0" * 64}, {"user": SOMEBODY}], ids=["digest", "user"])
def test_a_runtime_that_is_taken_away_while_it_is_checked_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: dict[str, Any]
) -> None:
    path = Path(script(tmp_path / "superloop", "exit 0"))
    is_file = Path.is_file

    def then_gone(self: Path) -> bool:
        found = is_file(self)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", then_gone)

    with pytest.raises(RuntimeMissing, match=f"{path} can't be looked into: No such file or directory"):
        find_runtime(Runtime(path=str(path), **configured))


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A runtime that only the user of the tests can change."""
    (tmp_path / "bin").mkdir(mode=0o755)
    return Path(script(tmp_path / "bin" / "superloop", "exit 0")).resolve()


def test_a_runtime_that_its_user_cannot_change_is_trusted(runtime: Path) -> None:
    assert find_runtime(Runtime(path=str(runtime), user=SOMEBODY)) == runtime


@pytest.mark.parametrize("place", ["superloop", "."])
@pytest.mark.parametrize("mode", [0o757, 0o777])
def test_a_runtime_that_everybody_can_change_or_exchange_is_untrusted(runtime: Path, *, place: str, mode: int) -> None:
    (runtime.parent / place).chmod(mode)

    with pytest.raises(RuntimeUntrusted, match="can be changed by the user that the command runs as") as untrusted:
        find_runtime(Runtime(path=str(runtime), user=SOMEBODY))
    assert untrusted.value.details == {"path": str(runtime.parent / place)}
    assert find_runtime(Runtime(path=str(runtime))) == runtime


@pytest.mark.parametrize("place", ["superloop", "."])
def test_a_runtime_that_a_group_of_its_users_can_change_is_untrusted(runtime: Path, place: str) -> None:
    (runtime.parent / place).chmod(0o775)
    member = User(uid=SOMEBODY.uid, gid=SOMEBODY.gid, groups=(SOMEBODY.gid, os.getgid()), home="/")

    assert find_runtime(Runtime(path=str(runtime), user=SOMEBODY)) == runtime
    with pytest.raises(RuntimeUntrusted):
        find_runtime(Runtime(path=str(runtime), user=member))


def test_a_runtime_of_its_own_users_is_untrusted(runtime: Path) -> None:
    owner = User(uid=os.getuid(), gid=SOMEBODY.gid, groups=(SOMEBODY.gid,), home="/")

    with pytest.raises(RuntimeUntrusted, match="must belong to another"):
        find_runtime(Runtime(path=str(runtime), user=owner))


def test_a_link_leads_to_the_file_that_is_looked_at(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(runtime)
    runtime.chmod(0o757)

    with pytest.raises(RuntimeUntrusted):
        find_runtime(Runtime(path=str(tmp_path / "link"), user=SOMEBODY))


# What it is given.


def test_a_command_of_another_user_has_the_home_of_that_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "secret")

    assert build_environment(None) == {"PATH": "/usr/bin", "LANG": "C.UTF-8", "HOME": "/home/ada"}
    assert build_environment(SOMEBODY) == {"PATH": "/usr/bin", "LANG": "C.UTF-8", "HOME": "/home/somebody"}


def test_a_home_that_is_not_set_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("PATH", raising=False)

    assert build_environment(None) == {"PATH": os.defpath, "LANG": "C.UTF-8"}
