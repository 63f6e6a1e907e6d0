"""opsmgr.toml is read as it is meant, or its mistakes are told with file, line and key."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from opsmgr.config import DEFAULT_KEYS, FleetSettings, find_config, load_config
from opsmgr.errors import InputInvalid
from opsmgr.passes.thresholds import BALANCED, load_catalogue
from opsmgr.targets import Target

DOCS = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
KEY = re.compile(r"`([a-z_]+)`")


def write(folder: Path, text: str) -> Path:
    path = folder / "opsmgr.toml"
    path.write_text(text)
    return path


def mistakes(folder: Path, text: str) -> list[str]:
    """What is told of a config, each without the name of its file."""
    path = write(folder, text)
    with pytest.raises(InputInvalid) as caught:
        load_config(path)
    told = caught.value.details["mistakes"].splitlines()
    assert caught.value.message.startswith(told[0])
    assert all(line.startswith(f"{path}:") for line in told)
    return [line.removeprefix(f"{path}:") for line in told]


def test_a_target_has_what_the_config_says_and_else_the_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
[defaults]
token_file = "token"
thresholds = "strict"
[[targets]]
name = "one"
loop = "demo"
address = "unix:/run/agent.sock"
sprite_id = "sprite-1"
state_folder = "state/one"
state_command = ["state", "sprite-1"]
[[targets]]
loop = "other"
repo = "/srv/repo"
token_file = "~/other-token"
thresholds = "relaxed"
""",
    )
    catalogue = load_catalogue()

    assert load_config(path).targets == (
        Target(
            name="one",
            loop="demo",
            transport="sprite_service",
            address="unix:/run/agent.sock",
            sprite_id="sprite-1",
            folder=tmp_path / "state/one",
            token_file=tmp_path / "token",
            thresholds=catalogue["strict"],
            state_command=("state", "sprite-1"),
        ),
        Target(
            name="other",
            loop="other",
            repo=Path("/srv/repo"),
            token_file=Path.home() / "other-token",
            thresholds=catalogue["relaxed"],
        ),
    )


def test_single_thresholds_beat_the_profile(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
[[targets]]
loop = "demo"
repo = "r"
thresholds = { profile = "strict", critical_ingest_lag_seconds = 600 }
""",
    )
    thresholds = load_config(path).targets[0].thresholds

    assert thresholds.profile == "strict"
    assert thresholds.ingest_lag_seconds == (120, 600)
    assert thresholds.transport_failure_streak == (1, 2)


def test_another_catalogue_can_take_the_place_of_the_one_that_comes_with_it(tmp_path: Path) -> None:
    pair = "{ degraded = 1, critical = 2 }"
    (tmp_path / "mine.toml").write_text(
        f"[profiles.night]\ningest_lag_seconds = {pair}\ntransport_failure_streak = {pair}\n"
        f"heartbeat_lag_seconds = {pair}\n"
    )
    path = write(
        tmp_path, '[thresholds]\nfile = "mine.toml"\n[[targets]]\nloop = "a"\nrepo = "r"\nthresholds = "night"\n'
    )

    assert load_config(path).targets[0].thresholds.ingest_lag_seconds == (1, 2)


def test_what_is_not_said_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    config = load_config(write(tmp_path, '[[targets]]\nloop = "demo"\nrepo = "r"\n'))

    assert config.fleet == FleetSettings(status_file=Path("/run/user/7/opsmgr/status.json"))
    assert config.targets[0].thresholds == BALANCED
    assert config.targets[0].name == "demo"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '[[targets]]\nloop = "a"\nrepo = "r"\nadress = "x"',
            "4: targets.1.adress: is not known; did you mean address?",
        ),
        ('[[targets]]\nloop = "a"\nrepo = 3', "3: targets.1.repo: is 3, not a text"),
        (
            '[defaults]\ntoken = "s3cret"',
            "2: defaults.token: secrets do not belong in a config: put it into a file of its own, see token_file",
        ),
        (
            '[[targets]]\nloop = "a"\nrepo = "r"\n[[targets]]\nname = "b"\nrepo = "r"',
            "4: targets.2.loop: is missing: the loop's id",
        ),
        (
            '[[targets]]\nloop = "a"\ntransport = "sprite_service"',
            "1: targets.1.address: sprite_service needs the agent's, HOST:PORT or unix:PATH",
        ),
        (
            '[[targets]]\nloop = "a"\naddress = "agent.example:7443"',
            "3: targets.1.address: agent.example:7443 is not on this machine, which needs TLS: give tls_ca",
        ),
        (
            '[[targets]]\nloop = "a"\n',
            "1: targets.1.repo: is missing: the repo on this machine, which local reads",
        ),
        (
            '[[targets]]\nloop = "a"\naddress = "unix:/a"\nfallback = "local"',
            "1: targets.1.repo: is missing: the repo on this machine, which local reads",
        ),
        (
            '[[targets]]\nloop = "a"\nrepo = "r"\n[[targets]]\nloop = "a"\nrepo = "s"',
            "4: targets.2.name: target 2 has the same name as target 1",
        ),
        (
            '[[targets]]\nname = "x"\nloop = "a"\nrepo = "r"\n[[targets]]\nname = "y"\nloop = "a"\nrepo = "r"',
            "7: targets.2.loop: target 2 has the same folder for the manager's files as target 1",
        ),
        (
            '[[targets]]\nname = "x"\nloop = "a"\nrepo = "r"\n[[targets]]\nname = "y"\nloop = "a"\nrepo = "q/../r"',
            "7: targets.2.loop: target 2 has the same folder for the manager's files as target 1",
        ),
        ("[fleet]\npoll_seconds = -1", "2: fleet.poll_seconds: is -1, not a number of seconds above 0"),
        ("[fleet]\npoll_seconds = nan", "2: fleet.poll_seconds: is nan, not a number of seconds above 0"),
        ("[fleet]\nmax_passes = true", "2: fleet.max_passes: is True, not a whole number from 1 on"),
        (
            '[fleet]\nmetrics = "0.0.0.0:1"',
            "2: fleet.metrics: 0.0.0.0:1 is not on loopback: the counts are told to everyone who asks",
        ),
        ('[fleet]\nstatus_file = "a\\u0000b"', "2: fleet.status_file: is 'a\\x00b', not a text"),
        ("[fleet]\npoll_seconds = 1e400", "2: fleet.poll_seconds: is inf, not a number of seconds above 0"),
        (
            f"[fleet]\npoll_seconds = 1{'0' * 400}",
            f"2: fleet.poll_seconds: is 1{'0' * 59}…, not a number of seconds above 0",
        ),
        ("targets = 3", "1: targets: is no list of tables; each begins with [[targets]]"),
        (
            "[defaults]\nstate_command = 'x'\n[[targets]]\nloop='a'\nrepo='r'",
            "2: defaults.state_command: is 'x', not a list of texts",
        ),
    ],
    ids=range(20),
)
def test_a_mistake_is_told_with_its_line_and_key(tmp_path: Path, text: str, told: str) -> None:
    assert told in mistakes(tmp_path, text)


def test_all_mistakes_are_told_and_each_once(tmp_path: Path) -> None:
    text = (
        '[defaults]\ntransport = "pigeon"\n'
        '[[targets]]\nloop = "a"\nrepo = "r"\n[[targets]]\nloop = "b"\nrepo = "r"\nx = 1\n'
    )

    assert [told.partition(" ")[0] for told in mistakes(tmp_path, text)] == ["2:", "9:"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[[targets]]\nloop = "a"\nrepo = """\nname = 3\n"""\nname = 3', 6),
        ("[[targets]]\nloop = 'a' # name = 3\nrepo = 'r'\n  name   =  3", 4),
        ("[[targets]]\nloop = 'a'\nrepo = 'r'\n\"name\" = 3", 4),
        ("# [[targets]]\n[ fleet ]\n[[ targets ]] # here\nloop = 'a'\nrepo = 'r'\nname = 3", 6),
        ("targets = [{ loop = 'a', repo = 'r', name = 3 }]", 1),
    ],
    ids=range(5),
)
def test_the_line_is_found_whatever_looks_like_it(tmp_path: Path, text: str, line: int) -> None:
    assert f"{line}: targets.1.name: is 3, not a text" in mistakes(tmp_path, text)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 5000 + "]" * 5000], ids=["a long number", "deep lists"])
def test_what_no_toml_should_hold_is_told(tmp_path: Path, value: str) -> None:
    with pytest.raises(InputInvalid, match="is not TOML"):
        load_config(write(tmp_path, f"x = {value}"))


def test_what_is_no_toml_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[fleet]\npoll_seconds = \n")

    with pytest.raises(InputInvalid, match=r"opsmgr.toml is not TOML: .*line 2"):
        load_config(path)


def test_a_target_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, '[[targets]]\nloop = "demo"\nrepo = "r"\n'))

    with pytest.raises(InputInvalid, match="has no target 'dem'; it has demo"):
        config.target("dem")


def test_the_config_is_looked_for_in_its_places_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OPSMGR_CONFIG", raising=False)
    with pytest.raises(InputInvalid, match="there is no config"):
        find_config(None)
    users = tmp_path / "home/opsmgr/opsmgr.toml"
    users.parent.mkdir(parents=True)
    users.touch()
    found = [find_config(None)]
    Path("opsmgr.toml").touch()
    found.append(find_config(None))
    monkeypatch.setenv("OPSMGR_CONFIG", "/etc/opsmgr.toml")
    found += [find_config(None), find_config(Path("given.toml"))]

    assert found == [users, Path("opsmgr.toml"), Path("/etc/opsmgr.toml"), Path("given.toml")]


def test_the_example_that_comes_with_it_is_right() -> None:
    config = load_config(Path(__file__).parents[2] / "deploy" / "opsmgr.toml")

    assert [target.name for target in config.targets] == ["shop", "docs"]


def test_every_key_is_described_and_no_others() -> None:
    described = {
        heading: {key for row in rows.splitlines() if row.startswith("| ") for key in KEY.findall(row.split("|")[1])}
        for heading, rows in re.findall(r"^## \[+(\w+)\]+\n(.*?)(?=^## |\Z)", DOCS, re.MULTILINE | re.DOTALL)
    }

    assert described == {
        "targets": {"name", "loop", *DEFAULT_KEYS},
        "fleet": {field.name for field in fields(FleetSettings)},
        "thresholds": {"file"},
    }


@pytest.mark.parametrize(
    ("said", "meant"),
    [("bin/superloop", "{folder}/bin/superloop"), ("~/superloop", "{home}/superloop"), ("superloop", "superloop")],
)
def test_a_relative_path_of_the_runtime_is_relative_to_the_config_and_a_bare_name_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, meant: str
) -> None:
    monkeypatch.setenv("HOME", "/home/of/nobody")
    path = write(tmp_path, f'[[targets]]\nloop = "a"\nrepo = "r"\nsuperloop_bin = "{said}"')

    [target] = load_config(path).targets
    assert target.superloop_bin == meant.format(folder=tmp_path, home="/home/of/nobody")


def test_a_relative_socket_is_relative_to_the_config(tmp_path: Path) -> None:
    [target] = load_config(write(tmp_path, '[[targets]]\nloop = "a"\naddress = "unix:agent.sock"')).targets

    assert target.address == f"unix:{tmp_path}/agent.sock"
