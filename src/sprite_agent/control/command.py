"""The runtime's command: where it is, whether it may be trusted, and the argument vector of each intent."""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sprite_agent.errors import RuntimeMissing, RuntimeUntrusted

if TYPE_CHECKING:
    from sprite_agent.contract.envelopes import ControlRequest

_CHANGE_USER = 1 << 5 | 1 << 6 | 1 << 7
"""CAP_KILL, without which a command that never ends could not be ended, CAP_SETGID and CAP_SETUID."""


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    """Whom a command runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How the runtime's command is configured. Nothing of it is looked at before a command is to be run."""

    path: str | None = None
    sha256: str | None = None
    """Digest the file must have, lower-case hex; None: any."""
    user: User | None = None
    """None: whoever the agent is."""


def find_user(name: str) -> User:
    """The user of that name, as the system knows it.

    Raises:
        ValueError: there is none, or it is root.
    """
    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        raise ValueError(f"there is no user {name!r} to run the command as") from error
    if found.pw_uid == 0:
        raise ValueError("the command must not run as root: name the sandbox's user")
    groups = (group.gr_gid for group in grp.getgrall() if name in group.gr_mem)
    return User(uid=found.pw_uid, gid=found.pw_gid, groups=tuple(sorted({found.pw_gid, *groups})), home=found.pw_dir)


def can_change_user() -> bool:
    """Whether this process may run a command as another user, and end it."""
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return effective & _CHANGE_USER == _CHANGE_USER


def find_runtime(runtime: Runtime) -> Path:
    """The runtime's command, checked.

    Raises:
        RuntimeMissing: none is configured, or it is no executable file, or can't be looked into.
        RuntimeUntrusted: it is not the file that was configured, or the user it runs as can change it.
    """
    if not runtime.path:
        raise RuntimeMissing("the runtime's command is not configured: give --superloop-bin or set SUPERLOOP_BIN")
    try:
        return _checked(runtime, Path(runtime.path))
    except OSError as error:  # it may also be replaced at this very moment
        raise RuntimeMissing(
            f"the runtime's command {runtime.path} can't be looked into: {error.strerror}; it must be there, and be"
            " readable by the agent"
        ) from error


def build_command(runtime: Path, repo: Path, request: ControlRequest, by: str) -> list[str]:
    """The argument vector of an intent; `by` is what a decision is recorded under."""
    if request["intent"] == "cancel":
        return [str(runtime), "cancel", "--repo", str(repo)]
    command = [str(runtime), "approve", "--repo", str(repo), "--loop", request["loopId"], "--by", by]
    if request["intent"] == "reject":
        command.append("--reject")
    if "note" in request:
        command += ["--note", request["note"]]
    return command


def build_environment(user: User | None) -> dict[str, str]:
    """The environment of a command: nothing of the agent's but where programs are, and a home."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    home = os.environ.get("HOME") if user is None else user.home
    if home is not None:
        environment["HOME"] = home
    return environment


def _checked(runtime: Runtime, path: Path) -> Path:
    """The file that is run for `path`, if it may be."""
    if not os.access(path, os.X_OK) or not path.is_file():
        raise RuntimeMissing(f"the runtime's command {runtime.path} is no executable file")
    path = path.resolve()
    if runtime.user is not None:
        for place in (path, *path.parents):
            _refuse_if_writable(place, runtime.user)
    if runtime.sha256 is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != runtime.sha256:
            raise RuntimeUntrusted(
                f"the runtime's command {path} is not the one that was configured: its SHA-256 is {digest}",
                details={"path": path, "sha256": digest},
            )
    return path


def _refuse_if_writable(place: Path, user: User) -> None:
    """Raises RuntimeUntrusted when `user` can change what is at `place`, in a folder others can't clean up."""
    found = place.stat()
    mode = found.st_mode
    can_write = (
        found.st_uid == user.uid
        or (bool(mode & stat.S_IWGRP) and found.st_gid in user.groups)
        or (bool(mode & stat.S_IWOTH) and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX))
    )
    if can_write:
        raise RuntimeUntrusted(
            f"{place} can be changed by the user that the command runs as; it must belong to another,"
            " and be writable by that one only",
            details={"path": place},
        )
