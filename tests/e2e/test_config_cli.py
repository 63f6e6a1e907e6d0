"""Commands that take their target from a config, `opsmgr config check`, and completion by a real shell."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.repos import LOOP, LoopFiles, event, line
from support.waiting import DEADLINE

PROGRAM = Path(sys.executable).with_name("opsmgr")


def opsmgr(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program, run in a folder."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder / "xdg"),
        **variables,
    }
    return subprocess.run(
        [PROGRAM, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config of two targets, and their repos."""
    for name, count in (("one", 1), ("two", 2)):
        LoopFiles(tmp_path / name).append(*[line(event())] * count)
    (tmp_path / "opsmgr.toml").write_text(
        "".join(f'[[targets]]\nname = "{name}"\nloop = "{LOOP}"\nrepo = "{name}"\n' for name in ("one", "two"))
    )
    return tmp_path


def test_a_target_of_the_config_needs_no_other_option(folder: Path) -> None:
    ended = opsmgr(folder, "events", "--target", "two")

    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 2


def test_options_beat_what_the_config_says(folder: Path) -> None:
    ended = opsmgr(folder, "events", "--target", "two", "--repo", str(folder / "one"))

    assert len(ended.stdout.splitlines()) == 1, ended.stderr


def test_a_config_in_another_place_can_be_named(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    by_option = opsmgr(elsewhere, "events", "--config", "../opsmgr.toml", "--target", "two")
    by_variable = opsmgr(elsewhere, "events", "--target", "two", OPSMGR_CONFIG=str(folder / "opsmgr.toml"))

    assert by_option.stdout.count("\n") == by_variable.stdout.count("\n") == 2


def test_a_target_that_is_not_in_the_config_is_refused_with_those_that_are(folder: Path) -> None:
    ended = opsmgr(folder, "events", "--target", "three")

    assert ended.returncode == 1
    assert "has no target 'three'; it has one, two" in ended.stderr


def test_without_a_loop_or_a_target_a_command_was_called_wrongly(folder: Path) -> None:
    neither = opsmgr(folder, "events")
    which = opsmgr(folder, "events", "--config", "opsmgr.toml")

    assert (neither.returncode, which.returncode) == (64, 64)
    assert "give --loop, or --target" in neither.stderr
    assert "has 2 targets; give --target: one, two" in which.stderr


def test_the_only_target_of_a_config_that_is_named_is_meant(folder: Path) -> None:
    (folder / "one.toml").write_text(f'[[targets]]\nloop = "{LOOP}"\nrepo = "one"\n')
    ended = opsmgr(folder, "events", "--config", "one.toml")

    assert len(ended.stdout.splitlines()) == 1, ended.stderr


def test_a_mistake_in_the_config_is_one_line_and_a_document(folder: Path) -> None:
    (folder / "opsmgr.toml").write_text('[fleet]\ncolour = "red"\npoll_seconds = 0\n')
    text = opsmgr(folder, "events", "--target", "one")
    document = opsmgr(folder, "events", "--target", "one", "--json")

    assert (text.returncode, document.returncode) == (1, 1)
    assert "opsmgr.toml:2: fleet.colour: is not known" in text.stderr
    assert "1 more" in text.stderr
    assert text.stderr.count("\n") == 1
    assert json.loads(document.stdout)["error"]["reason"] == "INPUT_INVALID"


def test_checking_tells_every_mistake_or_the_targets(folder: Path) -> None:
    right = opsmgr(folder, "config", "check")
    (folder / "opsmgr.toml").write_text('[fleet]\ncolour = "red"\npoll_seconds = 0\n')
    wrong = opsmgr(folder, "config", "check")

    assert [target["name"] for target in json.loads(right.stdout)["targets"]] == ["one", "two"]
    assert wrong.returncode == 1
    assert [told.partition(":")[2].partition(":")[0] for told in wrong.stderr.splitlines()] == ["2", "3"]


@pytest.mark.parametrize(
    ("words", "cursor", "expected"),
    [
        ("opsmgr conf", 1, {"config", "confirm"}),
        ("opsmgr events --target t", 3, {"two"}),
        (f"opsmgr events --loop {LOOP[0]}", 3, {LOOP}),
    ],
    ids=["command", "target", "loop"],
)
def test_bash_completes_commands_and_the_names_of_targets(
    folder: Path, words: str, cursor: int, expected: set[str]
) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = (
        f'eval "$(opsmgr completion bash)"; COMP_WORDS=({words}); COMP_CWORD={cursor}; '
        '_opsmgr_completion opsmgr; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ended = subprocess.run(
        [bash, "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )

    assert set(ended.stdout.split()) == expected, ended.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(folder: Path, shell: str) -> None:
    ended = opsmgr(folder, "completion", shell)

    assert ended.returncode == 0, ended.stderr
    assert "_OPSMGR_COMPLETE" in ended.stdout


def test_the_only_target_of_the_config_that_is_found_is_meant(folder: Path) -> None:
    (folder / "opsmgr.toml").write_text(f'[[targets]]\nloop = "{LOOP}"\nrepo = "two"\n')
    ended = opsmgr(folder, "events")

    assert len(ended.stdout.splitlines()) == 2, ended.stderr


def test_a_loop_that_is_given_has_nothing_to_do_with_the_config_that_is_found(folder: Path) -> None:
    (folder / "opsmgr.toml").write_text("not TOML")
    ended = opsmgr(folder, "events", "--loop", LOOP, "--repo", "one")

    assert len(ended.stdout.splitlines()) == 1, ended.stderr


def test_an_agents_target_can_be_read_by_its_repo(folder: Path) -> None:
    (folder / "opsmgr.toml").write_text(f'[[targets]]\nloop = "{LOOP}"\nrepo = "two"\naddress = "unix:/gone"\n')
    ended = opsmgr(folder, "events", "--target", LOOP, "--transport", "local")

    assert len(ended.stdout.splitlines()) == 2, ended.stderr


def test_another_loop_than_the_targets_does_not_get_its_files(folder: Path) -> None:
    log = folder / "one" / ".superloop" / "loops" / "other" / "events.jsonl"
    log.parent.mkdir(parents=True)
    log.write_bytes(line(event(loop_id="other")))
    (folder / "opsmgr.toml").write_text(f'[[targets]]\nloop = "{LOOP}"\nrepo = "one"\nstate_folder = "files"\n')
    own = opsmgr(folder, "reconcile", "--target", LOOP)
    before = (folder / "files" / "cursor.json").read_bytes()
    others = opsmgr(folder, "reconcile", "--target", LOOP, "--loop", "other")

    assert (own.returncode, others.returncode) == (0, 0), own.stderr + others.stderr
    assert (folder / "files" / "cursor.json").read_bytes() == before
    assert (folder / "one" / ".superloop" / "ops-manager" / "other" / "cursor.json").exists()


def test_checking_tells_each_target_whose_credentials_can_not_be_read(folder: Path) -> None:
    agents = (f'[[targets]]\nname = "{name}"\nloop = "{name}"\naddress = "unix:/a"\n' for name in ("a", "b"))
    (folder / "opsmgr.toml").write_text('[defaults]\ntoken_file = "gone"\n' + "".join(agents))
    ended = opsmgr(folder, "config", "check")

    assert ended.returncode == 1
    assert [told.split(": ")[1] for told in ended.stderr.splitlines()] == ["target a", "target b"]
    assert str(folder / "gone") in ended.stderr


def test_checking_prints_a_table_on_a_terminal(folder: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "wb") as terminal:
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        ended = subprocess.run(
            [PROGRAM, "config", "check"], cwd=folder, env=environment, stdout=terminal, timeout=DEADLINE, check=False
        )
        rows = [row.split() for row in screen.read(4096).decode().splitlines()]

    assert ended.returncode == 0
    assert rows == [
        ["NAME", "LOOP", "TRANSPORT", "WHERE"],
        ["one", LOOP, "local", str(folder / "one")],
        ["two", LOOP, "local", str(folder / "two")],
    ]
