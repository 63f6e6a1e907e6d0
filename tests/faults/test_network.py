"""T15, T16: connections that are reset, sliced, slowed and silenced; subscriptions go on, and both sides notice."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from opsmgr.errors import NoAnswer
from opsmgr.subscription import subscribe
from opsmgr.transport import sprite_service
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.face import server
from sprite_agent.face.server import running
from support.chaos import ChaosProxy, Weather
from support.figures import found, scaled
from support.following import Follower
from support.history import EventHistory
from support.repos import LOOP, event, line
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import AgentProgram

    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
PATIENT = RetryPolicy(attempts=1000, budget=60.0, base=0.005, cap=0.02)
LONG = pytest.mark.timeout(scaled(240, 3600))

# T15


def numbered(first: int, count: int) -> bytes:
    """Lines with events of about 300 bytes."""
    return b"".join(line(event(n=number, data={"text": "x" * 200})) for number in range(first, first + count))


@contextlib.asynccontextmanager
async def reaching(address: str, **settings: Any) -> AsyncIterator[SpriteServiceTransport]:
    """The transport to an agent."""
    transport = SpriteServiceTransport(address, token=TOKEN, policy=PATIENT, **settings)
    yield transport
    await transport.close()


async def follow_through(proxy: ChaosProxy, repo: LoopFiles, *, events: int, portion: int) -> int:
    """Follows a log that grows as it is read, until all of it was seen; fails when anything is missing or doubled.

    Returns how many places there are in the log that streams were lost at.
    """
    query = EventQuery(loop_id=LOOP, follow=True, heartbeat_interval=0.5, max_events=events)
    lost_at: set[int] = set()
    written = portion
    repo.append(numbered(1, portion))
    with EventHistory(repo.log) as history:
        async with (
            reaching(proxy.address) as transport,
            contextlib.aclosing(
                subscribe(transport, query, policy=PATIENT, on_retry=lambda *_: lost_at.add(history.events))
            ) as batches,
        ):
            async for batch in batches:
                history.saw(batch)
                if history.events == written < events:
                    repo.append(numbered(written + 1, min(portion, events - written)))
                    written += min(portion, events - written)
        assert history.events == events
        assert history.at_end()
    return len(lost_at)


@LONG
@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:{}/agent.sock"], ids=["tcp", "unix"])
async def test_connections_reset_at_random_bytes_lose_and_double_nothing(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path, listen: str
) -> None:
    cuts, events = scaled(26, 1_000), scaled(3_000, 1_000_000)
    if listen.startswith("unix:"):  # which know no reset: closed in the middle of a frame
        cuts, events = cuts // 2, events // 2
    # So early that all the cuts are made before the events run out, whatever comes on the way with them.
    latest = len(numbered(1, events // cuts))
    chance = random.Random(15)  # noqa: S311  # the same cuts each time

    def weather() -> Weather:
        return Weather(cut_after=chance.randint(1, latest)) if proxy.cuts < cuts else Weather()

    program = start_agent("--listen", listen.format(tmp_path))
    async with ChaosProxy(program.address(), weather) as proxy:
        places = await follow_through(proxy, repo, events=events, portion=events // cuts // 10)

    assert proxy.cuts == cuts
    assert places > cuts / 3
    socket = "a Unix socket" if listen.startswith("unix:") else "TCP"
    found("T15", f"{cuts} cuts over {socket} at {places} places, {events:,} events: 0 lost, 0 doubled, in order")


@pytest.mark.parametrize(
    ("name", "weather"),
    [
        ("latency", Weather(latency=0.03)),
        ("slices", Weather(slices=64)),
        ("bandwidth", Weather(bandwidth=2_000_000)),
        ("ends", Weather(end_after=150_000)),
        ("ends late", Weather(end_after=150_000, slow_close=0.2)),
        ("all of it", Weather(latency=0.001, slices=2_000, end_after=150_000, slow_close=0.05)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_line_loses_and_doubles_nothing(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, name: str, weather: Weather
) -> None:
    events = scaled(1_000, 20_000)
    program = start_agent("--listen", "127.0.0.1:0")
    async with ChaosProxy(program.address(), lambda: weather) as proxy:
        places = await follow_through(proxy, repo, events=events, portion=100)

    assert (proxy.cuts > 0) == (places > 1) == (weather.end_after is not None)
    found("T15", f"{name}: {proxy.connections} connections, {events:,} events: 0 lost, 0 doubled, in order")


# T16

KEEPALIVE = 2_000
"""Milliseconds, a tenth of the real figure."""
PING_TIMEOUT = 1_500
NOTICED = 6.0
"""Seconds until a vanished peer has to be noticed: those two, and what a machine may stand still for."""
QUIET = EventQuery(loop_id=LOOP, follow=True, heartbeat_interval=60.0)
"""Nothing but keepalive can notice anything in time."""
BOTH_SIDES = ((server, "OPTIONS"), (sprite_service, "CHANNEL_OPTIONS"))


@pytest.fixture
def quick_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides use their options, with a tenth of the times."""
    shorter = {
        "grpc.keepalive_time_ms": KEEPALIVE,
        "grpc.keepalive_timeout_ms": PING_TIMEOUT,
        "grpc.http2.ping_timeout_ms": PING_TIMEOUT,
        "grpc.http2.min_ping_interval_without_data_ms": KEEPALIVE // 2,
    }
    for module, name in BOTH_SIDES:
        options = getattr(module, name)
        monkeypatch.setattr(module, name, tuple((key, shorter.get(key, value)) for key, value in options))


@pytest.fixture
def no_ping_timeout(quick_keepalive: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, without the option that matters; keepalive_timeout_ms stays."""
    for module, name in BOTH_SIDES:
        kept = tuple(pair for pair in getattr(module, name) if pair[0] != "grpc.http2.ping_timeout_ms")
        monkeypatch.setattr(module, name, kept)


def descriptors(address: str, log: Path) -> int:
    """How many connections to `address` and open event logs this process holds on the agent's side."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    sockets = [entry.split() for entry in tables.splitlines() if ":" in entry]
    listening = "0A"
    ours = {f"socket:[{entry[9]}]" for entry in sockets if entry[1].endswith(port) and entry[3] != listening}
    ours.add(str(log))
    held = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            held += str(descriptor.readlink()) in ours
    return held


async def seconds_until(fact: Callable[[], bool], what: str) -> float:
    """How long it takes until `fact` is true."""
    began = time.monotonic()
    await asyncio.to_thread(until, fact, what)
    return time.monotonic() - began


async def seconds_until_lost(following: Follower) -> float:
    """How long it takes until a subscription ends without an answer."""
    began = time.monotonic()
    with pytest.raises(NoAnswer):
        await following.next()
    return time.monotonic() - began


async def test_a_peer_that_vanishes_is_noticed_on_both_sides_and_nothing_of_it_is_kept(
    quick_keepalive: None, config: ServeConfig, repo: LoopFiles
) -> None:
    ways = [("both ways", True, True), ("upwards", True, False), ("downwards", False, True)]
    with structlog.testing.capture_logs() as log:
        async with (
            running(dataclasses.replace(config, listen="127.0.0.1:0")) as address,
            contextlib.AsyncExitStack() as open_,
        ):
            followings = []
            for _, up, down in ways:
                proxy = await open_.enter_async_context(ChaosProxy(address))
                transport = await open_.enter_async_context(reaching(proxy.address))
                following = await open_.enter_async_context(Follower(transport.events(QUIET)))
                await following.next()
                proxy.silent_up, proxy.silent_down = up, down
                followings.append(following)
            most = len(ways) + 1  # the tail opens the log, for all of them, when it looks first
            await seconds_until(lambda: descriptors(address, repo.log) <= most, "one log at most is open for all")

            agent, *managers = await asyncio.gather(
                seconds_until(lambda: descriptors(address, repo.log) == 0, "the agent has closed what it held"),
                *[seconds_until_lost(following) for following in followings],
            )
            assert [entry["code"] for entry in log if entry["event"] == "call"] == ["CANCELLED"] * len(ways)

    assert max(agent, *managers) <= NOTICED
    for (way, _, _), seconds in zip(ways, managers, strict=True):
        found("T16", f"silence {way}: the manager notices after {seconds:.1f} s, the agent within {agent:.1f} s")


async def test_without_the_ping_timeout_a_vanished_peer_is_not_noticed_in_time(
    no_ping_timeout: None, config: ServeConfig, repo: LoopFiles
) -> None:
    async with (
        running(dataclasses.replace(config, listen="127.0.0.1:0")) as address,
        ChaosProxy(address) as proxy,
        reaching(proxy.address) as transport,
        Follower(transport.events(QUIET)) as following,
    ):
        await following.next()
        proxy.silent_up = proxy.silent_down = True
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(following.next(), NOTICED)
        assert descriptors(address, repo.log) in {1, 2}  # its connection, and maybe the log
