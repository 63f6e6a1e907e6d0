"""A manager that runs for weeks goes on when its token, key or certificates are replaced."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import pytest
from conftest import TOKEN

from opsmgr.errors import NoAnswer, NotReached
from opsmgr.targets import Target
from opsmgr.transport import credentials, sprite_service
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import NotAuthenticated
from sprite_agent.face.server import running
from sprite_agent.face.tls import TlsFiles
from support.certificates import Authority, put
from support.following import Follower
from support.repos import LOOP, event, line
from support.signing import SPRITE, Manager, put_keys
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from pathlib import Path

    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles


@pytest.fixture(autouse=True)
def looks_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "LOOK_SECONDS", 0.0)


def connect(target: Target) -> SpriteServiceTransport:
    transport = target.connect()
    assert isinstance(transport, SpriteServiceTransport)
    return transport


@pytest.fixture
def target(config: ServeConfig, tmp_path: Path) -> Target:
    """The agent of the test, by a token file."""
    token = put(tmp_path / "token", TOKEN.encode(), mode=0o600)
    return Target(name="one", loop=LOOP, transport="sprite_service", address=config.listen, token_file=token)


async def test_a_token_that_was_replaced_is_shown_from_the_next_call_on(
    config: ServeConfig, target: Target, tmp_path: Path
) -> None:
    put(tmp_path / "token", b"revoked-token", mode=0o600)
    async with running(config):
        transport = connect(target)
        with pytest.raises(NotAuthenticated):
            await transport.info()
        put(tmp_path / "token", TOKEN.encode(), mode=0o600)
        info = await transport.info()
        await transport.close()

    assert info.sprite_id == "sprite-1"


async def test_while_a_file_can_not_be_used_what_it_held_counts(
    config: ServeConfig, target: Target, tmp_path: Path
) -> None:
    async with running(config):
        transport = connect(target)
        put(tmp_path / "token", b"open to everybody", mode=0o644)
        await transport.info()
        (tmp_path / "token").unlink()
        await transport.info()
        put(tmp_path / "token", b"wrong", mode=0o600)
        with pytest.raises(NotAuthenticated):
            await transport.info()
        await transport.close()


async def test_a_key_that_was_replaced_signs_from_the_next_call_on(
    config: ServeConfig, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Manager(), Manager(key_id="m2")
    trusted = put_keys(tmp_path / "keys.json", new.trusted())
    key = put(tmp_path / "manager.json", b"old", mode=0o600)
    signers = {b"old": old, b"new": new}
    monkeypatch.setattr(
        "sprite_agent.contract.signatures.load_signer", lambda path, **_: signers[path.read_bytes()].signer()
    )
    signed = dataclasses.replace(config, trusted_keys=trusted, require_signature="all", sprite_id=SPRITE)
    async with running(signed):
        transport = connect(dataclasses.replace(target, signing_key=key, sprite_id=SPRITE))
        with pytest.raises(NotAuthenticated):
            await transport.info()
        put(tmp_path / "manager.json", b"new", mode=0o600)
        await transport.info()
        await transport.close()


async def test_when_the_authority_is_replaced_new_calls_go_by_the_new_one_and_streams_go_on(
    config: ServeConfig, target: Target, repo: LoopFiles, tmp_path: Path
) -> None:
    before, after = Authority(), Authority("the next one")
    ca = put(tmp_path / "ca.pem", before.pem)
    cert, key = before.issue().put(tmp_path, "agent")
    tls = TlsFiles(cert=cert, key=key, client_ca=None)
    repo.append(line(event()))
    async with running(dataclasses.replace(config, listen="127.0.0.1:0", tls=tls)) as address:
        transport = connect(dataclasses.replace(target, address=address, tls_ca=ca))
        async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True))) as stream:
            await stream.until_lines(1)
            after.issue().put(tmp_path, "agent")
            put(ca, b"in the midst of being replaced")
            await transport.info()
            put(ca, Authority("a stranger").pem)
            with pytest.raises(NotReached):
                await transport.info()
            put(ca, after.pem)
            await transport.info()
            repo.append(line(event()))
            lines = await stream.until_lines(2)
        await transport.close()

    assert lines == [1, 2]


async def test_a_stream_that_outlives_the_channel_it_goes_over_is_lost_and_its_reader_is_not_cancelled(
    config: ServeConfig, target: Target, repo: LoopFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sprite_service, "RETIREMENT", 0.1)
    before, after = Authority(), Authority("the next one")
    ca = put(tmp_path / "ca.pem", before.pem)
    cert, key = before.issue().put(tmp_path, "agent")
    tls = TlsFiles(cert=cert, key=key, client_ca=None)
    repo.append(line(event()))
    async with running(dataclasses.replace(config, listen="127.0.0.1:0", tls=tls)) as address:
        transport = connect(dataclasses.replace(target, address=address, tls_ca=ca))
        async with Follower(transport.events(EventQuery(loop_id=LOOP, follow=True))) as stream:
            await stream.until_lines(1)
            after.issue().put(tmp_path, "agent")
            put(ca, after.pem)
            await transport.info()
            reading = asyncio.create_task(stream.to_end())
            await asyncio.wait({reading}, timeout=DEADLINE)
        await transport.close()

    with pytest.raises(NoAnswer, match="closed here"):
        reading.result()
