"""What the agent counts, and what it tells health checks and whoever looks into its connections."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from conftest import TOKEN
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import LoopNotFound, TokenInvalid
from sprite_agent.face import readiness
from sprite_agent.face.healths import Healths
from sprite_agent.face.metrics import AgentMetrics
from sprite_agent.face.server import CONTROL_NAME, SERVICE_NAME, ServeError, running
from sprite_agent.repo import Repo
from support.following import Follower
from support.http2 import connected, message
from support.repos import LOOP, event, line
from support.runtime import SKIPS, request
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sprite_agent.errors import OpsError
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

METADATA = (("authorization", f"Bearer {TOKEN}"),)


def counts(metrics: AgentMetrics, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels, as Prometheus would scrape it."""
    with metrics.served("127.0.0.1", 0) as port, urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    assert samples, f"no sample {name}"
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not fact():  # noqa: ASYNC110  # told by another task
            await asyncio.sleep(0.01)


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> AgentMetrics:
    """The counts of the agent of the test."""
    made = AgentMetrics()
    monkeypatch.setattr("sprite_agent.face.server.AgentMetrics", lambda: made)
    return made


async def test_calls_are_counted_by_method_and_code_and_refusals_by_reason(
    config: ServeConfig, metrics: AgentMetrics
) -> None:
    async with running(config) as address:
        transport = SpriteServiceTransport(address, token=TOKEN)
        await transport.info()
        with pytest.raises(LoopNotFound):
            await transport.snapshot("other")
        await transport.close()

    assert counts(metrics, "sprite_agent_rpcs_total", method="GetInfo", code="OK") == 1
    assert counts(metrics, "sprite_agent_rpcs_total", method="GetSnapshot", code="NOT_FOUND") == 1
    assert counts(metrics, "sprite_agent_refusals_total", reason="LOOP_NOT_FOUND") == 1
    assert counts(metrics, "sprite_agent_rpc_seconds_count") == 2


async def test_calls_that_never_come_to_a_handler_are_counted_once(
    config: ServeConfig, metrics: AgentMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprite_agent.face.intake.ARRIVAL_TIMEOUT", 0.2)
    async with running(config) as address, connected(address) as peer:
        streams = []
        for sent in ((), (("authorization", "Bearer another"),), (("authorization", "Bearer another"),)):
            streams.append(peer.begin(f"/{SERVICE_NAME}/GetInfo", sent))
            peer.data(streams[-1], message(b""), end=True)
        for body in (message(b"\xff no message"), b""):
            streams.append(peer.begin(f"/{SERVICE_NAME}/GetSnapshot", METADATA))
            peer.data(streams[-1], body, end=True)
        streams.append(peer.begin(f"/{SERVICE_NAME}/StreamEvents", METADATA))  # and nothing more
        for stream in streams:
            await peer.answer(stream)

    rpcs, refusals = "sprite_agent_rpcs_total", "sprite_agent_refusals_total"
    assert counts(metrics, rpcs, method="GetInfo", code="UNAUTHENTICATED") == 3
    assert counts(metrics, rpcs, method="GetSnapshot", code="INVALID_ARGUMENT") == 2
    assert counts(metrics, rpcs, method="StreamEvents", code="INVALID_ARGUMENT") == 1
    assert counts(metrics, rpcs) == 6
    assert counts(metrics, refusals, reason="TOKEN_MISSING") == 1
    assert counts(metrics, refusals, reason="TOKEN_INVALID") == 2
    assert counts(metrics, refusals, reason="REQUEST_UNDECODABLE") == 3
    assert counts(metrics, refusals) == 6


async def test_a_stream_whose_token_is_taken_away_is_counted_once(
    config: ServeConfig, metrics: AgentMetrics, repo: LoopFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config) as address:
        transport = SpriteServiceTransport(address, token=TOKEN)
        async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True))) as follower:
            await follower.next()
            monkeypatch.setattr("sprite_agent.face.access.Access.check_still", _taken_away)
            repo.append(line(event()))
            with pytest.raises(TokenInvalid):
                await follower.until_lines(1)
        await until(lambda: counts(metrics, "sprite_agent_streams_open") == 0)
        await transport.close()

    assert counts(metrics, "sprite_agent_rpcs_total", method="StreamEvents", code="UNAUTHENTICATED") == 1
    assert counts(metrics, "sprite_agent_rpcs_total", method="StreamEvents") == 1
    assert counts(metrics, "sprite_agent_refusals_total") == 1


def _taken_away(*_: object) -> None:
    raise TokenInvalid("the bearer token is no longer this agent's")


async def test_controls_are_counted_by_how_they_came_out(
    config: ServeConfig, metrics: AgentMetrics, repo: LoopFiles
) -> None:
    repo.state.write_text('{"active": true}')
    asked: Any = request("cancel", confirmation=SKIPS)
    async with running(config) as address:
        transport = SpriteServiceTransport(address, token=TOKEN)
        for _ in range(3):
            await transport.execute(asked)
        await transport.close()

    told = {"intent": "cancel", "status": "executed_unconfirmed"}
    assert counts(metrics, "sprite_agent_controls_total", **told, replayed="false") == 1
    assert counts(metrics, "sprite_agent_controls_total", **told, replayed="true") == 2


async def test_streams_are_counted_while_they_are_open_with_what_they_carried_and_how_far_behind_they_are(
    config: ServeConfig, metrics: AgentMetrics, repo: LoopFiles
) -> None:
    repo.append(*(line(event()) for _ in range(7)), b"no event\n")
    async with running(config) as address:
        transport = SpriteServiceTransport(address, token=TOKEN)
        query = EventQuery(loop_id=LOOP, follow=True, skip_malformed=True)
        async with Follower(transport.events(query)) as follower:
            await follower.until_lines(7)
            open_now = counts(metrics, "sprite_agent_streams_open")
        await until(lambda: counts(metrics, "sprite_agent_streams_open") == 0)
        await transport.close()

    assert open_now == 1
    assert counts(metrics, "sprite_agent_events_sent_total") == 7
    assert counts(metrics, "sprite_agent_records_skipped_total") == 1


def test_the_lag_is_that_of_the_stream_furthest_behind() -> None:
    metrics = AgentMetrics()
    with metrics.stream() as near, metrics.stream() as far:
        near.sent(lines_left=2, caught_up=False)
        far.sent(lines_left=900, caught_up=False)
        behind = counts(metrics, "sprite_agent_lag_lines"), counts(metrics, "sprite_agent_lag_seconds")
        far.sent(lines_left=3, caught_up=True)
        near.sent(lines_left=0, caught_up=True)
        caught_up = counts(metrics, "sprite_agent_lag_lines"), counts(metrics, "sprite_agent_lag_seconds")

    assert behind[0] == 900
    assert behind[1] > 0
    assert caught_up == (0, 0)


async def test_metrics_are_served_where_they_are_asked_for(config: ServeConfig) -> None:
    config = dataclasses.replace(config, metrics=("127.0.0.1", 0))
    async with running(config):
        pass

    with pytest.raises(ServeError, match=r"203\.0\.113\.1"):
        async with running(dataclasses.replace(config, metrics=("203.0.113.1", 9))):
            pass


async def test_control_has_a_health_of_its_own(
    config: ServeConfig, metrics: AgentMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "INTERVAL", 0.02)
    statuses = health_pb2.HealthCheckResponse
    async with running(config) as address, grpc.aio.insecure_channel(address) as channel:
        healths: Any = health_pb2_grpc.HealthStub(channel)

        async def health_of(service: str) -> int:
            return int((await healths.Check(health_pb2.HealthCheckRequest(service=service))).status)

        async def becomes(status: int) -> None:
            async with asyncio.timeout(DEADLINE):
                while await health_of(CONTROL_NAME) != status:  # noqa: ASYNC110  # told by a server
                    await asyncio.sleep(0.01)

        await becomes(statuses.SERVING)
        (config.state_folder / "journal.sqlite3").rename(config.state_folder / "elsewhere")
        await becomes(statuses.NOT_SERVING)
        reads = await health_of(SERVICE_NAME), await health_of("")
        served = counts(metrics, "sprite_agent_control_serving")
        (config.state_folder / "elsewhere").rename(config.state_folder / "journal.sqlite3")
        await becomes(statuses.SERVING)

    assert reads == (statuses.SERVING, statuses.SERVING)
    assert served == 0


async def test_a_bug_in_a_look_at_control_is_told_as_its_health_and_not_the_last_word(
    metrics: AgentMetrics, repo: LoopFiles, tmp_path: Path
) -> None:
    bugs = [ZeroDivisionError("a bug"), None]

    class Broken(Repo):
        def control_fault(self) -> OpsError | None:
            if (bug := bugs.pop(0)) is not None:
                raise bug
            return None

    healths = Healths({})
    with contextlib.closing(Broken(repo.repo, state_folder=tmp_path / "state", runtime=None)) as core:
        control = readiness.ControlReadiness(CONTROL_NAME, core, healths, metrics)
        await control.look()
        after_a_bug = counts(metrics, "sprite_agent_control_serving")
        await control.look()

    assert (after_a_bug, counts(metrics, "sprite_agent_control_serving")) == (0, 1)


async def test_without_a_runtime_control_is_not_served_and_reading_goes_on(config: ServeConfig) -> None:
    async with (
        running(dataclasses.replace(config, runtime=None)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        healths: Any = health_pb2_grpc.HealthStub(channel)
        control = await healths.Check(health_pb2.HealthCheckRequest(service=CONTROL_NAME))
        reads = await healths.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))

    statuses = health_pb2.HealthCheckResponse
    assert (control.status, reads.status) == (statuses.NOT_SERVING, statuses.SERVING)


@pytest.mark.parametrize("flag", [True, False])
async def test_channelz_is_served_where_it_is_asked_for_and_to_known_callers(config: ServeConfig, flag: bool) -> None:  # noqa: FBT001  # a parameter
    async with (
        running(dataclasses.replace(config, channelz=flag)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub: Any = channelz_pb2_grpc.ChannelzStub(channel)
        codes = []
        for metadata in ((), METADATA):
            try:
                found = await stub.GetServers(channelz_pb2.GetServersRequest(), metadata=metadata)
                codes.append("OK" if found.server else "nothing")
            except grpc.aio.AioRpcError as error:
                codes.append(error.code().name)

    assert codes == (["UNAUTHENTICATED", "OK"] if flag else ["UNIMPLEMENTED", "UNIMPLEMENTED"])
