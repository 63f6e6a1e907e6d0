"""T22: certificates, authorities, tokens and signing keys are swapped every second while calls go on; none may fail."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from opsmgr.transport.credentials import Credentials
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.contract.proofs import TrustedKey
from sprite_agent.contract.signatures import Signer
from sprite_agent.errors import ControlNotFound, OpsError, SignatureKeyUnknown, TokenInvalid
from sprite_agent.face.credential_text import keys_text, token_line
from sprite_agent.face.credentials import new_token
from support.certificates import Authority, put
from support.figures import found, scaled
from support.repos import LOOP
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from conftest import AgentProgram

    from sprite_agent.face.credentials import Token

SPRITE = "sprite-1"
MANAGER = "manager-1"
SCOPES = ("read", "control")
ONE_TRY = RetryPolicy(attempts=1)
"""A retry would hide a call that failed."""
RATE = 50
"""Calls a second."""
SECONDS = scaled(10, 60)
PERIOD = 1.0
"""Seconds from one swap to the next."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is new each time: for the agent a certificate, and for managers a certificate, a token and a key."""

    number: int
    folder: Path
    agents: Authority = field(default_factory=lambda: Authority("of agents"))
    managers: Authority = field(default_factory=lambda: Authority("of managers"))
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    made: tuple[str, Token] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "made", new_token(f"t{self.number}", SCOPES))

    @property
    def token(self) -> str:
        """As callers send it."""
        return self.made[0]

    @property
    def trusted_key(self) -> TrustedKey:
        """As the agent knows it."""
        public = self.key.public_key()
        return TrustedKey(key_id=f"k{self.number}", issuer=MANAGER, public=public, scopes=frozenset(SCOPES))

    def signer(self) -> Signer:
        """Signs with this generation's key."""
        return Signer(key=self.key, key_id=f"k{self.number}", issuer=MANAGER, audience=SPRITE, actor="ada")

    def credentials(self, following: Generation, **members: Any) -> Credentials:
        """What a manager has now: its own, and the trust in the agent's certificate of now and the one to come."""
        cert, key = self.managers.issue(MANAGER).put(self.folder, f"manager-{self.number}")
        ca = put(self.folder / f"agents-{self.number}.pem", self.agents.pem + following.agents.pem)
        given = {"token": self.token, "signer": self.signer(), "tls_ca": ca, "tls_cert": cert, "tls_key": key}
        return Credentials(**{**given, **members})


class AgentFiles:
    """The files the agent reads, of one generation or of several."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tokens = folder / "tokens"
        self.keys = folder / "keys.json"
        self.clients = folder / "clients.pem"

    @property
    def words(self) -> tuple[str, ...]:
        """The agent's options."""
        cert, key = self._folder / "agent.pem", self._folder / "agent.key"
        return (
            *("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(self.clients)),
            *("--token-file", str(self.tokens), "--trusted-keys", str(self.keys)),
            *("--require-signature", "all", "--sprite-id", SPRITE),
        )

    def trust(self, *generations: Generation) -> None:
        """Swaps the files: these are let in, and the agent shows the certificate of the last."""
        put(self.tokens, "".join(f"{token_line(each.made[1])}\n" for each in generations).encode())
        put(self.keys, keys_text(each.trusted_key for each in generations).encode())
        put(self.clients, b"".join(each.managers.pem for each in generations))
        generations[-1].agents.issue().put(self._folder, "agent")


class Load:
    """Calls at a steady rate, half of them over a connection that is kept, half over one of their own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._calls: set[asyncio.Task[None]] = set()
        self.made = 0
        self.failures: list[str] = []

    @contextlib.asynccontextmanager
    async def running(self, credentials: Credentials) -> AsyncIterator[None]:
        """Makes calls with these credentials until the block ends; then all of them have been answered."""
        kept = SpriteServiceTransport(self._address, credentials=credentials, policy=ONE_TRY)
        pacing = asyncio.ensure_future(self._pace(kept, credentials))
        try:
            yield
        finally:
            pacing.cancel()
            await asyncio.wait_for(asyncio.gather(*self._calls), DEADLINE)
            await kept.close()

    async def goes_on(self) -> None:
        """Returns when some more calls are under way."""
        until = self.made + RATE // 5
        while self.made < until:  # noqa: ASYNC110  # it is paced anyway
            await asyncio.sleep(1 / RATE)

    async def _pace(self, kept: SpriteServiceTransport, credentials: Credentials) -> None:
        began, before = time.monotonic(), self.made
        while True:
            task = asyncio.ensure_future(self._call(kept, credentials, self.made))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            self.made += 1
            await asyncio.sleep(max(0.0, began + (self.made - before) / RATE - time.monotonic()))

    async def _call(self, kept: SpriteServiceTransport, credentials: Credentials, number: int) -> None:
        try:
            if number % 2:
                await ask_of_a_key(kept)
            else:
                await ask(self._address, credentials)
        except OpsError as error:
            self.failures.append(f"call {number}: {error.reason}: {error}")


async def ask(address: str, credentials: Credentials) -> None:
    """One call over a connection of its own."""
    transport = SpriteServiceTransport(address, credentials=credentials, policy=ONE_TRY)
    try:
        await transport.info()
    finally:
        await transport.close()


async def ask_of_a_key(transport: SpriteServiceTransport) -> None:
    """A control call that runs nothing."""
    with contextlib.suppress(ControlNotFound):
        await transport.get_control(LOOP, "no-such-key")


async def in_force(address: str, credentials: Credentials) -> None:
    """Returns once the agent takes these credentials: what an operator waits for before managers get them."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await ask(address, credentials)
            except OpsError:
                await asyncio.sleep(0.02)


async def refused(address: str, credentials: Credentials, reason: type[OpsError]) -> None:
    """Returns once the agent refuses these credentials for that reason; any other refusal fails."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                await ask(address, credentials)
            except reason:
                return
            await asyncio.sleep(0.02)


async def rotate(address: str, files: AgentFiles, load: Load, generations: Sequence[Generation]) -> int:
    """Goes through the generations, one each period; how many there were."""
    began, swaps = time.monotonic(), 0
    for old, now, following in zip(generations, generations[1:], generations[2:], strict=False):
        credentials = now.credentials(following)
        await in_force(address, credentials)
        async with load.running(credentials):
            await load.goes_on()
            files.trust(now, following)
            await asyncio.gather(
                refused(address, now.credentials(following, signer=old.signer()), SignatureKeyUnknown),
                refused(address, now.credentials(following, token=old.token), TokenInvalid),
                asyncio.sleep(began + (swaps + 1) * PERIOD - time.monotonic()),
            )
        swaps += 1
    return swaps


@pytest.mark.timeout(6 * SECONDS + 60)
async def test_no_call_fails_while_everything_is_swapped_but_those_with_what_was_removed(
    start_agent: Callable[..., AgentProgram], tmp_path: Path
) -> None:
    periods = round(SECONDS / PERIOD)
    generations = [Generation(number=number, folder=tmp_path) for number in range(periods + 2)]
    files = AgentFiles(tmp_path)
    files.trust(*generations[:2])
    program = start_agent("--listen", "127.0.0.1:0", *files.words, OPS_MANAGER_SERVICE_TOKEN="")
    load = Load(program.address())

    swaps = await rotate(program.address(), files, load, generations)

    assert load.failures == []
    assert swaps == periods
    assert load.made >= 0.75 * RATE * SECONDS  # there was a load
    found("T22", f"{swaps} swaps of all certificates, tokens and keys under {load.made} calls: 0 failed")
