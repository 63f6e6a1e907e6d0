"""`opsmgr run` as a process: its config, signals, status file and endpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.repos import LOOP, LoopFiles, event, line
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(sys.executable).with_name("opsmgr")


class Daemon:
    """One `opsmgr run`. Lives until its test ends."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.status_file = folder / "status.json"
        self._log = folder / "log"
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder)}
        with self._log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [PROGRAM, "run", *words], env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def said(self, what: str) -> list[dict[str, Any]]:
        """Its log lines so far about one event."""
        lines = self.text.rpartition("\n")[0].splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == what]

    def rows(self) -> dict[str, Any]:
        """The targets in its status file."""
        if not self.status_file.exists():
            return {}
        status = json.loads(self.status_file.read_text())
        if status["pid"] != self.process.pid:
            return {}  # left by one that was killed
        return {row["name"]: row for row in status["targets"]}

    def reaches(self, *names: str) -> bool:
        """Whether it supervises just these, and reads them all."""
        rows = self.rows()
        return set(rows) == set(names) and all(row["reach"] == "connected" for row in rows.values())

    def end(self) -> None:
        """Ends it at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two repos, `one` and `two`, beside the config."""
    for name in ("one", "two"):
        LoopFiles(tmp_path / name).append(line(event()), line(event("loop_complete")))
    return tmp_path


def configure(folder: Path, *names: str) -> Path:
    """A config of these repos, read on this machine."""
    path = folder / "opsmgr.toml"
    targets = [f'[[targets]]\nname = "{name}"\nloop = "{LOOP}"\nrepo = "{name}"\n' for name in names]
    settings = f'[fleet]\nstatus_file = "{folder}/status.json"\nsettle_seconds = 0.1\n'
    path.write_text("\n".join([settings, *targets]))
    return path


@pytest.fixture
def daemon(files: Path) -> Iterator[Daemon]:
    """It supervises both."""
    made = Daemon(files, "--config", str(configure(files, "one", "two")), "--metrics", "127.0.0.1:0")
    yield made
    made.end()


def test_it_supervises_what_the_config_says_until_it_is_told_to_end(daemon: Daemon, files: Path) -> None:
    until(lambda: daemon.reaches("one", "two"), "both are followed")
    until((files / "one/.superloop/ops-manager" / LOOP / "state.json").exists, "its files are written")
    daemon.process.send_signal(signal.SIGTERM)

    assert daemon.process.wait(DEADLINE) == 0, daemon.text
    assert daemon.said("ended")
    assert not daemon.status_file.exists()


def test_a_changed_config_counts_from_the_signal_on(daemon: Daemon, files: Path) -> None:
    until(lambda: daemon.reaches("one", "two"), "both are followed")
    configure(files, "two")
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: daemon.reaches("two"), "one is left alone")
    configure(files, "one", "two")
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: daemon.reaches("one", "two"), "it is followed again")


def test_a_config_with_a_mistake_changes_nothing_and_the_log_says_where_it_is(daemon: Daemon, files: Path) -> None:
    until(lambda: daemon.reaches("one", "two"), "both are followed")
    path = configure(files, "two")
    path.write_text(path.read_text() + 'colour = "red"\n')
    daemon.process.send_signal(signal.SIGHUP)
    refused = until(lambda: daemon.said("the config is not taken"), "the mistake is told")

    assert f"{path}:{len(path.read_text().splitlines())}" in refused[0]["error"]
    assert daemon.reaches("one", "two")


def test_its_counts_and_its_health_can_be_scraped(daemon: Daemon) -> None:
    address = until(lambda: daemon.said("metrics"), "the endpoint is there")[0]["address"]
    until(lambda: daemon.reaches("one", "two"), "both are followed")
    with urllib.request.urlopen(address, timeout=DEADLINE) as answer:  # noqa: S310  # of our own daemon
        text = answer.read().decode()
    with urllib.request.urlopen(address.replace("/metrics", "/healthz"), timeout=DEADLINE) as answer:  # noqa: S310
        health = json.load(answer)

    assert 'opsmgr_targets{reach="connected"} 2.0' in text
    assert 'opsmgr_events_total{target="one"} 2.0' in text
    assert health["ok"]


@pytest.mark.parametrize(
    "address", ["foo", "127.0.0.1", "", "127.0.0.1:99999", "0.0.0.0:9556", ":9464", "9464", "unix:/run/metrics.sock"]
)
def test_an_address_for_metrics_that_the_config_may_not_have_is_refused(files: Path, address: str) -> None:
    ended = subprocess.run(
        [PROGRAM, "run", "--config", str(configure(files, "one")), "--metrics", address],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )

    assert ended.returncode == 64
    told = ended.stderr.splitlines()[-1]
    assert told.startswith("Error: --metrics: ")
    assert address in told


def test_a_second_one_with_the_same_status_file_does_not_start(daemon: Daemon, files: Path) -> None:
    until(lambda: daemon.reaches("one", "two"), "both are followed")
    second = subprocess.run(
        [PROGRAM, "run", "--config", str(files / "opsmgr.toml")],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )

    assert second.returncode == 1
    assert str(daemon.process.pid) in second.stderr


def test_killed_at_any_moment_it_goes_on_where_its_files_say_and_raises_no_alarm_for_that(files: Path) -> None:
    config = configure(files, "one", "two")
    manager = files / "one/.superloop/ops-manager" / LOOP
    log = files / "one/.superloop/loops" / LOOP / "events.jsonl"
    for kill in range(5):
        daemon = Daemon(files, "--config", str(config))
        until(lambda daemon=daemon: daemon.reaches("one", "two"), "both are followed")  # type: ignore[misc]  # bound now
        with log.open("ab") as writing:
            writing.write(line(event("usage_check")) * (kill + 1))
        daemon.process.kill()
        daemon.end()
    daemon = Daemon(files, "--config", str(config))
    until(lambda: json.loads((manager / "cursor.json").read_text())["eventLineOffset"] == 17, "all is handled")
    daemon.end()
    state = json.loads((manager / "state.json").read_text())
    told = (manager / "escalations.jsonl").read_text() if (manager / "escalations.jsonl").exists() else ""

    assert state["sequence"]["violations"] == []
    assert "ordering_drift_detected" not in told
