"""The bearer token comes from a file that only its owner can read, or from the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sprite_agent.contract.secrets import read_token

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
