"""Many targets at once: none delays another, none ends another, and the status file says how they all are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr import store
from opsmgr.config import FleetSettings
from opsmgr.errors import LoopLocked
from opsmgr.fleet import follower, slots
from opsmgr.fleet import supervisor as supervisor_module
from opsmgr.fleet.follower import Follower
from opsmgr.fleet.metrics import FleetMetrics
from opsmgr.fleet.supervisor import Supervisor
from opsmgr.passes.reconcile import reconcile_held
from opsmgr.targets import Target
from sprite_agent.contract.validation import validate
from support.repos import LOOP, LoopFiles, event, line
from support.waiting import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from pathlib import Path


@pytest.fixture
def settings(tmp_path: Path) -> FleetSettings:
    """Two at once of whatever there is a bound on."""
    return FleetSettings(
        poll_seconds=0.2,
        settle_seconds=0.02,
        max_catch_ups=2,
        max_passes=2,
        status_file=tmp_path / "status.json",
    )


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """An address that takes connections and says nothing."""
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        yield f"unix:{path}"


@contextlib.asynccontextmanager
async def supervised(settings: FleetSettings, targets: Iterable[Target]) -> AsyncIterator[Supervisor]:
    """These targets under supervision."""
    supervisor = Supervisor(settings, FleetMetrics())
    await supervisor.supervise(targets)
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        running.cancel()
        await asyncio.wait([running])


def here(folder: Path, name: str) -> Target:
    """A loop on this machine, with one event."""
    files = LoopFiles(folder / name)
    files.append(line(event("usage_check")))
    return Target(name=name, loop=LOOP, repo=files.repo)


def write(target: Target) -> None:
    """Adds an event to its log."""
    assert target.repo is not None
    with (target.repo / ".superloop" / "loops" / LOOP / "events.jsonl").open("ab") as log:
        log.write(line(event("usage_check")))


def rows(settings: FleetSettings) -> dict[str, Any]:
    """What the status file says, by target."""
    if not settings.status_file.exists():
        return {}
    document = json.loads(settings.status_file.read_text())
    validate("manager_status", document)
    return {row["name"]: row for row in document["targets"]}


async def test_targets_that_have_frozen_delay_no_other(
    settings: FleetSettings, silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PATIENCE", 0.1)
    frozen = [
        Target(name=f"frozen-{n}", loop=LOOP, transport="sprite_service", address=silent, folder=tmp_path / f"f{n}")
        for n in range(12)
    ]
    well = here(tmp_path, "well")
    async with supervised(settings, [*frozen, well]):
        await eventually(
            lambda: rows(settings).get("well", {}).get("cursorLine") == 1, "the one that is well is followed"
        )
        for count in range(2, 6):
            write(well)
            async with asyncio.timeout(3):
                while _handled(well) < count:  # noqa: ASYNC110  # told by another task
                    await asyncio.sleep(0.01)

        assert all(rows(settings)[target.name]["reach"] != "connected" for target in frozen)


async def test_polls_count_among_the_passes_at_once(
    settings: FleetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of targets whose agents are away, which are read by their repos."""
    passing = reconcile_held
    under_way, most = 0, 0

    async def counted(*args: Any, **options: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(0.05)  # time for any other that may be beside it
            return await passing(*args, **options)
        finally:
            under_way -= 1

    monkeypatch.setattr(follower, "reconcile_held", counted)
    nobody = f"unix:{tmp_path}/nobody.sock"
    away = [
        replace(here(tmp_path, f"away-{n}"), transport="sprite_service", address=nobody, fallback="local")
        for n in range(6)
    ]
    async with supervised(settings, away):
        await eventually(
            lambda: all(rows(settings).get(target.name, {}).get("lastEventName") for target in away), "all are read"
        )

    assert 1 <= most <= settings.max_passes


async def test_a_bug_met_in_one_target_ends_no_other(
    settings: FleetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervise = Follower._supervise  # noqa: SLF001  # where a bug would be

    async def broken(self: Follower, store: Any) -> None:
        if self.view.target.name == "bad":
            raise RuntimeError("a bug")
        await supervise(self, store)

    monkeypatch.setattr(Follower, "_supervise", broken)
    async with supervised(settings, [here(tmp_path, "bad"), here(tmp_path, "good")]):
        await eventually(lambda: rows(settings).get("good", {}).get("cursorLine") == 1, "the good one is followed")


@pytest.mark.parametrize("path", ["loop", "a\0b"], ids=["a link to itself", "no path at all"])
async def test_a_repo_that_leads_nowhere_ends_no_other(settings: FleetSettings, tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    bad = Target(name="bad", loop=LOOP, repo=tmp_path / path)
    async with supervised(settings, [bad, here(tmp_path, "good")]):
        await eventually(lambda: rows(settings).get("good", {}).get("cursorLine") == 1, "the good one is followed")

        assert rows(settings)["bad"]["error"]["reason"] == "INPUT_INVALID"


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("state.json", {"run": {"runId": 7}}),
        ("state.json", {"projection": "unknown"}),
        ("health.json", {"status": "unknown"}),
        ("agent.json", {"frozen": True}),
        ("agent.json", {"journal": {}}),
    ],
)
async def test_a_file_of_another_shape_counts_as_not_there_and_is_the_matter_of_its_target_alone(
    settings: FleetSettings, tmp_path: Path, name: str, document: Any
) -> None:
    bad, good = here(tmp_path, "bad"), here(tmp_path, "good")
    assert bad.repo is not None
    shutil.rmtree(bad.repo / ".superloop" / "loops")  # so that no pass writes the file anew
    store.save(bad.store().folder / name, document)
    async with supervised(settings, [bad, good]):
        await eventually(lambda: rows(settings).get("good", {}).get("cursorLine") == 1, "the good one is followed")
        row = rows(settings)["bad"]

        assert (row["runId"], row["lifecycle"], row["frozen"]) == (None, None, None)


async def test_a_status_that_can_not_be_told_ends_no_supervision(
    settings: FleetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "TICK", 0.01)
    one = here(tmp_path, "one")
    async with supervised(settings, [one]) as supervisor:
        await eventually(lambda: rows(settings).get("one", {}).get("cursorLine") == 1, "it is followed")
        [view] = supervisor.views()
        view.retries = -1
        for _ in range(2):
            before = supervisor._ticked  # noqa: SLF001  # that it looks again is what this is about
            await eventually(lambda before=before: supervisor._ticked > before, "it goes on")  # type: ignore[misc]  # noqa: SLF001
        view.retries = 7
        await eventually(lambda: rows(settings).get("one", {}).get("retries") == 7, "it is told again")


async def test_the_status_file_has_a_row_for_each_target_in_their_order(
    settings: FleetSettings, tmp_path: Path
) -> None:
    async with supervised(settings, [here(tmp_path, name) for name in ("c", "a", "b")]):
        await eventually(lambda: list(rows(settings)) == ["c", "a", "b"], "all are told")

    assert not settings.status_file.exists(), "nobody keeps it current any more"


async def test_only_what_has_changed_begins_anew(settings: FleetSettings, tmp_path: Path) -> None:
    one, two = here(tmp_path, "one"), here(tmp_path, "two")
    async with supervised(settings, [one, two]) as supervisor:
        before = {view.target.name: view for view in supervisor.views()}
        changed = Target(name="two", loop=LOOP, repo=two.repo, fallback="local")
        await supervisor.supervise([one, changed])
        after = {view.target.name: view for view in supervisor.views()}

        assert after["one"] is before["one"]
        assert after["two"] is not before["two"]
        assert after["two"].target == changed


async def test_targets_may_change_while_the_status_is_told(
    settings: FleetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    telling, go_on = threading.Event(), threading.Event()

    def look(follower: Follower) -> Any:
        if threading.current_thread() is not threading.main_thread():
            telling.set()
            go_on.wait(DEADLINE)
        return follower.__dict__["view"]

    def keep(follower: Follower, view: Any) -> None:
        follower.__dict__["view"] = view

    monkeypatch.setattr(Follower, "view", property(look, keep), raising=False)
    one, two = here(tmp_path, "one"), here(tmp_path, "two")
    async with supervised(settings, [one]) as supervisor:
        await eventually(telling.is_set, "the first row is told")
        await supervisor.supervise([one, two])
        go_on.set()
        await eventually(lambda: list(rows(settings)) == ["one", "two"], "both are told")


async def test_an_end_during_a_reload_waits_for_who_still_writes(
    settings: FleetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = here(tmp_path, "one")
    kept = one.store()
    writing, go_on = threading.Event(), threading.Event()
    save = store.save

    def slow(path: Path, document: Any, **options: Any) -> None:
        if path == kept.state:
            writing.set()
            go_on.wait(DEADLINE)
        save(path, document, **options)

    monkeypatch.setattr(store, "save", slow)
    supervisor = Supervisor(settings, FleetMetrics())
    await supervisor.supervise([one])
    running = asyncio.create_task(supervisor.run())
    await eventually(writing.is_set, "a pass writes")
    reloading = asyncio.create_task(supervisor.supervise([]))
    await eventually(lambda: not supervisor.views(), "the target is told to end")
    reloading.cancel()
    running.cancel()
    done, _ = await asyncio.wait({reloading, running}, timeout=0.2)
    with pytest.raises(LoopLocked), kept.locked():
        pass
    go_on.set()
    await asyncio.wait({running})

    assert done == {reloading}
    with kept.locked():
        assert _handled(one) == 1


def _handled(target: Target) -> int:
    path = target.store().cursor
    return int(json.loads(path.read_text())["eventLineOffset"]) if path.exists() else 0
