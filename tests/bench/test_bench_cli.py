"""`python -m tools.bench`: what it takes, what it refuses, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.__main__ import EXIT_FAILED, EXIT_USAGE, run
from tools.bench.measuring import BENCHMARKS
from tools.bench.plan import Size
from tools.bench.report import Report, document
from tools.bench.results import Result, figure
from tools.bench.targets import TARGETS

ROOT = Path(__file__).parents[2]


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0

    told = capsys.readouterr().out
    assert [name for name in BENCHMARKS if f"\n    {name} " in told] == list(BENCHMARKS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["replays"], "no benchmark replays; there are gen, micro, replay"),
        (["--fast"], "--fast"),
        (["reference"], "reference needs --reference DIR"),
        (["micro", "--gate"], "no gates in micro; there are some in replay, snapshot, live, control, fanin"),
    ],
)
def test_a_wrong_call_is_refused_and_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == EXIT_USAGE

    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""


def test_a_folder_without_the_adapters_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("bash", "jq"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert run(["--reference", str(tmp_path), "--reference-poll", "poll"]) == EXIT_FAILED

    assert f"there is no {tmp_path}/poll" in capsys.readouterr().err


def test_a_missing_jq_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bash").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert run(["--reference", str(tmp_path)]) == EXIT_FAILED

    assert "needs jq" in capsys.readouterr().err


def test_a_quick_replay_tells_everything_but_verdicts(tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    words = ("replay", "--quick", "--seed", "5", "--json", "-", "--chart", str(chart), "--folder", str(tmp_path))

    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["format"], told["size"], told["seed"]) == ("opsmgr-bench/1", "quick", 5)
    assert told["failures"] == {}
    assert {"python", "grpcio", "orjson", "kernel", "cpu", "nproc"} <= told["machine"].keys()
    assert {moment: len(load) for moment, load in told["load"].items()} == {"before": 3, "after": 3}
    replay = told["benchmarks"]["replay"]
    figures = replay["figures"]
    assert (figures["replay.lost"]["median"], figures["replay.doubled"]["median"]) == (0, 0)
    assert len(figures["replay.small.rate"]["values"]) == 2
    assert figures["replay.small.rate"]["target"] == {"relation": ">=", "bound": 120_000}
    assert {each.get("verdict") for each in figures.values()} == {None}
    assert [point[0] for point in replay["series"]["replay.growth"]["points"]] == [100, 1_000, 2_000]
    assert chart.read_text().startswith("<?xml")
    assert list(tmp_path.iterdir()) == [chart]


def test_a_full_run_judges_every_figure_that_has_a_target() -> None:
    found = Result(figures=tuple(figure(target.key, target.bound) for target in TARGETS))
    report = Report(
        seed=1,
        size=Size.FULL,
        machine={},
        load={"before": [], "after": []},
        seconds={"all": 1.0},
        results={"all": found},
    )

    verdicts = {key: each["verdict"] for key, each in document(report)["benchmarks"]["all"]["figures"].items()}

    assert verdicts == {target.key: "missed" if target.relation == "<" else "met" for target in TARGETS}


def test_a_benchmark_that_fails_takes_no_figure_from_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jq").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "poll").write_text("echo not today >&2; exit 3")
    (tmp_path / "snapshot").touch()
    adapters = ("--reference", str(tmp_path), "--reference-poll", "poll", "--reference-snapshot", "snapshot")
    written, chart = tmp_path / "report.json", tmp_path / "chart.svg"

    code = run(["reference", "gen", "--quick", *adapters, "--json", str(written), "--chart", str(chart)])

    assert code == EXIT_FAILED
    told = capsys.readouterr()
    assert "a line of small, on average" in told.out
    last = told.err.splitlines()[-1]
    assert last.startswith("bench: reference failed: ReferenceMissing: ")
    assert last.endswith(" ended with 3: not today")
    report = json.loads(written.read_text())
    assert (list(report["benchmarks"]), list(report["failures"])) == (["gen"], ["reference"])
    assert chart.exists()


def test_the_adapters_of_a_checkout_are_timed_on_the_same_log_and_the_version_of_jq_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stand-ins: what they print is not looked at, but they get the log that they would read."""
    asked = tmp_path / "asked"
    _executable(tmp_path / "jq", 'test "$1" = --version && echo jq-1.7.1')
    _executable(tmp_path / "poll", f'echo "$@" >> {asked}; test "$(wc -l < "$2/.superloop/loops/$4/events.jsonl")" = 2')
    _executable(tmp_path / "snapshot", "sleep 0.2")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    adapters = ("--reference", str(tmp_path), "--reference-poll", "poll", "--reference-snapshot", "snapshot")
    written = tmp_path / "report.json"

    assert run(["reference", "--quick", *adapters, "--json", str(written)]) == 0

    found = json.loads(written.read_text())["benchmarks"]["reference"]
    figures = found["figures"]
    assert found["notes"] == {"jq": "jq-1.7.1"}
    assert "jq-1.7.1" in figures["reference.poll"]["text"]
    assert figures["reference.snapshot"]["median"] >= 200
    assert figures["reference.snapshot_to_own"]["median"] > 0
    assert figures["reference.poll_to_own"]["median"] > 0
    assert 0 < figures["reference.poll"]["median"] < figures["reference.snapshot"]["median"]
    assert asked.read_text().splitlines()[0].split()[4:] == ["--from-start"]


def _executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
