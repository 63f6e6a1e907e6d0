"""What a known caller may do: by its scopes, its signature and its certificate, and as long as they last."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from opsmgr.transport.credentials import Credentials
from opsmgr.transport.sprite_service import SpriteServiceTransport
from sprite_agent.callers import CALLER
from sprite_agent.contract import control_mirror
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.control.journal_file import read_audit
from sprite_agent.errors import (
    OpsError,
    ScopeMissing,
    SignatureKeyExpired,
    SignatureKeyUnknown,
    SignatureMissing,
    TokenInvalid,
)
from sprite_agent.face.access import Access
from sprite_agent.face.credential_files import CredentialFiles, CredentialSources
from sprite_agent.face.credential_text import token_line
from sprite_agent.face.credentials import new_token
from sprite_agent.face.server import SERVICE_NAME, running
from sprite_agent.face.tls import TlsFiles
from sprite_agent.quota import PER_MINUTE
from sprite_agent.repo import Repo
from sprite_agent.v1 import control_pb2, service_pb2_grpc
from sprite_agent.v1 import service_pb2 as pb
from support.certificates import Authority, put
from support.guarded import EXECUTE, GET_CONTROL, GET_INFO, STREAM, answer, guarded, metadata, refusal_of
from support.repos import LOOP, event, line
from support.runtime import SKIPS, executions, request
from support.signing import Manager, put_keys, put_tokens
from support.waiting import DEADLINE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sprite_agent.face.config import ServeConfig
    from support.repos import LoopFiles

GET_SNAPSHOT = f"/{SERVICE_NAME}/GetSnapshot"
READS = {
    GET_INFO: pb.GetInfoRequest(),
    GET_SNAPSHOT: pb.GetSnapshotRequest(loop_id=LOOP),
    GET_CONTROL: pb.GetControlRequest(loop_id=LOOP, idempotency_key="none"),
    STREAM: pb.StreamEventsRequest(loop_id=LOOP),
}
FOLLOW = pb.StreamEventsRequest(loop_id=LOOP, follow=True).SerializeToString()
ADA = Manager()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at with every call."""
    monkeypatch.setattr("sprite_agent.face.credential_files.INTERVAL", 0.0)


@pytest.fixture
def waiting(repo: LoopFiles) -> LoopFiles:
    """A loop that waits for approval."""
    repo.append(line(event()))
    repo.ask_approval()
    return repo


@contextlib.asynccontextmanager
async def serving(config: ServeConfig, **changes: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to an agent with this configuration."""
    async with (
        running(dataclasses.replace(config, token=None, **changes)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield channel


def control(intent: str = "approve", **members: Any) -> bytes:
    document = request(intent, **{"confirmation": SKIPS, "idempotencyKey": f"key-{intent}", **members})
    return control_mirror.request_to_message(document).SerializeToString()  # type: ignore[arg-type]  # a TypedDict


async def reflect(channel: grpc.aio.Channel, sent: tuple[tuple[str, str], ...]) -> list[str] | OpsError:
    """The names that reflection gives, or its refusal."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # the stubs know no aio

    async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="*")

    for _ in range(10):
        try:
            call = stub.ServerReflectionInfo(requests(), metadata=sent, timeout=DEADLINE)
            return [service.name async for each in call for service in each.list_services_response.service]
        except grpc.aio.AioRpcError as error:
            if "execute_batch" not in (error.debug_error_string() or ""):
                return refusal_of(error)
            # Refused while its client was still sending, which that takes for an error of its own.
    raise AssertionError("no answer of the agent's in ten calls")


# Scopes.


@pytest.mark.parametrize(
    ("scopes", "reads", "intents"),
    [
        (["read"], True, []),
        (["control"], False, ["cancel", "reject", "approve"]),
        (["read", "control:approve"], True, ["approve"]),
        (["control:cancel", "control:reject"], False, ["cancel", "reject"]),
    ],
    ids=str,
)
async def test_a_token_is_good_for_its_scopes(
    config: ServeConfig, waiting: LoopFiles, tmp_path: Path, scopes: list[str], intents: list[str], *, reads: bool
) -> None:
    sent = metadata(put_tokens(tmp_path / "tokens", t1=scopes)["t1"])
    async with serving(config, token_file=tmp_path / "tokens") as channel:
        answers = [await answer(channel, method, READS[method].SerializeToString(), sent) for method in READS]
        names = await reflect(channel, sent)
        controls = {
            intent: await answer(channel, EXECUTE, control(intent), sent) for intent in ("cancel", "reject", "approve")
        }

    assert [isinstance(each, ScopeMissing) for each in (*answers, names)] == [not reads] * 5
    assert [intent for intent, each in controls.items() if not isinstance(each, ScopeMissing)] == intents
    for each in (*answers, names):
        if isinstance(each, ScopeMissing):
            assert (each.details, each.status) == ({"required": "read"}, "PERMISSION_DENIED")
    for intent, each in controls.items():
        if isinstance(each, ScopeMissing):
            assert each.details == {"required": f"control:{intent}" if intents else "control"}


@pytest.mark.parametrize("intent", [control_pb2.INTENT_UNSPECIFIED, 99])
async def test_an_intent_that_is_none_needs_every_scope_of_control(
    config: ServeConfig, tmp_path: Path, intent: Any
) -> None:
    tokens = put_tokens(tmp_path / "tokens", some=["control:cancel"], every=["control"])
    body = pb.ExecuteControlRequest(loop_id=LOOP, intent=intent, requested_by="ada", idempotency_key="k")
    async with serving(config, token_file=tmp_path / "tokens") as channel:
        some, every = [
            await answer(channel, EXECUTE, body.SerializeToString(), metadata(tokens[name]))
            for name in ("some", "every")
        ]

    assert isinstance(some, ScopeMissing)
    assert isinstance(every, OpsError)
    assert every.reason == "INTENT_UNSUPPORTED"


async def test_token_and_key_both_have_to_allow_it(config: ServeConfig, waiting: LoopFiles, tmp_path: Path) -> None:
    tokens = put_tokens(tmp_path / "tokens", every=["read", "control"], cancels=["control:cancel"])
    keys = put_keys(tmp_path / "keys", ADA.trusted(["control:approve"]))
    found = {}
    async with serving(
        config, token_file=tmp_path / "tokens", trusted_keys=keys, require_signature="control"
    ) as channel:
        for name, intent in (("cancels", "approve"), ("cancels", "cancel"), ("every", "cancel"), ("every", "approve")):
            body = control(intent)
            signature = ADA.signed(EXECUTE, body, token=tokens[name])
            found[name, intent] = await answer(channel, EXECUTE, body, metadata(tokens[name], signature))

    assert [place for place, each in found.items() if not isinstance(each, ScopeMissing)] == [("every", "approve")]
    assert len(executions(waiting)) == 1


# Tokens.


async def test_nobody_can_tell_an_unknown_token_from_a_wrong_or_an_old_one(config: ServeConfig, tmp_path: Path) -> None:
    old, entry = new_token("old", ["read"], until=1.0)
    put(tmp_path / "tokens", f"{token_line(entry)}\n".encode(), mode=0o600)
    refusals = []
    async with serving(config, token_file=tmp_path / "tokens") as channel:
        for token in (old, f"spr1.old.{'x' * 43}", f"spr1.none.{'x' * 43}", "x"):
            refusal = await answer(channel, GET_INFO, b"", metadata(token))
            assert isinstance(refusal, TokenInvalid)
            refusals.append((refusal.message, refusal.details))

    assert len({str(each) for each in refusals}) == 1


async def test_tokens_come_and_go_without_a_restart_and_a_broken_file_changes_nothing(
    config: ServeConfig, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    first = put_tokens(file, t1=["read"])["t1"]
    async with serving(config, token_file=file) as channel:
        before = await answer(channel, GET_INFO, b"", metadata(first))
        put(file, b"no token file", mode=0o600)
        broken = await answer(channel, GET_INFO, b"", metadata(first))
        second = put_tokens(file, t2=["read"])["t2"]
        after = [await answer(channel, GET_INFO, b"", metadata(token)) for token in (first, second)]

    assert [type(each) for each in (before, broken, *after)] == [bytes, bytes, TokenInvalid, bytes]


# Which calls have to be signed.


@pytest.mark.parametrize("require", ["none", "control", "all"])
async def test_what_has_to_be_signed_is_refused_unsigned(
    config: ServeConfig, waiting: LoopFiles, tmp_path: Path, require: str
) -> None:
    token = put_tokens(tmp_path / "tokens", t1=["read", "control"])["t1"]
    keys = put_keys(tmp_path / "keys", ADA.trusted())
    async with serving(config, token_file=tmp_path / "tokens", trusted_keys=keys, require_signature=require) as channel:
        reads = [
            await answer(channel, method, message.SerializeToString(), metadata(token))
            for method, message in READS.items()
        ]
        names = await reflect(channel, metadata(token))
        unsigned = await answer(channel, EXECUTE, control(), metadata(token))
        stub: Any = health_pb2_grpc.HealthStub(channel)
        health = await stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        signed = [
            await answer(channel, method, body, metadata(token, ADA.signed(method, body, token=token)))
            for method, body in ((GET_INFO, b""), (EXECUTE, control()))
        ]

    assert [isinstance(each, SignatureMissing) for each in (*reads, names)] == [require == "all"] * 5
    assert isinstance(unsigned, SignatureMissing) == (require != "none")
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert [type(each) for each in signed] == [bytes, bytes]
    assert len(executions(waiting)) == 1


async def test_a_wrong_signature_is_refused_also_where_none_is_needed(config: ServeConfig, tmp_path: Path) -> None:
    token = put_tokens(tmp_path / "tokens", t1=["read"])["t1"]
    keys = put_keys(tmp_path / "keys", ADA.trusted())
    stranger = Manager(key_id="m2").signed(GET_INFO, b"", token=token)
    async with serving(config, token_file=tmp_path / "tokens", trusted_keys=keys, require_signature="none") as channel:
        assert isinstance(await answer(channel, GET_INFO, b"", metadata(token, stranger)), SignatureKeyUnknown)


async def test_without_trusted_keys_signatures_say_nothing(config: ServeConfig) -> None:
    async with running(config) as address, grpc.aio.insecure_channel(address) as channel:
        assert isinstance(await answer(channel, GET_INFO, b"", metadata(config.token, "whatever")), bytes)


async def test_a_manager_that_signs_is_served_and_recorded(
    config: ServeConfig, waiting: LoopFiles, tmp_path: Path
) -> None:
    token = put_tokens(tmp_path / "tokens", t1=["read", "control"])["t1"]
    keys = put_keys(tmp_path / "keys", ADA.trusted())
    config = dataclasses.replace(
        config, token=None, token_file=tmp_path / "tokens", trusted_keys=keys, require_signature="all"
    )
    async with running(config) as address:
        transport = SpriteServiceTransport(address, credentials=Credentials(token=token, signer=ADA.signer()))
        await transport.info()
        result = await transport.execute(request(confirmation=SKIPS))  # type: ignore[arg-type]  # a TypedDict is a dict
        lines = [one async for batch in transport.events(EventQuery(loop_id=LOOP)) for one in batch.events]
        await transport.close()

    begun = next(entry for entry in read_audit(config.state_folder / "journal.sqlite3") if entry.kind == "begun")
    caller = begun.document["body"]["caller"]
    assert (result["executed"], len(lines)) == (True, 2)
    assert caller["identity"] == "manager:opsmgr-1"
    assert (caller["proof"]["issuer"], caller["proof"]["key_id"], caller["proof"]["actor"]) == ("opsmgr-1", "m1", "ada")


async def test_get_info_gives_the_digest_of_the_keys_in_force(config: ServeConfig, tmp_path: Path) -> None:
    keys = put_keys(tmp_path / "keys", ADA.trusted())
    seen = []
    async with serving(config, trusted_keys=keys, require_signature="none") as channel:
        for _ in range(2):
            response = await answer(channel, GET_INFO, b"", ())
            assert isinstance(response, bytes)
            seen.append((pb.GetInfoResponse.FromString(response).trusted_keys_digest, keys.read_bytes()))
            put_keys(keys, ADA.trusted(), Manager(key_id="m2").trusted())

    assert [digest for digest, _ in seen] == [hashlib.sha256(content).hexdigest() for _, content in seen]


# Streams that are open.


async def count_to_the_end(following: Any) -> int:
    """How many events a stream still brings."""
    seen = 0
    while (response := await following.read()) is not grpc.aio.EOF:
        seen += len(response.events)
    return seen


@pytest.mark.parametrize(
    ("what", "refused"),
    [
        ("token", TokenInvalid),
        ("key", SignatureKeyUnknown),
        ("another key of its name", SignatureKeyUnknown),
        ("another issuer", SignatureKeyUnknown),
        ("end", SignatureKeyExpired),
        ("scope", ScopeMissing),
    ],
)
async def test_a_stream_ends_when_what_it_was_opened_with_is_revoked(
    config: ServeConfig, repo: LoopFiles, tmp_path: Path, what: str, refused: type[OpsError]
) -> None:
    repo.append(line(event()))
    token = put_tokens(tmp_path / "tokens", t1=["read"])["t1"]
    keys = put_keys(tmp_path / "keys", ADA.trusted())
    async with serving(config, token_file=tmp_path / "tokens", trusted_keys=keys, require_signature="all") as channel:
        call: Any = channel.unary_stream(STREAM, response_deserializer=pb.StreamEventsResponse.FromString)
        following = call(FOLLOW, metadata=metadata(token, ADA.signed(STREAM, FOLLOW, token=token)), timeout=DEADLINE)
        seen = len((await following.read()).events)
        if what == "token":
            put_tokens(tmp_path / "tokens", t1=["read"])
        elif what == "key":
            put_keys(keys)
        elif what == "another key of its name":
            put_keys(keys, Manager().trusted())
        elif what == "another issuer":
            put_keys(keys, Manager(issuer="opsmgr-2", key=ADA.key).trusted())
        elif what == "end":
            put_keys(keys, ADA.trusted(not_after=1.0))
        else:
            put_keys(keys, ADA.trusted(["control"]))
        repo.append(line(event()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            seen += await count_to_the_end(following)

    assert type(refusal_of(caught.value)) is refused
    assert seen == 1


def test_a_stream_ends_when_the_time_of_its_token_is_over(tmp_path: Path) -> None:
    text, entry = new_token("t1", ["read"], until=60.0)
    put(tmp_path / "tokens", f"{token_line(entry)}\n".encode(), mode=0o600)
    now = [0.0]
    access = Access(CredentialFiles(CredentialSources(token_file=tmp_path / "tokens")), now=lambda: now[0])
    call = access.identify(STREAM, metadata(text))
    admission = access.admit(call, b"", ())
    access.check_still(call, admission)

    now[0] = 61.0

    with pytest.raises(TokenInvalid):
        access.check_still(call, admission)


async def test_a_stream_goes_on_while_other_credentials_change(
    config: ServeConfig, repo: LoopFiles, tmp_path: Path
) -> None:
    repo.append(line(event()))
    token = put_tokens(tmp_path / "tokens", t1=["read"])["t1"]
    async with serving(config, token_file=tmp_path / "tokens") as channel:
        call: Any = channel.unary_stream(STREAM, response_deserializer=pb.StreamEventsResponse.FromString)
        following = call(FOLLOW, metadata=metadata(token), timeout=DEADLINE)
        seen = len((await following.read()).events)
        before = (tmp_path / "tokens").read_bytes()
        other = put_tokens(tmp_path / "tokens", t2=["read"])
        put(tmp_path / "tokens", before + (tmp_path / "tokens").read_bytes(), mode=0o600)
        assert isinstance(await answer(channel, GET_INFO, b"", metadata(other["t2"])), bytes)
        repo.append(line(event()))
        while seen < 2:
            seen += len((await following.read()).events)
        following.cancel()


# Who calls.


async def test_limits_logs_and_handlers_know_the_caller_by_what_it_has_proved(repo: LoopFiles, tmp_path: Path) -> None:
    token = put_tokens(tmp_path / "tokens", watcher=["read"])["watcher"]
    sources = CredentialSources(token_file=tmp_path / "tokens", trusted_keys=put_keys(tmp_path / "keys", ADA.trusted()))
    with contextlib.closing(Repo(repo.repo, state_folder=tmp_path / "state", runtime=None)) as served:
        async with guarded(served, tmp_path, sources) as server, grpc.aio.insecure_channel(server.address) as channel:
            with structlog.testing.capture_logs() as log:
                await answer(channel, GET_INFO, b"", metadata(token))
                await answer(channel, STREAM, READS[STREAM].SerializeToString(), metadata(token))
                await answer(channel, GET_INFO, b"", metadata(token, ADA.signed(GET_INFO, b"", token=token)))
                await answer(channel, GET_INFO, b"", metadata(token, "wrong"))
                await answer(channel, GET_INFO, b"", metadata("wrong"))
                await answer(channel, EXECUTE, control(), metadata(token))

    calls = [(entry["method"], entry["caller"], entry.get("reason")) for entry in log if entry["event"] == "call"]
    assert sorted(calls, key=str) == sorted(
        [
            ("GetInfo", "token:watcher", None),
            ("StreamEvents", "token:watcher", None),
            ("GetInfo", "manager:opsmgr-1", None),
            ("GetInfo", "token:watcher", "SIGNATURE_MALFORMED"),
            ("GetInfo", "anonymous", "TOKEN_INVALID"),
            ("ExecuteControl", "token:watcher", "SIGNATURE_MISSING"),
        ],
        key=str,
    )
    assert server.refused == [
        ("SIGNATURE_MALFORMED", "token:watcher"),
        ("TOKEN_INVALID", "anonymous"),
        ("SIGNATURE_MISSING", "token:watcher"),
    ]
    assert all(entry["peer"].startswith("unix:") for entry in log if entry["event"] == "call")
    assert token not in str(log)
    assert CALLER.get().identity == "anonymous"  # nothing of it is left behind


async def test_checks_are_made_in_threads_and_not_in_the_event_loop(
    config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sprite_agent.face.access import Access  # noqa: PLC0415  # to be listened to

    seen: list[str] = []
    admit = Access.admit

    def noting(self: Access, *given: Any) -> Any:
        seen.append(threading.current_thread().name)
        return admit(self, *given)

    monkeypatch.setattr(Access, "admit", noting)
    token = put_tokens(tmp_path / "tokens", t1=["read", "control"])["t1"]
    async with serving(config, token_file=tmp_path / "tokens") as channel:
        for method in (GET_INFO, GET_SNAPSHOT, GET_CONTROL):
            await answer(channel, method, READS[method].SerializeToString(), metadata(token))
        await answer(channel, EXECUTE, control(), metadata(token))

    assert len(seen) == 4
    assert all(name.startswith("rpc_") for name in seen)


async def test_a_refusal_of_a_known_caller_is_noted_in_the_audit_and_a_strangers_is_not(
    config: ServeConfig, tmp_path: Path
) -> None:
    token = put_tokens(tmp_path / "tokens", t1=["read"])["t1"]
    async with serving(config, token_file=tmp_path / "tokens") as channel:
        await answer(channel, GET_INFO, b"", metadata("wrong"))
        await answer(channel, EXECUTE, control(), metadata(token))

    noted = [entry.document["body"] for entry in read_audit(config.state_folder / "journal.sqlite3")]
    assert [(body["reason"], body["caller"]["identity"]) for body in noted] == [("SCOPE_MISSING", "token:t1")]


async def test_however_many_strangers_are_refused_a_known_callers_refusal_is_noted(
    config: ServeConfig, tmp_path: Path
) -> None:
    """Where no token is needed, who has not signed is a stranger."""
    keys = put_keys(tmp_path / "keys", ADA.trusted())
    content = control()
    async with serving(config, trusted_keys=keys, require_signature="all") as channel:
        for _ in range(PER_MINUTE + 1):
            await answer(channel, GET_INFO, b"", metadata(None))
        await answer(channel, EXECUTE, content, metadata(None, Manager().signed(EXECUTE, content, token=None)))
        await answer(channel, EXECUTE, content, metadata(None, ADA.signed(EXECUTE, content, token=None)))

    noted = [entry.document["body"] for entry in read_audit(config.state_folder / "journal.sqlite3")]
    assert [(body["reason"], body["caller"]["identity"]) for body in noted] == [
        ("APPROVAL_NOT_PENDING", "manager:opsmgr-1")
    ]


async def test_a_caller_that_hangs_up_while_it_is_checked_does_no_harm(
    config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in a thread for the peer of a call that has ended, gRPC would crash the process."""
    from sprite_agent.face.access import Access  # noqa: PLC0415  # to be held up

    begun, ended = threading.Event(), threading.Event()
    admit = Access.admit

    def slowly(self: Access, *given: Any) -> Any:
        begun.set()
        assert ended.wait(DEADLINE)
        return admit(self, *given)

    monkeypatch.setattr(Access, "admit", slowly)
    token = put_tokens(tmp_path / "tokens", t1=["read"])["t1"]
    with structlog.testing.capture_logs() as log:
        async with serving(config, token_file=tmp_path / "tokens") as channel:
            stub = service_pb2_grpc.SpriteAgentServiceStub(channel)
            call: Any = stub.GetInfo(pb.GetInfoRequest(), metadata=metadata(token), timeout=DEADLINE)
            waiting = asyncio.ensure_future(asyncio.wait_for(call, DEADLINE))
            await asyncio.to_thread(begun.wait, DEADLINE)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await channel.close()
            ended.set()
            await asyncio.to_thread(
                until, lambda: [each for each in log if each.get("method") == "GetInfo"], "it ended"
            )


# Certificates.


@pytest.mark.parametrize(("names", "passes"), [(["opsmgr-1"], True), (["other", "opsmgr-1"], True), (["other"], False)])
async def test_a_certificate_has_to_be_the_issuers_and_is_who_calls_where_there_is_no_more(
    config: ServeConfig, tmp_path: Path, names: list[str], *, passes: bool
) -> None:
    authority = Authority()
    cert, key = authority.issue().put(tmp_path, "agent")
    ca = put(tmp_path / "ca.pem", authority.pem)
    shown = authority.issue(*names)
    config = dataclasses.replace(
        config,
        token=None,
        listen="localhost:0",
        tls=TlsFiles(cert=cert, key=key, client_ca=ca),
        trusted_keys=put_keys(tmp_path / "keys", ADA.trusted()),
        require_signature="none",
    )
    credentials = grpc.ssl_channel_credentials(authority.pem, shown.key, shown.cert)
    with structlog.testing.capture_logs() as log:
        async with running(config) as address, grpc.aio.secure_channel(address, credentials) as channel:
            unsigned = await answer(channel, GET_INFO, b"", ())
            signed = await answer(channel, GET_INFO, b"", metadata(None, ADA.signed(GET_INFO, b"", token=None)))

    assert isinstance(unsigned, bytes)
    assert isinstance(signed, bytes if passes else SignatureKeyUnknown)
    callers = [entry["caller"] for entry in log if entry["event"] == "call"]
    assert callers == [f"certificate:{names[0]}", "manager:opsmgr-1" if passes else f"certificate:{names[0]}"]
