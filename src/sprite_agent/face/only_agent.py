"""Keeps a second agent from a repo: two would each take the repo's commands for theirs alone."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import structlog

from sprite_agent.control.state_folder import repo_lock
from sprite_agent.errors import JournalUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprite_agent.repo import Repo

_log = structlog.get_logger("sprite_agent.face.server")


@contextlib.contextmanager
def only_agent(repo: Repo) -> Iterator[None]:
    """No other agent of this user serves the repo while the block runs, whatever its state folder is.

    Raises:
        ValueError: one does, or the state folder can't be made or written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(repo.folder.agent_lock())
        except BlockingIOError as error:
            raise ValueError(f"another agent serves this repo already (lock in {repo.folder.path})") from error
        except JournalUnavailable as error:
            raise ValueError(str(error)) from error
        try:
            stack.enter_context(repo_lock(repo.path))
        except BlockingIOError as error:
            raise ValueError(
                f"another agent serves this repo already, with another --state-dir: {repo.path}"
            ) from error
        except (OSError, RuntimeError) as error:  # a user may have no home that can be written
            _log.warning("agents with another --state-dir are not kept from this repo", cause=str(error))
        yield
