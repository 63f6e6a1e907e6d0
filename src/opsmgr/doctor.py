"""Finds the broken layer between a manager and a loop: looks at one after the other, up to the first that fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from opsmgr.errors import NoAnswer
from opsmgr.targets import RUNTIME_VARIABLE
from opsmgr.transport.retry import RetryPolicy
from sprite_agent.errors import NotAuthenticated, OpsError, SignatureRefused

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from opsmgr.targets import Target
    from opsmgr.transport.local import LocalTransport
    from opsmgr.transport.sprite_service import SpriteServiceTransport

Status = Literal["ok", "warn", "failed", "skipped"]

SOON_DAYS = 14
"""A certificate that ends sooner is told of."""
LITTLE_DISK = 100 * 1024 * 1024
"""Bytes; less free space than this is told of."""
_ONE_TRY = RetryPolicy(attempts=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What one layer is like."""

    layer: str
    status: Status
    detail: str
    advice: str | None = None
    """What to do; None: nothing."""
    seconds: float = 0.0


class _Finding(Exception):
    """How a look ended that did not end with a plain "ok"."""

    def __init__(self, status: Status, detail: str, advice: str | None = None) -> None:
        super().__init__(detail)
        self.status: Status = status
        self.detail = detail
        self.advice = advice


async def diagnose(target: Target) -> AsyncIterator[Check]:
    """The layers between here and a loop, from the config to the disk; those behind one that fails are skipped.

    Every look has a deadline. Nothing is changed, and no intent is sent.
    """
    looks = _Local(target).looks() if target.transport == "local" else _Remote(target).looks()
    broken: str | None = None
    async with contextlib.aclosing(looks) as each:
        async for layer, look in each:
            if broken is not None and layer != "disk":
                yield Check(layer=layer, status="skipped", detail=f"not looked at: {broken} is broken")
                continue
            check = await _look(layer, look)
            broken = layer if check.status == "failed" and broken is None else broken
            yield check


async def _look(layer: str, look: Callable[[], Awaitable[str]]) -> Check:
    from opsmgr.transport.probes import PROBE_TIMEOUT  # noqa: PLC0415  # imports gRPC

    began = time.monotonic()
    status: Status = "ok"
    advice = None
    try:
        async with asyncio.timeout(4 * PROBE_TIMEOUT):
            detail = await look()
    except _Finding as found:
        status, detail, advice = found.status, found.detail, found.advice
    except TimeoutError:
        status, detail = "failed", "no answer in time"
    except OpsError as error:
        status, detail = "failed", f"{error.message} [{error.reason}]"
    except OSError as error:
        status, detail = "failed", error.strerror or str(error)
    return Check(layer=layer, status=status, detail=detail, advice=advice, seconds=round(time.monotonic() - began, 3))


class _Remote:
    """The layers of an agent over gRPC."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._address = target.address or ""
        self._transport: SpriteServiceTransport | None = None

    async def looks(self) -> AsyncGenerator[tuple[str, Callable[[], Awaitable[str]]]]:
        """Layer and look, in their order."""
        try:
            for look in (
                self.config,
                self.address,
                self.connect,
                self.tls,
                self.http2,
                self.auth,
                self.signature,
                self.clock,
                self.health,
                self.runtime,
                self.artifacts,
            ):
                yield look.__name__, look
            yield "disk", lambda: _disk(self._target)
        finally:
            if self._transport is not None:
                await self._transport.close()

    async def config(self) -> str:
        """Whether what was configured can be used."""
        transport = self._target.connect(policy=_ONE_TRY)
        assert transport.name == "sprite_service"  # noqa: S101  # the target's
        self._transport = transport  # type: ignore[assignment]  # as its name says
        given = self._target.credentials()
        parts = {
            "a token": given.token is not None,
            "signatures": given.signer is not None,
            "TLS": given.tls_ca is not None,
            "a certificate": given.tls_cert is not None,
        }
        return f"{self._address} with {', '.join(part for part, has in parts.items() if has) or 'no credentials'}"

    async def address(self) -> str:
        """Whether the address leads anywhere."""
        from opsmgr.transport import probes  # noqa: PLC0415  # imports gRPC

        try:
            return await probes.resolve(self._address)
        except (OSError, UnicodeError) as error:  # UnicodeError: no name that DNS could have
            advice = "is the agent, or the tunnel to it, running?" if self._address.startswith("unix:") else "check DNS"
            raise _Finding("failed", getattr(error, "strerror", None) or str(error), advice) from error

    async def connect(self) -> str:
        """Whether anybody takes connections there."""
        from opsmgr.transport import probes  # noqa: PLC0415  # imports gRPC

        try:
            async with asyncio.timeout(probes.PROBE_TIMEOUT), probes.connected(self._address):
                return "connections are taken"
        except OSError as error:
            advice = "is the agent, or the tunnel to it, running? Does the Sprite sleep?"
            raise _Finding("failed", error.strerror or str(error) or "no answer in time", advice) from error

    async def tls(self) -> str:
        """Whether the certificates of both sides are accepted."""
        from opsmgr.transport import probes  # noqa: PLC0415  # imports gRPC

        credentials = self._target.credentials()
        if credentials.tls_ca is None:
            raise _Finding("skipped", "not asked for")
        try:
            context = probes.tls_context(credentials)
            async with (
                asyncio.timeout(probes.PROBE_TIMEOUT),
                probes.connected(self._address, context, credentials.tls_server_name) as stream,
            ):
                ends = probes.certificate_ends(stream[1])
        except ssl.SSLCertVerificationError as error:
            advice = "give the CA that signed it, or --tls-server-name with the name it is for"
            raise _Finding("failed", f"its certificate is not accepted: {error.verify_message}", advice) from error
        except ssl.SSLError as error:
            raise _Finding("failed", f"no TLS: {error.reason}", "does the agent have --tls-cert?") from error
        days = None if ends is None else (ends - datetime.now(UTC)).days
        if days is not None and days < SOON_DAYS:
            raise _Finding(
                "warn", f"its certificate ends in {days} days", "renew it; the agent reads it anew by itself"
            )
        return f"its certificate counts for {days} more days"

    async def http2(self) -> str:
        """Whether the other side speaks HTTP/2."""
        from opsmgr.transport import probes  # noqa: PLC0415  # imports gRPC

        credentials = self._target.credentials()
        context = None if credentials.tls_ca is None else probes.tls_context(credentials)
        try:
            async with (
                asyncio.timeout(probes.PROBE_TIMEOUT),
                probes.connected(self._address, context, credentials.tls_server_name) as stream,
            ):
                wrong = await probes.speaks_http2(stream)
        except ssl.SSLError as error:
            raise _Finding("failed", f"it hung up: {error.reason}", "it asks for a certificate: --tls-cert") from error
        except TimeoutError as error:
            raise _Finding(
                "failed", "it says nothing", "the agent is frozen, or something else has its port"
            ) from error
        if wrong is not None:
            raise _Finding("failed", wrong, "is this the agent's port? Does it ask for certificates (--tls-cert)?")
        return "it does"

    async def auth(self) -> str:
        """Whether the agent knows who asks."""
        try:
            info = await self._asked().info()
        except SignatureRefused:
            return "left to the signature"
        except NotAuthenticated as error:
            advice = "'sprite-agent keys list' there tells the tokens it knows"
            raise _Finding("failed", f"{error.message} [{error.reason}]", advice) from error
        return f"agent {info.agent_version}, Sprite {info.sprite_id or 'without a name'}, {len(info.loops)} loops"

    async def signature(self) -> str:
        """Whether the agent takes the manager's signatures."""
        try:
            await self._asked().info()
        except SignatureRefused as error:
            advice = "compare the key with 'sprite-agent keys list' there, and the Sprite's name with --sprite-id"
            raise _Finding("failed", f"{error.message} [{error.reason}]", advice) from error
        if self._target.signing_key is None:
            raise _Finding("skipped", "requests are not signed; those that read need not be")
        return "signed requests are taken"

    async def clock(self) -> str:
        """Whether both clocks say the same."""
        from opsmgr.transport.sprite_service import CLOCK_SKEW  # noqa: PLC0415  # imports gRPC

        skew = self._asked().clock_skew_seconds
        if skew is None:
            raise _Finding("warn", "the agent did not say its time")
        ahead = f"the agent's is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
        if abs(skew) > CLOCK_SKEW:
            raise _Finding("warn", ahead, "signatures will be refused: set the clocks")
        return ahead

    async def health(self) -> str:
        """Whether the agent says that it serves."""
        found = await self._asked().serving("")
        if found != "SERVING":
            raise _Finding("failed", f"it says {found}", "it starts or drains: wait, or look at its log")
        return "it serves"

    async def runtime(self) -> str:
        """Whether the agent can control."""
        found = await self._asked().serving("sprite_agent.v1.SpriteAgentService/control")
        if found != "SERVING":
            advice = "its log says why: --superloop-bin and 'sprite-agent journal check' there"
            raise _Finding("warn", f"control is {found}; reading works", advice)
        return "control is served"

    async def artifacts(self) -> str:
        """Whether the loop can be read."""
        return await _artifacts(self._asked(), self._target)

    def _asked(self) -> SpriteServiceTransport:
        assert self._transport is not None  # noqa: S101  # `config` comes first
        return self._transport


class _Local:
    """The layers of a repo on this machine."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._transport: LocalTransport | None = None

    async def looks(self) -> AsyncGenerator[tuple[str, Callable[[], Awaitable[str]]]]:
        """Layer and look, in their order."""
        try:
            for look in (self.config, self.runtime, self.artifacts):
                yield look.__name__, look
            yield "disk", lambda: _disk(self._target)
        finally:
            if self._transport is not None:
                await self._transport.close()

    async def config(self) -> str:
        """Whether what was configured can be used."""
        self._transport = self._target.connect()  # type: ignore[assignment]  # the target's
        return f"the repo {self._target.repo}"

    async def runtime(self) -> str:
        """Whether there is a command to control with."""
        command = self._target.superloop_bin or os.environ.get(RUNTIME_VARIABLE)
        if not command:
            raise _Finding("warn", "no command of the runtime's is known; reading works", "give --superloop-bin")
        if shutil.which(command) is None:
            raise _Finding("warn", f"{command} can't be run; reading works", "correct --superloop-bin")
        return command

    async def artifacts(self) -> str:
        """Whether the loop can be read."""
        assert self._transport is not None  # noqa: S101  # `config` comes first
        return await _artifacts(self._transport, self._target)


async def _artifacts(transport: SpriteServiceTransport | LocalTransport, target: Target) -> str:
    try:
        found = (await transport.snapshot(target.loop)).envelope
    except NoAnswer:
        raise
    except OpsError as error:
        advice = f"there are {', '.join((await transport.info()).loops) or 'no loops'}"
        raise _Finding("failed", f"{error.message} [{error.reason}]", advice) from error
    return f"status {found['run']['status']}, {found['health']['eventCount']} events"


async def _disk(target: Target) -> str:
    """Whether the manager can write its files."""
    folder = target.store().folder
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise _Finding("failed", f"{there} can't be written", "the manager's files go there")
    free = (await asyncio.to_thread(shutil.disk_usage, there)).free
    if free < LITTLE_DISK:
        raise _Finding("warn", f"{free // 1024**2} MiB are free for {folder}")
    return f"{free // 1024**2} MiB are free for {folder}"
