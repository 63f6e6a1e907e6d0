"""The doctor names the layer that is broken, and no other: each is really broken here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from typing import TYPE_CHECKING, Any

import pytest
from conftest import TOKEN

from opsmgr.doctor import diagnose
from opsmgr.targets import Target
from opsmgr.transport import probes
from sprite_agent.contract import clock
from sprite_agent.face.server import running
from sprite_agent.face.tls import TlsFiles
from support.certificates import Authority, put
from support.repos import LOOP, event, line
from support.signing import SPRITE, Manager, put_keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from opsmgr.doctor import Check
    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

LAYERS = [
    "config",
    "address",
    "connect",
    "tls",
    "http2",
    "auth",
    "signature",
    "clock",
    "health",
    "runtime",
    "artifacts",
    "disk",
]


async def diagnosed(target: Target) -> dict[str, Check]:
    """Every check by its layer."""
    return {check.layer: check async for check in diagnose(target)}


def broken(checks: dict[str, Check]) -> Check:
    """The one that failed; those behind it, and no others, were skipped for it."""
    [found] = [check for check in checks.values() if check.status == "failed"]
    skipped = [check.layer for check in checks.values() if check.detail == f"not looked at: {found.layer} is broken"]
    assert skipped == LAYERS[LAYERS.index(found.layer) + 1 : -1]
    return found


@pytest.fixture
def target(config: ServeConfig, tmp_path: Path) -> Target:
    """The agent of the test, with its token."""
    token = put(tmp_path / "token", TOKEN.encode(), mode=0o600)
    return Target(
        name="one",
        loop=LOOP,
        transport="sprite_service",
        address=config.listen,
        token_file=token,
        folder=tmp_path / "manager",
    )


async def test_where_all_is_well_every_layer_says_so(config: ServeConfig, target: Target, repo: LoopFiles) -> None:
    repo.append(line(event()))
    async with running(config):
        checks = await diagnosed(target)
        while checks["runtime"].status != "ok":  # control is looked at in the background when an agent starts
            await asyncio.sleep(0.05)
            checks = await diagnosed(target)

    assert list(checks) == LAYERS
    assert {check.layer for check in checks.values() if check.status != "ok"} == {"tls", "signature"}
    assert {checks[layer].status for layer in ("tls", "signature")} == {"skipped"}
    assert checks["artifacts"].detail == "status unknown, 1 events"


async def test_a_key_file_that_others_can_read_is_the_configs_fault(target: Target, tmp_path: Path) -> None:
    token = put(tmp_path / "open", b"token", mode=0o644)

    assert broken(await diagnosed(dataclasses.replace(target, token_file=token))).layer == "config"


async def test_a_socket_that_is_not_there_is_the_addresss_fault(target: Target) -> None:
    found = broken(await diagnosed(target))

    assert (found.layer, found.detail) == ("address", "No such file or directory")
    assert found.advice is not None


async def test_a_port_that_nobody_listens_on_is_the_connections_fault(target: Target) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = broken(await diagnosed(dataclasses.replace(target, address=f"127.0.0.1:{port}")))

    assert found.layer == "connect"


async def test_something_that_says_nothing_is_http2s_fault(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PROBE_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        found = broken(await diagnosed(dataclasses.replace(target, address=f"unix:{tmp_path}/silent.sock")))

    assert (found.layer, found.detail) == ("http2", "it says nothing")


async def test_something_that_speaks_otherwise_is_http2s_fault(target: Target, tmp_path: Path) -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(answer, tmp_path / "http1.sock")
    async with server:
        found = broken(await diagnosed(dataclasses.replace(target, address=f"unix:{tmp_path}/http1.sock")))

    assert found.layer == "http2"
    assert "HTTP/1.1" in found.detail


async def test_a_token_that_the_agent_does_not_know_is_auths_fault(
    config: ServeConfig, target: Target, tmp_path: Path
) -> None:
    other = put(tmp_path / "other", b"another-token", mode=0o600)
    async with running(config):
        found = broken(await diagnosed(dataclasses.replace(target, token_file=other)))

    assert found.layer == "auth"
    assert "TOKEN_INVALID" in found.detail


async def test_a_request_that_is_not_signed_where_it_must_be_is_the_signatures_fault(
    config: ServeConfig, target: Target, tmp_path: Path
) -> None:
    trusted = put_keys(tmp_path / "keys.json", Manager().trusted())
    signed = dataclasses.replace(config, trusted_keys=trusted, require_signature="all", sprite_id=SPRITE)
    async with running(signed):
        found = broken(await diagnosed(target))

    assert found.layer == "signature"
    assert "SIGNATURE_MISSING" in found.detail


async def test_a_clock_that_is_far_off_is_told_and_is_nothing_broken(
    config: ServeConfig, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config):
        monkeypatch.setattr(clock, "now", lambda: "2031-01-01T00:00:00Z")
        checks = await diagnosed(target)

    assert checks["clock"].status == "warn"
    assert "ahead" in checks["clock"].detail
    assert not [check for check in checks.values() if check.status == "failed"]


async def test_a_runtime_that_is_missing_is_told_and_reading_works(
    config: ServeConfig, target: Target, repo: LoopFiles
) -> None:
    repo.append(line(event()))
    async with running(dataclasses.replace(config, runtime=None)):
        checks = await diagnosed(target)

    assert checks["runtime"].status == "warn"
    assert checks["artifacts"].status == "ok"


async def test_a_loop_that_is_not_there_is_the_artifacts_fault_and_those_that_are_are_named(
    config: ServeConfig, target: Target
) -> None:
    async with running(config):
        found = broken(await diagnosed(dataclasses.replace(target, loop="other")))

    assert found.layer == "artifacts"
    assert found.advice == f"there are {LOOP}"


async def test_a_folder_that_can_not_be_made_is_told_whatever_else_is_broken(target: Target, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checks = await diagnosed(dataclasses.replace(target, folder=tmp_path / "file" / "manager"))

    assert checks["disk"].status == "failed"


class Scene:
    """Files of an authority, and an agent that uses them."""

    def __init__(self, config: ServeConfig, folder: Path, authority: Authority | None = None) -> None:
        self.authority = authority or Authority()
        self.ca = put(folder / "ca.pem", self.authority.pem)
        self.strange_ca = put(folder / "strange.pem", Authority("a stranger").pem)
        self._config = config
        self._folder = folder

    @contextlib.asynccontextmanager
    async def agent(self, *names: str, asks: bool = False) -> AsyncIterator[str]:
        """Its address."""
        pair: Any = self.authority.issue(*names)
        cert, key = pair.put(self._folder, "agent")
        tls = TlsFiles(cert=cert, key=key, client_ca=self.ca if asks else None)
        async with running(dataclasses.replace(self._config, listen="127.0.0.1:0", tls=tls)) as address:
            yield address


@pytest.fixture
def scene(config: ServeConfig, tmp_path: Path) -> Scene:
    return Scene(config, tmp_path)


async def test_with_tls_all_is_well_and_the_end_of_the_certificate_is_told(scene: Scene, target: Target) -> None:
    async with scene.agent() as address:
        checks = await diagnosed(dataclasses.replace(target, address=address, tls_ca=scene.ca))

    assert not [check for check in checks.values() if check.status == "failed"], checks
    assert checks["tls"].status == "warn", "the tests' certificates end soon"
    assert "ends in 0 days" in checks["tls"].detail


async def test_an_authority_below_another_will_do_as_it_does_for_grpc(
    config: ServeConfig, target: Target, tmp_path: Path
) -> None:
    scene = Scene(config, tmp_path, Authority("in between", above=Authority("root")))
    async with scene.agent() as address:
        checks = await diagnosed(dataclasses.replace(target, address=address, tls_ca=scene.ca))

    assert not [check for check in checks.values() if check.status == "failed"], checks


@pytest.mark.parametrize("name", ["sprite..example", f"{'x' * 64}.example"])
async def test_a_name_that_dns_can_not_have_is_the_addresss_fault(scene: Scene, target: Target, name: str) -> None:
    found = broken(await diagnosed(dataclasses.replace(target, address=f"{name}:443", tls_ca=scene.ca)))

    assert (found.layer, found.advice) == ("address", "check DNS")


async def test_a_certificate_of_another_authority_is_tlss_fault(scene: Scene, target: Target) -> None:
    async with scene.agent() as address:
        found = broken(await diagnosed(dataclasses.replace(target, address=address, tls_ca=scene.strange_ca)))

    assert found.layer == "tls"
    assert "not accepted" in found.detail


async def test_a_certificate_for_another_name_is_tlss_fault(scene: Scene, target: Target) -> None:
    async with scene.agent("elsewhere.internal") as address:
        found = broken(await diagnosed(dataclasses.replace(target, address=address, tls_ca=scene.ca)))

    assert found.layer == "tls"
    assert "not accepted" in found.detail


async def test_an_agent_without_tls_is_tlss_fault(config: ServeConfig, scene: Scene, target: Target) -> None:
    async with running(dataclasses.replace(config, listen="127.0.0.1:0")) as address:
        found = broken(await diagnosed(dataclasses.replace(target, address=address, tls_ca=scene.ca)))

    assert found.layer == "tls"


async def test_a_manager_without_tls_where_it_is_wanted_is_http2s_fault(scene: Scene, target: Target) -> None:
    async with scene.agent() as address:
        found = broken(await diagnosed(dataclasses.replace(target, address=address)))

    assert found.layer == "http2"
    assert "TLS" in found.detail


async def test_a_manager_without_a_certificate_where_one_is_asked_for_is_told_so(scene: Scene, target: Target) -> None:
    async with scene.agent(asks=True) as address:
        found = broken(await diagnosed(dataclasses.replace(target, address=address, tls_ca=scene.ca)))

    assert found.layer == "http2"
    assert found.advice is not None
    assert "--tls-cert" in found.advice
