"""TLS between real programs' parts: who is let in, and that everyone else ends in bounded time with one clear line."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import ssl
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.errors import InputInvalid, NoAnswer
from opsmgr.transport.credentials import Credentials
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.errors import TokenInvalid
from sprite_agent.face.server import running
from sprite_agent.face.tls import TlsFiles
from support.certificates import Authority, put

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sprite_agent.face.config import ServeConfig
    from support.certificates import Pair

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it
QUICK = RetryPolicy(attempts=3, budget=5.0, base=0.01, cap=0.05)
BOUND = 3.0
"""Seconds in which a refused connection must have ended, all its tries included."""
SERVER_NAME = "sprite-1.sprites.internal"


@dataclass
class Scene:
    """Authorities and files, for an agent and for those who call it."""

    folder: Path

    def __post_init__(self) -> None:
        self.authority = Authority()
        self.stranger = Authority("a stranger")
        self.ca = put(self.folder / "ca.pem", self.authority.pem)
        self.strange_ca = put(self.folder / "strange-ca.pem", self.stranger.pem)

    def agent(self, pair: Pair | None = None, *, asks: bool = False) -> TlsFiles:
        """The agent's files; `asks`: callers must have a certificate."""
        cert, key = (pair or self.authority.issue()).put(self.folder, "agent")
        return TlsFiles(cert=cert, key=key, client_ca=self.ca if asks else None)

    def manager(self, pair: Pair | None = None, **members: Any) -> Credentials:
        """The credentials of a manager, with a certificate of its own where there is a `pair`."""
        cert, key = (None, None) if pair is None else pair.put(self.folder, "manager")
        given = {"token": TOKEN, "tls_ca": self.ca, "tls_cert": cert, "tls_key": key}
        return Credentials(**{**given, **members})


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@contextlib.asynccontextmanager
async def serving(config: ServeConfig, tls: TlsFiles, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    async with running(dataclasses.replace(config, listen=listen, tls=tls)) as address:
        yield address


async def asked(address: str, credentials: Credentials) -> str | None:
    """The Sprite that answers."""
    transport = SpriteServiceTransport(address, credentials=credentials, policy=QUICK)
    try:
        return (await transport.info()).sprite_id
    finally:
        await transport.close()


async def refused(address: str, credentials: Credentials) -> NoAnswer:
    """How it ends, in bounded time and after as many tries as allowed."""
    began = time.monotonic()
    with pytest.raises(NoAnswer) as caught:
        await asked(address, credentials)
    assert time.monotonic() - began < BOUND
    assert caught.value.attempts == QUICK.attempts
    assert "\n" not in caught.value.message
    return caught.value


# Who is let in.


async def test_a_manager_that_knows_the_agents_authority_is_answered(config: ServeConfig, scene: Scene) -> None:
    async with serving(config, scene.agent()) as address:
        assert await asked(address, scene.manager()) == "sprite-1"


async def test_a_manager_with_a_certificate_that_the_agent_asks_for_is_answered(
    config: ServeConfig, scene: Scene
) -> None:
    async with serving(config, scene.agent(asks=True)) as address:
        assert await asked(address, scene.manager(scene.authority.issue("manager-1"))) == "sprite-1"


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:{}/agent.sock"], ids=["tcp", "unix"])
async def test_an_agent_that_is_reached_by_another_name_is_known_by_the_one_it_has(
    config: ServeConfig, scene: Scene, tmp_path: Path, listen: str
) -> None:
    tls = scene.agent(scene.authority.issue(SERVER_NAME))
    async with serving(config, tls, listen.format(tmp_path)) as address:
        assert await asked(address, scene.manager(tls_server_name=SERVER_NAME)) == "sprite-1"


async def test_a_certificate_is_no_token(config: ServeConfig, scene: Scene) -> None:
    async with serving(config, scene.agent(asks=True)) as address:
        with pytest.raises(TokenInvalid):
            await asked(address, scene.manager(scene.authority.issue("manager-1"), token="another"))  # noqa: S106


# Who is not.


async def test_a_manager_without_tls_is_told_that_the_agent_may_want_it(config: ServeConfig, scene: Scene) -> None:
    async with serving(config, scene.agent()) as address:
        error = await refused(address, Credentials(token=TOKEN))

    assert f"no answer from {address}: it hung up before anything was asked; it may want TLS (" in error.message


async def test_a_manager_without_a_certificate_is_told_that_the_agent_may_want_one(
    config: ServeConfig, scene: Scene
) -> None:
    async with serving(config, scene.agent(asks=True)) as address:
        error = await refused(address, scene.manager())

    assert "it may want a certificate of this manager's" in error.message


async def test_a_manager_whose_certificate_a_stranger_signed_is_refused(config: ServeConfig, scene: Scene) -> None:
    async with serving(config, scene.agent(asks=True)) as address:
        error = await refused(address, scene.manager(scene.stranger.issue("manager-1")))

    assert "it may want a certificate of this manager's, or another one" in error.message


async def test_an_agent_whose_certificate_a_stranger_signed_is_not_spoken_to(config: ServeConfig, scene: Scene) -> None:
    async with serving(config, scene.agent()) as address:
        error = await refused(address, scene.manager(tls_ca=scene.strange_ca))

    assert "its certificate is not accepted (UNAVAILABLE: " in error.message
    assert "CERTIFICATE_VERIFY_FAILED" in error.message


async def test_an_agent_whose_certificate_has_expired_is_not_spoken_to(config: ServeConfig, scene: Scene) -> None:
    async with serving(config, scene.agent(scene.authority.issue(until=timedelta(hours=-1)))) as address:
        error = await refused(address, scene.manager())

    assert "its certificate is not accepted" in error.message
    assert "certificate has expired" in error.message


@pytest.mark.parametrize("expected", [None, "sprite-2.sprites.internal"])
async def test_an_agent_with_the_name_of_another_is_not_spoken_to(
    config: ServeConfig, scene: Scene, expected: str | None
) -> None:
    async with serving(config, scene.agent(scene.authority.issue(SERVER_NAME))) as address:
        error = await refused(address, scene.manager(tls_server_name=expected))

    assert "its certificate is for another name (UNAVAILABLE: " in error.message


async def test_an_agent_without_tls_is_told_apart(config: ServeConfig, scene: Scene) -> None:
    async with running(dataclasses.replace(config, listen="127.0.0.1:0")) as address:
        error = await refused(address, scene.manager())

    assert "it does not speak TLS (UNAVAILABLE: " in error.message


async def test_where_nobody_listens_nothing_is_said_of_certificates(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"

    error = await refused(address, scene.manager())

    assert error.message.startswith(f"no answer from {address}: UNAVAILABLE: ")
    assert "Connection refused" in error.message


@pytest.mark.parametrize(
    ("version", "spoken"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
    ids=["1.1", "1.2", "1.3"],
)
async def test_nothing_older_than_tls_1_2_is_spoken(
    config: ServeConfig, scene: Scene, version: ssl.TLSVersion, *, spoken: bool
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(scene.ca)
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("ALL:@SECLEVEL=0")  # else OpenSSL itself refuses what is old
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version

    def greet(address: str) -> bool:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=BOUND) as raw:
            try:
                with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
                    return wrapped.selected_alpn_protocol() == "h2"
            except (ssl.SSLError, ConnectionError):
                return False

    async with serving(config, scene.agent()) as address:
        assert await asyncio.to_thread(greet, address) is spoken


# What changes under way.


async def test_a_new_certificate_is_shown_to_the_next_connection_and_no_call_is_lost(
    config: ServeConfig, scene: Scene
) -> None:
    tls = scene.agent()
    async with serving(config, tls) as address:
        staying = SpriteServiceTransport(address, credentials=scene.manager(), policy=RetryPolicy(attempts=1))
        await staying.info()

        scene.stranger.issue().put(tls.cert.parent, "agent")

        assert await asked(address, scene.manager(tls_ca=scene.strange_ca)) == "sprite-1"
        await refused(address, scene.manager())
        await staying.info()
        await staying.close()


async def test_a_broken_new_certificate_leaves_the_old_one_in_force(config: ServeConfig, scene: Scene) -> None:
    tls = scene.agent()
    async with serving(config, tls) as address:
        tls.cert.write_bytes(b"garbage")

        for _ in range(3):
            assert await asked(address, scene.manager()) == "sprite-1"


async def test_a_manager_whose_authority_is_no_longer_trusted_is_refused_from_its_next_connection_on(
    config: ServeConfig, scene: Scene
) -> None:
    tls = dataclasses.replace(scene.agent(), client_ca=put(scene.folder / "clients.pem", scene.authority.pem))
    manager = scene.manager(scene.authority.issue("manager-1"))
    async with serving(config, tls) as address:
        assert await asked(address, manager) == "sprite-1"

        put(scene.folder / "clients.pem", scene.stranger.pem)

        await refused(address, manager)


# What a manager is given.


def test_what_is_not_on_this_machine_is_not_spoken_to_without_tls(scene: Scene) -> None:
    for target in ("192.0.2.1:50051", "sprite.example.org:50051", "[2001:db8::1]:50051"):
        with pytest.raises(InputInvalid, match="is not on this machine: that needs TLS"):
            SpriteServiceTransport(target, token=TOKEN)


@pytest.mark.parametrize("target", ["nonsense", "unix:", "127.0.0.1:99999", "dns:///agent:1"])
def test_what_is_no_address_is_refused_with_tls_and_without(scene: Scene, target: str) -> None:
    for credentials in (scene.manager(), Credentials()):
        with pytest.raises(InputInvalid, match=r"HOST:PORT|needs a path"):
            SpriteServiceTransport(target, credentials=credentials)


async def test_what_is_not_on_this_machine_may_be_spoken_to_with_tls(scene: Scene) -> None:
    await SpriteServiceTransport("192.0.2.1:50051", credentials=scene.manager()).close()


def test_files_that_can_not_be_used_are_refused_before_anything_is_sent(scene: Scene, tmp_path: Path) -> None:
    whole = scene.manager(scene.authority.issue("manager-1"))
    assert whole.tls_key is not None
    assert whole.tls_cert is not None
    open_key = put(tmp_path / "open.key", whole.tls_key.read_bytes(), mode=0o640)
    garbage = put(tmp_path / "garbage", b"garbage")
    cases: dict[str, dict[str, Any]] = {
        f"key file {open_key} can be read by others; chmod 600 it": {"tls_key": open_key},
        f"CA file {garbage} holds no certificate in PEM": {"tls_ca": garbage},
        f"CA file {tmp_path}/none can't be read": {"tls_ca": tmp_path / "none"},
        f"certificate file {garbage} holds no certificate in PEM": {"tls_cert": garbage},
        "is not the key of the certificate in": {"tls_cert": scene.ca},
        "a TLS certificate and its key go together": {"tls_key": None},
        "a TLS certificate needs the CA": {"tls_ca": None},
    }
    for message, members in cases.items():
        with pytest.raises(InputInvalid) as caught:
            SpriteServiceTransport("127.0.0.1:1", credentials=dataclasses.replace(whole, **members))
        assert message in caught.value.message


def test_credentials_keep_the_token_to_themselves(scene: Scene) -> None:
    assert TOKEN not in repr(scene.manager())
