"""One target's supervision: what has come is projected, the ladder is gone down and up, nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from conftest import TOKEN

from opsmgr.config import FleetSettings
from opsmgr.errors import NoAnswer
from opsmgr.fleet import follower as follower_module
from opsmgr.fleet.follower import Follower
from opsmgr.fleet.metrics import FleetMetrics
from opsmgr.fleet.slots import Slots
from opsmgr.passes.thresholds import Thresholds
from opsmgr.store import LoopStore
from opsmgr.targets import Target
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.errors import Draining, LogReplaced
from sprite_agent.face.server import running
from support.repos import LOOP, event, line, put
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from opsmgr.fleet.view import TargetView
    from opsmgr.passes.feed import Feed
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.streaming import EventBatch, EventQuery
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles


AGELESS = Thresholds(profile="ageless", ingest_lag_seconds=(10**9, 10**9), transport_failure_streak=(2, 4))
"""The logs of these tests are old."""


@pytest.fixture
def folder(tmp_path: Path) -> LoopStore:
    """The manager's files."""
    return LoopStore(tmp_path / "manager" / LOOP)


@pytest.fixture
def target(config: ServeConfig, folder: LoopStore, tmp_path: Path) -> Target:
    """The repo's loop, by its agent."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    return Target(
        name="one",
        loop=LOOP,
        transport="sprite_service",
        address=config.listen,
        repo=config.repo,
        folder=folder.folder,
        token_file=token,
        thresholds=AGELESS,
    )


@pytest.fixture
def settings(tmp_path: Path) -> FleetSettings:
    """Quick enough to be watched."""
    return FleetSettings(
        poll_seconds=0.2, reproject_seconds=60.0, settle_seconds=0.02, status_file=tmp_path / "status.json"
    )


@contextlib.asynccontextmanager
async def followed(target: Target, settings: FleetSettings) -> AsyncIterator[Follower]:
    """A target under supervision."""
    made = Follower(target, settings=settings, catch_ups=Slots(16), passes=Slots(16), metrics=FleetMetrics())
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])


def lines_of(path: Path) -> list[Any]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def ingested(store: LoopStore) -> int:
    """How many events all passes have handled."""
    return sum(record["eventsIngested"] for record in lines_of(store.reconcile_telemetry))


def categories(store: LoopStore) -> list[str]:
    return [record["category"] for record in lines_of(store.escalations)]


def is_read(view: TargetView, rung: str) -> bool:
    return view.rung == rung and view.reach == "connected"


def runs(repo: LoopFiles) -> None:
    """Has a run at work on the loop."""
    put(repo.state, {"active": True, "current_loop_id": LOOP, "iteration": 1})


async def test_what_happens_is_in_the_files_soon(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    repo.append(*(line(event("usage_check")) for _ in range(5)))
    async with running(config), followed(target, settings) as follower:
        await eventually(lambda: ingested(folder) == 5, "the log so far is handled")
        repo.append(line(event("loop_complete")))
        await eventually(lambda: ingested(folder) == 6, "the next event is handled")
        state = json.loads(folder.state.read_text())
        view = follower.view

        assert state["transition"]["triggeringSignal"] == "event:loop_complete"
        assert json.loads(folder.cursor.read_text())["eventLineOffset"] == 6
        assert is_read(view, "stream")
        assert (view.received_line, view.behind_lines) == (6, 0)


async def test_a_supervision_that_begins_again_goes_on_where_the_last_one_stopped(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    repo.append(*(line(event("usage_check")) for _ in range(5)))
    async with running(config):
        async with followed(target, settings):
            await eventually(lambda: ingested(folder) == 5, "the log so far is handled")
        repo.append(*(line(event("usage_check")) for _ in range(3)))
        async with followed(target, settings):
            await eventually(lambda: ingested(folder) == 8, "what was written meanwhile is handled")
            repo.append(line(event("usage_check")))
            await eventually(lambda: ingested(folder) == 9, "and what comes")


async def test_a_malformed_record_is_escalated_and_the_rest_goes_on(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    async with running(config), followed(target, settings):
        repo.append(line(event("usage_check")), b"no event\n", line(event("usage_check")))
        await eventually(lambda: ingested(folder) == 2, "the events are handled")

    assert categories(folder) == ["event_malformed"]


async def test_passes_go_on_once_a_file_that_they_need_can_be_read_again(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    repo.append(line(event("usage_check")))
    async with running(config), followed(target, settings) as follower:
        await eventually(lambda: ingested(folder) == 1, "it is followed")
        folder.agent.write_bytes(b"")
        repo.append(line(event("usage_check")))
        await eventually(lambda: follower.view.error is not None, "a pass fails")
        folder.agent.unlink()
        repo.append(line(event("usage_check")))
        await eventually(lambda: ingested(folder) == 3, "all is handled")


async def test_passes_go_on_after_one_that_met_a_bug(
    config: ServeConfig,
    target: Target,
    settings: FleetSettings,
    repo: LoopFiles,
    folder: LoopStore,
    *,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo.append(line(event("usage_check")))
    met: list[Any] = []

    async def broken(*what: Any, **_: Any) -> Any:
        met.append(what)
        raise RuntimeError("a bug")

    async with running(config), followed(target, settings):
        await eventually(lambda: ingested(folder) == 1, "it is followed")
        with monkeypatch.context() as patched:
            patched.setattr(follower_module, "reconcile_held", broken)
            repo.append(line(event("usage_check")))
            await eventually(lambda: met, "a pass meets a bug")
        repo.append(line(event("usage_check")))
        await eventually(lambda: ingested(folder) == 3, "all is handled")


async def test_an_agent_that_goes_while_a_run_is_at_work_is_an_alarm_and_its_return_ends_it(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    runs(repo)
    repo.append(line(event("usage_check")))
    async with followed(target, settings) as follower:
        async with running(config):
            await eventually(lambda: ingested(folder) == 1, "it is followed")
        await eventually(lambda: follower.view.reach == "unreachable", "it is missed")
        await eventually(lambda: "health_degraded" in categories(folder), "and that is escalated")
        repo.append(line(event("usage_check")))
        async with running(config):
            await eventually(lambda: is_read(follower.view, "stream"), "it is back")
            await eventually(lambda: ingested(folder) == 2, "with what happened meanwhile")
            await eventually(
                lambda: json.loads(folder.health.read_text())["transport"]["ingestStatus"] == "success", ""
            )
            assert follower.view.error is None


async def test_a_draining_agent_is_not_polled_at_once(
    target: Target, settings: FleetSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls: list[Any] = []

    async def draining(_transport: Any, _query: Any) -> Any:
        raise Draining("about to stop", retry_after=0.01)
        yield  # never reached: it makes this a stream

    async def noting(_follower: Follower, *what: Any) -> None:
        polls.append(what)

    monkeypatch.setattr(SpriteServiceTransport, "events", draining)
    monkeypatch.setattr(Follower, "_poll", noting)
    async with followed(target, replace(settings, poll_seconds=60.0)) as follower:
        await eventually(lambda: follower.view.retries > 1, "it was refused")

    assert not polls


async def test_a_sprite_that_sleeps_is_no_alarm(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    put(repo.state, {"active": False})
    repo.append(line(event("loop_complete")))
    async with followed(target, settings) as follower:
        async with running(config):
            await eventually(lambda: ingested(folder) == 1, "it is followed")
        await eventually(lambda: follower.view.reach == "suspended", "it sleeps")
        before = categories(folder)
        async with running(config):
            await eventually(lambda: is_read(follower.view, "stream"), "it is awake")

    assert categories(folder) == before
    assert all(record["status"] == "success" for record in lines_of(folder.reconcile_telemetry))


async def test_the_platform_says_whether_a_sprite_sleeps(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    runs(repo)
    repo.append(line(event("usage_check")))
    async with followed(replace(target, state_command=("echo", "cold")), settings) as follower:
        async with running(config):
            await eventually(lambda: ingested(folder) == 1, "it is followed")
        await eventually(lambda: follower.view.reach == "suspended", "it sleeps")


async def test_a_target_that_was_never_reached_is_not_taken_for_asleep(
    target: Target, settings: FleetSettings, folder: LoopStore
) -> None:
    async with followed(target, settings) as follower:
        await eventually(lambda: follower.view.reach == "unreachable", "nobody is there")
        await eventually(lambda: "health_degraded" in categories(folder), "which is escalated")


async def test_a_target_that_may_not_stream_is_polled_and_streams_when_it_may(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    repo.append(line(event("usage_check")))
    async with running(replace(config, max_streams_per_caller=1)), contextlib.AsyncExitStack() as others:
        other = replace(target, name="other", folder=folder.folder.with_name("other"))
        first = await others.enter_async_context(followed(other, settings))
        await eventually(lambda: is_read(first.view, "stream"), "another has the only stream")
        async with followed(target, settings) as second:
            await eventually(lambda: is_read(second.view, "poll"), "this one is polled")
            repo.append(line(event("usage_check")))
            await eventually(lambda: ingested(folder) == 2, "and misses nothing")
            await others.aclose()
            await eventually(lambda: is_read(second.view, "stream"), "the stream is free")
            repo.append(line(event("usage_check")))
            await eventually(lambda: ingested(folder) == 3, "and nothing is doubled")


async def test_a_target_whose_streams_break_at_once_is_polled(
    config: ServeConfig,
    target: Target,
    settings: FleetSettings,
    repo: LoopFiles,
    folder: LoopStore,
    *,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo.append(line(event("usage_check")))
    events, make_pass = SpriteServiceTransport.events, Follower._pass  # noqa: SLF001  # one of a stream takes longer

    async def breaking(transport: SpriteServiceTransport, query: EventQuery) -> AsyncGenerator[EventBatch]:
        async with contextlib.aclosing(events(transport, query)) as batches:
            async for batch in batches:
                yield batch
                if query.follow:
                    raise NoAnswer("UNAVAILABLE: Socket closed")

    async def slow(follower: Follower, transport: Transport, store: LoopStore, feed: Feed | None) -> bool:
        if feed is not None:
            await asyncio.Event().wait()
        return await make_pass(follower, transport, store, feed)

    monkeypatch.setattr(SpriteServiceTransport, "events", breaking)
    monkeypatch.setattr(Follower, "_pass", slow)
    async with running(config), followed(target, settings):
        await eventually(lambda: ingested(folder) == 1, "what the log has is handled")


async def test_a_malformed_record_ends_no_lower_rung(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    runs(repo)
    repo.append(line(event("usage_check")), b"no event\n", line(event("usage_check")))
    async with running(replace(config, max_streams_per_caller=1)):
        other = replace(target, name="other", folder=folder.folder.with_name("other"))
        async with followed(other, settings) as first:
            await eventually(lambda: is_read(first.view, "stream"), "another has the only stream")
            async with followed(target, settings) as second:
                await eventually(lambda: is_read(second.view, "poll"), "this one is polled")
    repo.append(b"no event\n", line(event("usage_check")))
    async with followed(replace(target, fallback="local"), settings) as follower:
        await eventually(lambda: is_read(follower.view, "local"), "the repo is read")

    assert ingested(folder) == 3
    assert categories(folder).count("event_malformed") == 2


async def test_a_target_whose_agent_is_gone_is_read_from_its_repo_where_that_is_allowed(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    runs(repo)
    repo.append(line(event("usage_check")))
    async with followed(replace(target, fallback="local"), settings) as follower:
        async with running(config):
            await eventually(lambda: is_read(follower.view, "stream"), "it is followed")
        await eventually(lambda: is_read(follower.view, "local"), "the repo is read")
        repo.append(line(event("usage_check")))
        await eventually(lambda: ingested(folder) == 2, "and misses nothing")
        async with running(config):
            await eventually(lambda: is_read(follower.view, "stream"), "the way up is open")
            repo.append(line(event("usage_check")))
            await eventually(lambda: ingested(folder) == 3, "and doubles nothing")


async def test_another_log_in_the_place_of_the_one_is_escalated_and_read_from_its_start(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    repo.append(*(line(event("usage_check")) for _ in range(5)))
    async with running(config), followed(target, settings):
        await eventually(lambda: ingested(folder) == 5, "the log so far is handled")
        repo.replace(line(event("loop_start")) + line(event("loop_complete")))
        await eventually(lambda: ingested(folder) == 7, "the other log is handled")

    assert "log_replaced" in categories(folder)
    assert "ordering_drift_detected" not in categories(folder)


async def test_another_log_that_a_pass_notices_before_the_stream_is_told_and_taken_once(
    config: ServeConfig,
    target: Target,
    settings: FleetSettings,
    repo: LoopFiles,
    folder: LoopStore,
    *,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = SpriteServiceTransport.events

    async def late(transport: SpriteServiceTransport, query: EventQuery) -> AsyncGenerator[EventBatch]:
        try:
            async with contextlib.aclosing(events(transport, query)) as batches:
                async for batch in batches:
                    yield batch
        except LogReplaced:
            if query.follow:
                await eventually(lambda: "log_replaced" in categories(folder), "a pass notices")
            raise

    monkeypatch.setattr(SpriteServiceTransport, "events", late)
    repo.append(*(line(event("usage_check")) for _ in range(5)))
    async with running(config), followed(target, replace(settings, reproject_seconds=0.05)):
        await eventually(lambda: ingested(folder) == 5, "the log so far is handled")
        repo.replace(line(event("loop_start")) + line(event("usage_check")))
        await eventually(lambda: ingested(folder) == 7, "the other log is handled")
        repo.append(line(event("loop_complete")))
        await eventually(lambda: ingested(folder) >= 8, "and what is added to it")

    assert ingested(folder) == 8
    assert categories(folder).count("log_replaced") == 1


async def test_a_control_has_its_target_projected_anew(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    repo.append(line(event("usage_check")))
    async with running(config), followed(target, settings) as follower:
        await eventually(lambda: ingested(folder) == 1, "it is followed")
        follower.look_for_intents()
        passes = len(lines_of(folder.reconcile_telemetry))
        follower.look_for_intents()
        unchanged = len(lines_of(folder.reconcile_telemetry))
        folder.intents.write_text('{"status": "ambiguous"}\n')
        follower.look_for_intents()
        await eventually(lambda: len(lines_of(folder.reconcile_telemetry)) > passes, "another pass")

    assert unchanged == passes


async def test_a_control_that_another_thread_sees_is_told_in_the_thread_of_the_event_loop(
    target: Target, settings: FleetSettings, folder: LoopStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with followed(target, settings) as follower:
        told: list[threading.Thread] = []
        monkeypatch.setattr(follower._due, "set", lambda: told.append(threading.current_thread()))  # noqa: SLF001  # what it tells
        await asyncio.to_thread(follower.look_for_intents)
        folder.intents.write_text('{"status": "ambiguous"}\n')
        await asyncio.to_thread(follower.look_for_intents)
        await eventually(lambda: told, "it is told")

    assert told == [threading.current_thread()]


async def test_a_loop_that_another_manager_works_on_is_left_alone_until_it_is_free(
    config: ServeConfig, target: Target, settings: FleetSettings, repo: LoopFiles, folder: LoopStore
) -> None:
    repo.append(line(event("usage_check")))
    async with running(config):
        with folder.locked():
            async with followed(target, settings) as follower:
                await eventually(lambda: follower.view.error is not None, "the other one is noticed")
                said = follower.view.error
                touched = folder.state.exists()
        async with followed(target, settings):
            await eventually(lambda: ingested(folder) == 1, "it is free")

    assert said is not None
    assert said.reason == "LOOP_LOCKED"
    assert not touched
