"""Callers that take more than their share: refused and told when to come again, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

import pytest

from opsmgr.subscription import subscribe
from opsmgr.transport.credentials import Credentials
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import ControlNotFound, RateLimited, StreamLimit, TokenInvalid
from sprite_agent.face import limits, server
from sprite_agent.face.credential_text import token_line
from sprite_agent.face.credentials import new_token
from sprite_agent.face.limits import BURST, MAX_STREAMS
from sprite_agent.face.server import running
from sprite_agent.face.tls import TlsFiles
from support.certificates import Authority, put
from support.following import Follower
from support.repos import LOOP, event, line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sprite_agent.errors import OpsError
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
ONE_TRY = RetryPolicy(attempts=1)
FOLLOW = EventQuery(loop_id=LOOP, follow=True)
SOON = 10.0
"""Seconds in which a call that is not refused must be answered, whatever else is going on."""


@contextlib.asynccontextmanager
async def reaching(address: str, *, token: str = TOKEN) -> AsyncIterator[SpriteServiceTransport]:
    """The transport to an agent, which tries once."""
    transport = SpriteServiceTransport(address, token=token, policy=ONE_TRY)
    yield transport
    await transport.close()


@contextlib.asynccontextmanager
async def serving(config: ServeConfig, *, streams: int = MAX_STREAMS, rate: int = 1_000) -> AsyncIterator[str]:
    """An agent with these limits."""
    config = dataclasses.replace(config, max_streams_per_caller=streams, max_control_rate=rate)
    async with running(config) as address:
        yield address


@contextlib.asynccontextmanager
async def following(transport: SpriteServiceTransport, count: int) -> AsyncIterator[list[Follower]]:
    """So many streams, all of them under way."""
    async with contextlib.AsyncExitStack() as stack:
        followers = [await stack.enter_async_context(Follower(transport.events(FOLLOW))) for _ in range(count)]
        await asyncio.gather(*(follower.next() for follower in followers))
        yield followers


async def ask_of_a_key(transport: SpriteServiceTransport) -> None:
    """A control call that runs nothing."""
    with pytest.raises(ControlNotFound):
        await transport.get_control(LOOP, "no-such-key")


async def refused_in_the_end(transport: SpriteServiceTransport) -> RateLimited:
    """What who goes on asking is told. What a burst has used comes back meanwhile: some calls may be in time."""
    for _ in range(1_000):
        try:
            await transport.get_control(LOOP, "no-such-key")
        except ControlNotFound:
            continue
        except RateLimited as error:
            return error
    pytest.fail("served a thousand times")


async def test_one_stream_too_many_is_refused_whatever_connection_it_comes_by(config: ServeConfig) -> None:
    async with (
        serving(config, streams=3) as address,
        reaching(address) as one,
        reaching(address) as other,
        following(one, 2),
        following(other, 1),
    ):
        for transport in (one, other):
            with pytest.raises(StreamLimit) as caught:
                await anext(transport.events(FOLLOW))
            assert caught.value.retry_after == limits.STREAM_RETRY
            assert caught.value.details["limit"] == "3"


async def test_streams_that_are_open_go_on_when_another_is_refused(config: ServeConfig, repo: LoopFiles) -> None:
    async with (
        serving(config, streams=2) as address,
        reaching(address) as transport,
        following(transport, 2) as followers,
    ):
        with pytest.raises(StreamLimit):
            await anext(transport.events(FOLLOW))

        repo.append(line(event()))
        assert [await follower.until_lines(1) for follower in followers] == [[1], [1]]


async def test_a_subscription_that_is_refused_begins_when_there_is_room(
    config: ServeConfig, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STREAM_RETRY", 0.05)
    refused = asyncio.Event()
    async with serving(config, streams=1) as address, reaching(address) as transport:
        subscription = subscribe(
            transport, FOLLOW, policy=RetryPolicy(attempts=100), on_retry=lambda _error, _wait: refused.set()
        )
        async with Follower(subscription) as waiting:
            async with following(transport, 1):
                first = asyncio.ensure_future(waiting.next())
                await refused.wait()
            await first

            repo.append(line(event()))
            assert await waiting.until_lines(1) == [1]


async def test_a_caller_with_all_its_streams_on_one_connection_can_still_do_everything_else(
    config: ServeConfig,
) -> None:
    async with serving(config) as address, reaching(address) as transport, following(transport, MAX_STREAMS):
        began = time.monotonic()
        await asyncio.gather(*(transport.info() for _ in range(8)), *(ask_of_a_key(transport) for _ in range(8)))

        assert time.monotonic() - began < SOON
        with pytest.raises(StreamLimit):
            await anext(transport.events(FOLLOW))


async def test_a_caller_with_all_its_streams_of_both_kinds_on_one_connection_can_still_do_everything_else(
    config: ServeConfig, repo: LoopFiles
) -> None:
    repo.append(line(event(message="x" * 1_000)) * 3_000)  # more than is sent to one who does not read
    async with (
        serving(config) as address,
        reaching(address) as transport,
        following(transport, MAX_STREAMS),
        contextlib.AsyncExitStack() as stack,
    ):
        reading = [
            await stack.enter_async_context(contextlib.aclosing(transport.events(EventQuery(loop_id=LOOP))))
            for _ in range(MAX_STREAMS)
        ]
        await asyncio.gather(*(anext(batches) for batches in reading))
        began = time.monotonic()
        await ask_of_a_key(transport)

        assert time.monotonic() - began < SOON


async def test_control_calls_beyond_the_burst_are_refused_and_reads_are_not(config: ServeConfig) -> None:
    async with serving(config, rate=2) as address, reaching(address) as transport:
        for _ in range(2 * BURST):
            await ask_of_a_key(transport)

        refused = await refused_in_the_end(transport)

        assert refused.executed is False
        assert refused.retry_after is not None
        assert 0 < refused.retry_after <= 0.5
        for _ in range(50):
            await transport.info()


async def test_a_caller_that_comes_again_when_it_is_told_is_served(config: ServeConfig) -> None:
    async with serving(config, rate=5) as address, reaching(address) as transport:
        await refused_in_the_end(transport)
        patient = SpriteServiceTransport(address, token=TOKEN, policy=RetryPolicy(attempts=3, base=0.01, cap=0.01))

        while not patient.attempts.codes:  # each of them is served: those before it, if any, were in time
            await ask_of_a_key(patient)

        await patient.close()
        assert list(patient.attempts.codes) == ["RATE_LIMITED"]


async def test_one_callers_share_is_not_anothers(config: ServeConfig, tmp_path: Path) -> None:
    made = [new_token(name, ["read", "control"]) for name in ("greedy", "modest")]
    tokens = put(tmp_path / "tokens", "".join(f"{token_line(token)}\n" for _, token in made).encode())
    config = dataclasses.replace(config, token=None, token_file=tokens)
    (greedy_token, _), (modest_token, _) = made
    async with (
        serving(config, streams=2, rate=1) as address,
        reaching(address, token=greedy_token) as greedy,
        reaching(address, token=modest_token) as modest,
        following(greedy, 2),
    ):
        with pytest.raises(StreamLimit) as limit:
            await anext(greedy.events(FOLLOW))
        rate = await refused_in_the_end(greedy)

        async with following(modest, 2):
            await ask_of_a_key(modest)
    assert limit.value.details["caller"] == rate.details["caller"] == "token:greedy"


async def test_managers_are_told_apart_by_their_certificates(config: ServeConfig, tmp_path: Path) -> None:
    authority = Authority()
    cert, key = authority.issue().put(tmp_path, "agent")
    ca = put(tmp_path / "ca.pem", authority.pem)
    tls = TlsFiles(cert=cert, key=key, client_ca=ca)
    config = dataclasses.replace(config, token=None, tls=tls, listen="127.0.0.1:0")

    async def used_up(name: str) -> str:
        own_cert, own_key = authority.issue(name).put(tmp_path, name)
        credentials = Credentials(tls_ca=ca, tls_cert=own_cert, tls_key=own_key)
        transport = SpriteServiceTransport(address, credentials=credentials, policy=ONE_TRY)
        refused = await refused_in_the_end(transport)
        await transport.close()
        return refused.details["caller"]

    async with serving(config, rate=1) as address:
        assert [await used_up(name) for name in ("one", "two")] == ["certificate:one", "certificate:two"]


async def test_strangers_use_up_nobodys_share(config: ServeConfig) -> None:
    async with serving(config, streams=1, rate=1) as address, reaching(address) as transport:
        async with reaching(address, token="another") as stranger:  # noqa: S106  # of no use anywhere
            for _ in range(50):
                with pytest.raises(TokenInvalid):
                    await stranger.get_control(LOOP, "no-such-key")
                with pytest.raises(TokenInvalid):
                    await anext(stranger.events(FOLLOW))

        for _ in range(BURST):
            await ask_of_a_key(transport)
        async with following(transport, 1):
            pass


async def test_connections_that_are_too_old_are_ended_and_subscriptions_go_on(
    config: ServeConfig, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"grpc.max_connection_age_ms": 200, "grpc.max_connection_age_grace_ms": 100}
    options = tuple((name, short.get(name, value)) for name, value in server.OPTIONS)
    monkeypatch.setattr(server, "OPTIONS", options)
    cuts = 0

    def noted(_error: OpsError, _wait: float) -> None:
        nonlocal cuts
        cuts += 1

    policy = RetryPolicy(attempts=10, base=0.01, cap=0.02)
    async with (
        serving(config) as address,
        reaching(address) as transport,
        Follower(subscribe(transport, FOLLOW, policy=policy, on_retry=noted)) as following_on,
    ):
        count = 0
        while cuts < 3:
            count += 1
            repo.append(line(event(n=count)))
            assert await following_on.until_lines(count) == list(range(1, count + 1))
