"""The ways to reach a loop: from its repo, or by a real agent without TLS, over TLS, mTLS, and with signed requests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsmgr.store import LoopStore, default_folder
from opsmgr.transport.credentials import Credentials
from opsmgr.transport.local import LocalTransport
from opsmgr.transport.retry import RetryPolicy
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.face.config import ServeConfig
from sprite_agent.face.server import running
from sprite_agent.face.tls import TlsFiles
from support.certificates import Authority, put
from support.repos import LOOP, STANDIN
from support.signing import SPRITE, Manager, put_keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from opsmgr.transport.base import Transport

LOCAL = "local"
WAYS = (LOCAL, "token", "tls", "mtls", "signed")
"""mtls: the certificate is all that a manager shows. signed: over TLS and with a token, every call."""

TOKEN = "token-of-the-ways"  # noqa: S105  # of no use elsewhere
_QUICK = RetryPolicy(attempts=4, budget=5.0, base=0.01, cap=0.05)
_AUTHORITY = Authority()
_ADA = Manager()

_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
_MISSING = "(missing)"
_MARK = re.compile(r"\bada(@[\w-]+)?#\w+")
"""What a decision of ada's is recorded under: with the manager who vouches for her where that is proved."""
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TOKENS = {"resumeToken"}
"""Name the file that the log is."""
_PROCESSES = {"pid", "pgid"}
_TIMES = {"ingestLagSeconds", "heartbeatLagSeconds", "durationSeconds", "lagSeconds", "mtimeEpoch"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """One repo with a loop, reached one way by a manager of its own."""

    way: str
    repo: Path
    transport: Transport
    store: LoopStore

    def scrub(self, document: Any, *, lived: bool = False) -> Any:
        """The document without what no two repos have alike: times, places, processes, marks, ids, transports' names.

        Args:
            document: a JSON value.
            lived: files have got times, processes or marks into them: take out their sizes and digests as well.
        """
        match document:
            case dict():
                timed = {"observed"} if document.get("metric") in _TIMES else set()
                members = {name: "@SECONDS@" if name in timed else value for name, value in document.items()}
                return {name: self._member(name, value, lived=lived) for name, value in members.items()}
            case list():
                return [self.scrub(value, lived=lived) for value in document]
            case str() if document == self.transport.name:
                return "@TRANSPORT@"
            case str():
                text = _MOMENT.sub("@TIME@", document.replace(str(self.repo), "@REPO@"))
                text = _ID.sub("@ID@", _MARK.sub("@MARK@", text))
                return _DIGEST.sub("@DIGEST@", text) if lived else text
            case _:
                return document

    def _member(self, name: str, value: Any, *, lived: bool) -> Any:
        if name in _TOKENS and isinstance(value, str):
            return "@TOKEN@"
        if type(value) in {int, float}:
            if name in _PROCESSES:
                return "@PROCESS@"
            if name in _TIMES:
                return "@SECONDS@"
            if name == "sizeBytes" and lived:
                return "@SIZE@"
        return self.scrub(value, lived=lived)

    def written(self, *, lived: bool = False) -> dict[str, Any]:
        """What the manager has written of the loop, scrubbed, by the name of the file."""
        documents: dict[str, Any] = {}
        for path in sorted(self.store.folder.rglob("*.json*")):
            if "outbox" in path.parts or path == self.store.agent:
                continue  # what is asked of an agent, and what is known of it
            text = path.read_text()
            documents[path.name] = (
                [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
            )
        scrubbed: dict[str, Any] = self.scrub(documents, lived=lived)
        return scrubbed


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, and what stands there."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        pairs = [(f"{where}.{name}", one.get(name, _MISSING), other.get(name, _MISSING)) for name in names]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    else:
        return [] if (type(one), one) == (type(other), other) else [f"{where}: {one!r} and {other!r}"]
    return [found for place, left, right in pairs for found in differences(left, right, place)]


@contextlib.asynccontextmanager
async def reached(way: str, folder: Path) -> AsyncIterator[Reached]:
    """The repo in `folder`, reached that way, by an agent of its own where the way has one."""
    repo, state = folder / "repo", folder / "state"
    store = LoopStore(default_folder(repo, LOOP))
    async with contextlib.AsyncExitStack() as stack:
        transport: Transport
        if way == LOCAL:
            transport = LocalTransport(repo, runtime=str(STANDIN), state_folder=state)
        else:
            config, credentials = _agreed(way, folder)
            address = await stack.enter_async_context(running(config))
            transport = SpriteServiceTransport(address, credentials=credentials, policy=_QUICK)
        stack.push_async_callback(transport.close)
        yield Reached(way=way, repo=repo, transport=transport, store=store)


def _agreed(way: str, folder: Path) -> tuple[ServeConfig, Credentials]:
    """How an agent serves and what its manager shows, that way."""
    config = ServeConfig(
        repo=folder / "repo",
        listen=f"unix:{folder}/agent.sock",
        state_folder=folder / "state",
        runtime=str(STANDIN),
        token=TOKEN,
        sprite_id=SPRITE,
    )
    if way == "token":
        return config, Credentials(token=TOKEN)
    ca = put(folder / "ca.pem", _AUTHORITY.pem)
    cert, key = _AUTHORITY.issue().put(folder, "agent")
    tls = TlsFiles(cert=cert, key=key, client_ca=ca if way == "mtls" else None)
    config = dataclasses.replace(config, listen="127.0.0.1:0", tls=tls)
    if way == "tls":
        return config, Credentials(token=TOKEN, tls_ca=ca)
    if way == "mtls":
        cert, key = _AUTHORITY.issue("manager-1").put(folder, "manager")
        return dataclasses.replace(config, token=None), Credentials(tls_ca=ca, tls_cert=cert, tls_key=key)
    keys = put_keys(folder / "keys", _ADA.trusted())
    signed = dataclasses.replace(config, trusted_keys=keys, require_signature="all")
    return signed, Credentials(token=TOKEN, tls_ca=ca, signer=_ADA.signer())
