"""Each status file is told of by one daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from opsmgr import store
from opsmgr.errors import LoopLocked
from opsmgr.fleet import daemon

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("names", [("fleet.eu", "fleet.us"), ("a.json", "a.txt")])
def test_two_status_files_are_for_two_daemons_however_alike_their_names_are(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    one, other = (tmp_path / name for name in names)
    with daemon._alone(one), daemon._alone(other), pytest.raises(LoopLocked), daemon._alone(one):  # noqa: SLF001
        pass


def test_a_status_file_whatever_its_name_is_not_its_own_lock(tmp_path: Path) -> None:
    file = tmp_path / "status.lock"
    with daemon._alone(file):  # noqa: SLF001
        store.save(file, {})
        with pytest.raises(LoopLocked), daemon._alone(file):  # noqa: SLF001
            pass
