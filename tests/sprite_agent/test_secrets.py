"""Secrets come from files that only their owner can read, or from the environment; files are replaced whole."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from sprite_agent.contract.secrets import changing, create_private, read_guarded, read_token, replace_guarded

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "OPS_TEST_TOKEN"


def token_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [b"s3cret", b"s3cret\n", b"  s3cret \r\n\n", b"s3cret\t"])
def test_the_token_is_what_the_file_holds_without_white_space(tmp_path: Path, content: bytes) -> None:
    assert read_token(token_file(tmp_path, content), VARIABLE) == "s3cret"


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_for_its_owner_is_read(tmp_path: Path, mode: int) -> None:
    assert read_token(token_file(tmp_path, b"s3cret", mode), VARIABLE) == "s3cret"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o610, 0o601, 0o666])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ValueError, match=r"can be read by others; chmod 600 it"):
        read_token(token_file(tmp_path, b"s3cret", mode), VARIABLE)


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(token_file(tmp_path, b"s3cret", 0o644))

    with pytest.raises(ValueError, match="can be read by others"):
        read_token(link, VARIABLE)


@pytest.mark.parametrize("content", [b"", b"\n", b" \t\n", b"two words", b"one\ntwo\n", "s\u00e9cret".encode()])
def test_a_file_that_does_not_hold_one_token_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="must hold one token and nothing else"):
        read_token(token_file(tmp_path, content), VARIABLE)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no text"):
        read_token(token_file(tmp_path, b"\xff\xfe"), VARIABLE)


def test_a_file_that_cannot_be_read_is_refused_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be read: No such file or directory"):
        read_token(tmp_path / "none", VARIABLE)
    with pytest.raises(ValueError, match="can't be read: Is a directory"):
        read_token(tmp_path, VARIABLE)


def test_no_refusal_holds_anything_of_the_token(tmp_path: Path) -> None:
    for content, mode in ((b"s3cret", 0o644), (b"s3cret s3cret", 0o600)):
        with pytest.raises(ValueError, match="token file") as caught:
            read_token(token_file(tmp_path, content, mode), VARIABLE)
        assert "s3cret" not in str(caught.value)


def test_without_a_file_the_environment_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "from-the-environment")

    assert read_token(None, VARIABLE) == "from-the-environment"


def test_a_file_beats_the_environment_also_when_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "from-the-environment")

    assert read_token(token_file(tmp_path, b"from-the-file"), VARIABLE) == "from-the-file"
    with pytest.raises(ValueError, match="must hold one token"):
        read_token(token_file(tmp_path, b""), VARIABLE)


@pytest.mark.parametrize("value", [None, ""])
def test_without_either_there_is_none(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)

    assert read_token(None, VARIABLE) is None


@pytest.mark.parametrize("value", ["s\u00e9cret", "line\nbreak"])
def test_what_no_call_could_carry_is_refused_from_the_environment_too(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)

    with pytest.raises(ValueError, match=VARIABLE):
        read_token(None, VARIABLE)


# Files that are changed.


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o444])
def test_what_others_may_only_read_is_read(tmp_path: Path, mode: int) -> None:
    assert read_guarded(token_file(tmp_path, b"content", mode), "file") == b"content"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_what_others_may_change_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ValueError, match=r"can be changed by others; chmod go-w it"):
        read_guarded(token_file(tmp_path, b"content", mode), "file")


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, b"old", mode)
    before = path.open("rb")

    replace_guarded(path, b"new")

    with before:
        assert before.read() == b"old"
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", mode)
    assert [each.name for each in tmp_path.iterdir()] == ["token"]


def test_a_new_file_is_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        replace_guarded(tmp_path / "one", b"1")
        create_private(tmp_path / "two", b"2")
    finally:
        os.umask(before)

    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "two")] == [0o600, 0o600]


def test_a_link_goes_on_leading_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(token_file(tmp_path, b"old"))

    replace_guarded(tmp_path / "link", b"new")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "token").read_bytes() == b"new"


def test_a_file_that_cannot_be_replaced_stays_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = token_file(tmp_path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(OSError, match="No space left"):
        replace_guarded(path, b"new")

    assert [each.name for each in tmp_path.iterdir()] == ["token"]
    assert path.read_bytes() == b"old"


def test_a_private_file_is_never_made_over_another(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        create_private(token_file(tmp_path, b"old"), b"new")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_private(tmp_path / "link", b"new")

    assert not (tmp_path / "elsewhere").exists()


def test_of_those_who_change_a_file_at_once_none_loses_its_change(tmp_path: Path) -> None:
    path = token_file(tmp_path, b"")

    def add() -> None:
        for _ in range(25):
            with changing(path):
                replace_guarded(path, path.read_bytes() + b"x")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert path.read_bytes() == b"x" * 100
