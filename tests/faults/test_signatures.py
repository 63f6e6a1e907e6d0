"""T19 to T21: signatures that are wrong in any way, used twice, or not of this moment, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from sprite_agent.callers import Proof
from sprite_agent.contract import control_mirror
from sprite_agent.contract.proofs import verify
from sprite_agent.contract.signatures import digest, encode
from sprite_agent.errors import (
    ActorInvalid,
    ApprovalNotPending,
    OpsError,
    RateLimited,
    ReplayCacheFull,
    RequestUndecodable,
    ScopeMissing,
    SignatureAmbiguous,
    SignatureBodyMismatch,
    SignatureInvalid,
    SignatureKeyExpired,
    SignatureKeyUnknown,
    SignatureMalformed,
    SignatureMissing,
    SignatureRefused,
    SignatureReplayed,
    SignatureStale,
    SignatureWrongAudience,
    SignatureWrongMethod,
    TokenInvalid,
    TokenMissing,
)
from sprite_agent.face.access import Access
from sprite_agent.face.credential_files import CredentialFiles, CredentialSources
from sprite_agent.face.limits import BURST
from sprite_agent.face.server import running
from sprite_agent.repo import Repo
from sprite_agent.v1 import service_pb2 as pb
from support.figures import found, scaled
from support.guarded import EXECUTE, GET_CONTROL, GET_INFO, STREAM, answer, guarded, metadata
from support.repos import LOOP, STANDIN, event, line
from support.runtime import SKIPS, executions, request
from support.signing import Manager, put_keys, put_tokens
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from sprite_agent.face.config import ServeConfig
    from support.guarded import Guarded
    from support.repos import LoopFiles

ADA = Manager()
"""A manager that may do everything."""
READER = Manager(key_id="reader", issuer="reader")
CANCELLER = Manager(key_id="canceller", issuer="canceller")
OLD = Manager(key_id="old", issuer="opsmgr-1")
STRANGER = Manager(key_id="m1", issuer="opsmgr-1")
"""Has a key of the same name, which is another."""


def body(**members: Any) -> bytes:
    """An approval that does not wait, as a manager sends it."""
    document = request(**{"confirmation": SKIPS, **members})
    return control_mirror.request_to_message(document).SerializeToString()  # type: ignore[arg-type]  # a TypedDict


BODY = body()


@dataclasses.dataclass(kw_only=True)
class Scene:
    """A guarded server of a loop that waits for approval, and what callers need."""

    server: Guarded
    channel: grpc.aio.Channel
    tokens: dict[str, str]
    loop: LoopFiles

    @property
    def token(self) -> str:
        """One that is good for everything."""
        return self.tokens["full"]

    def sign(self, manager: Manager = ADA, content: bytes = BODY, method: str = EXECUTE, **claims: Any) -> str:
        """A signature of `content`; each of its claims can be given another value."""
        return manager.signed(method, content, **{"token": self.token, **claims})

    async def ask(
        self,
        *signatures: str,
        content: bytes = BODY,
        method: str = EXECUTE,
        token: str | None = "full",  # noqa: S107  # its name
    ) -> bytes | OpsError:
        """What the server answers."""
        text = None if token is None else self.tokens.get(token, token)
        return await answer(self.channel, method, content, metadata(text, *signatures))


def sources(folder: Path) -> tuple[CredentialSources, dict[str, str]]:
    """Files with the managers and tokens of this module, and the tokens."""
    keys = put_keys(
        folder / "keys.json",
        ADA.trusted(),
        READER.trusted(["read"]),
        CANCELLER.trusted(["read", "control:cancel"]),
        OLD.trusted(not_after=time.time() - 1),
    )
    tokens = put_tokens(
        folder / "tokens",
        full=["read", "control"],
        other=["read", "control"],
        reads=["read"],
        rejects=["control:reject"],
    )
    return CredentialSources(token_file=folder / "tokens", trusted_keys=keys), tokens


@pytest.fixture
async def scene(repo: LoopFiles, tmp_path: Path) -> AsyncIterator[Scene]:
    repo.append(line(event()))
    repo.ask_approval()
    files, tokens = sources(tmp_path)
    with contextlib.closing(Repo(repo.repo, state_folder=tmp_path / "state", runtime=str(STANDIN))) as served:
        async with guarded(served, tmp_path, files) as server, grpc.aio.insecure_channel(server.address) as channel:
            yield Scene(server=server, channel=channel, tokens=tokens, loop=repo)


# T19: every way to be wrong.

Way = tuple["Callable[[Scene], Awaitable[bytes | OpsError]]", type[OpsError]]
WRONG: dict[str, Way] = {
    "no token": (lambda s: s.ask(s.sign(), token=None), TokenMissing),
    "no token of the agent's": (lambda s: s.ask(s.sign(), token="spr1.full." + "x" * 43), TokenInvalid),
    "a token of another agent's": (lambda s: s.ask(s.sign(), token="parity-token"), TokenInvalid),  # noqa: S106
    "no signature": (lambda s: s.ask(), SignatureMissing),
    "two signatures": (lambda s: s.ask(s.sign(), s.sign()), SignatureAmbiguous),
    "the same one twice": (lambda s: s.ask(*[s.sign()] * 2), SignatureAmbiguous),
    "an empty one": (lambda s: s.ask(""), SignatureMalformed),
    "two in one": (lambda s: s.ask(f"{s.sign()},{s.sign()}"), SignatureMalformed),
    "two parts": (lambda s: s.ask(s.sign().rpartition(".")[0]), SignatureMalformed),
    "padded": (lambda s: s.ask(s.sign() + "=="), SignatureMalformed),
    "too long": (lambda s: s.ask(s.sign(src="x" * 4096)), SignatureMalformed),
    "another type": (lambda s: s.ask(s.sign(header={"typ": "JWT"})), SignatureMalformed),
    "a key of its own": (lambda s: s.ask(s.sign(header={"jwk": {"kty": "OKP"}})), SignatureMalformed),
    "a key from elsewhere": (lambda s: s.ask(s.sign(header={"jku": "https://example.com/k"})), SignatureMalformed),
    "critical members": (lambda s: s.ask(s.sign(header={"crit": ["exp"], "exp": 1})), SignatureMalformed),
    "no algorithm": (lambda s: s.ask(unsigned(s.sign(), "none")), SignatureMalformed),
    "a shared secret": (lambda s: s.ask(unsigned(s.sign(), "HS256")), SignatureMalformed),
    "an unknown key": (lambda s: s.ask(s.sign(Manager(key_id="m9"))), SignatureKeyUnknown),
    "another's key": (lambda s: s.ask(s.sign(READER, iss="opsmgr-1")), SignatureKeyUnknown),
    "a key that has ended": (lambda s: s.ask(s.sign(OLD)), SignatureKeyExpired),
    "a key of the same name": (lambda s: s.ask(s.sign(STRANGER)), SignatureInvalid),
    "no signature below it": (lambda s: s.ask(s.sign().rpartition(".")[0] + "."), SignatureInvalid),
    "zeros below it": (lambda s: s.ask(f"{s.sign().rpartition('.')[0]}.{encode(bytes(64))}"), SignatureInvalid),
    "another's claims": (lambda s: s.ask(spliced(s.sign(), s.sign(act="bob"))), SignatureInvalid),
    "no audience": (lambda s: s.ask(s.sign(aud=None)), SignatureMalformed),
    "several audiences": (lambda s: s.ask(s.sign(aud=["sprite-1", "sprite-2"])), SignatureMalformed),
    "another sprite": (lambda s: s.ask(s.sign(aud="sprite-2")), SignatureWrongAudience),
    "no end": (lambda s: s.ask(s.sign(exp=None)), SignatureMalformed),
    "no nonce": (lambda s: s.ask(s.sign(jti=None)), SignatureMalformed),
    "a short nonce": (lambda s: s.ask(s.sign(jti="1")), SignatureMalformed),
    "lasts for an hour": (lambda s: s.ask(s.sign(exp=int(time.time()) + 3600)), SignatureMalformed),
    "long past": (lambda s: s.ask(s.sign(iat=1, exp=31)), SignatureStale),
    "of tomorrow": (lambda s: s.ask(s.sign(iat=2**35, exp=2**35 + 30)), SignatureStale),
    "another method": (lambda s: s.ask(s.sign(method=GET_CONTROL)), SignatureWrongMethod),
    "other bytes": (lambda s: s.ask(s.sign(), content=body(intent="reject")), SignatureBodyMismatch),
    "other bytes, same meaning": (lambda s: s.ask(s.sign(), content=BODY + BODY), SignatureBodyMismatch),
    "no bytes": (lambda s: s.ask(s.sign(), content=b""), SignatureBodyMismatch),
    "another length": (lambda s: s.ask(s.sign(bl=len(BODY) + 1)), SignatureBodyMismatch),
    "another digest": (lambda s: s.ask(s.sign(bd=digest(b""))), SignatureBodyMismatch),
    "another token": (lambda s: s.ask(s.sign(), token="other"), SignatureBodyMismatch),  # noqa: S106  # its name
    "for no token": (lambda s: s.ask(s.sign(ath=None)), SignatureBodyMismatch),
    "a key that may only read": (lambda s: s.ask(s.sign(READER)), ScopeMissing),
    "a token that may only read": (
        lambda s: s.ask(s.sign(token=s.tokens["reads"]), token="reads"),  # noqa: S106  # its name
        ScopeMissing,
    ),
}
"""Each is refused before anything looks into the request."""

WRONG_INSIDE: dict[str, Way] = {
    "a key that may only cancel": (lambda s: s.ask(s.sign(CANCELLER)), ScopeMissing),
    "a token that may only reject": (
        lambda s: s.ask(s.sign(token=s.tokens["rejects"]), token="rejects"),  # noqa: S106  # its name
        ScopeMissing,
    ),
    "for somebody else": (lambda s: s.ask(s.sign(act="bob")), ActorInvalid),
    "for nobody": (lambda s: s.ask(s.sign(act=None)), ActorInvalid),
    "no message": (lambda s: s.ask(s.sign(content=b"\xff"), content=b"\xff"), RequestUndecodable),
}
"""Who signed that is known, and what it asks for is refused."""


def unsigned(signature: str, algorithm: str) -> str:
    """The same claims, said to be protected in another way."""
    header = encode(f'{{"alg":"{algorithm}","typ":"ops-req+jwt","kid":"m1"}}'.encode())
    return f"{header}.{signature.split('.')[1]}."


def spliced(one: str, other: str) -> str:
    """The claims of one under the signature of the other."""
    header, claims, _ = one.split(".")
    return f"{header}.{claims}.{other.rpartition('.')[2]}"


async def test_what_is_right_passes(scene: Scene) -> None:
    response = await scene.ask(scene.sign())

    assert isinstance(response, bytes)
    assert pb.ExecuteControlResponse.FromString(response).result.executed
    assert (len(executions(scene.loop)), scene.server.refused) == (1, [])


@pytest.mark.parametrize("name", WRONG | WRONG_INSIDE)
async def test_what_is_wrong_in_any_way_is_refused_and_nothing_is_run(scene: Scene, name: str) -> None:
    ask, expected = (WRONG | WRONG_INSIDE)[name]

    refusal = await ask(scene)

    assert type(refusal) is expected, refusal
    assert refusal.executed is False
    assert [reason for reason, _ in scene.server.refused] == [expected.reason]
    assert len(scene.server.parsed) == (name in WRONG_INSIDE)
    assert executions(scene.loop) == []


def test_the_table_is_complete() -> None:
    refused = {expected for _, expected in (WRONG | WRONG_INSIDE).values()}
    elsewhere = {SignatureReplayed, ReplayCacheFull}  # below: they take more than one call

    assert set(SignatureRefused.__subclasses__()) - refused == elsewhere
    found("T19", f"{len(WRONG | WRONG_INSIDE)} ways to be wrong: all refused, {len(WRONG)} of them unparsed")


async def test_every_bit_of_the_body_counts(scene: Scene) -> None:
    flips = [bytes([*BODY[:at], BODY[at] ^ 1 << bit, *BODY[at + 1 :]]) for at in range(len(BODY)) for bit in range(8)]

    refusals = [await scene.ask(scene.sign(), content=flip) for flip in flips]

    assert {type(refusal) for refusal in refusals} == {SignatureBodyMismatch}
    assert (scene.server.parsed, executions(scene.loop)) == ([], [])
    found("T19", f"{len(flips)} bits of the body flipped, over a socket: all refused, unparsed")
    assert isinstance(await scene.ask(scene.sign()), bytes)


async def test_every_character_of_signature_and_token_counts(scene: Scene) -> None:
    signature, chance = scene.sign(), random.Random(19)  # noqa: S311  # the same characters
    changed = [metadata(scene.token, each) for each in one_changed(signature, chance)]
    changed += [metadata(each, signature) for each in one_changed(scene.token, chance)]

    kinds = {type(await answer(scene.channel, EXECUTE, BODY, sent)) for sent in changed}

    assert kinds <= {TokenInvalid, SignatureMalformed, SignatureKeyUnknown, SignatureInvalid}
    assert (scene.server.parsed, executions(scene.loop)) == ([], [])
    found("T19", f"{len(changed)} characters of token and signature changed, over a socket: all refused, unparsed")
    assert isinstance(await scene.ask(signature), bytes)


def one_changed(text: str, chance: random.Random) -> list[str]:
    """`text` with one character changed, for each of them, into another one that metadata can carry."""
    others = [[chr(code) for code in range(0x21, 0x7F) if chr(code) != character] for character in text]
    return [text[:at] + chance.choice(other) + text[at + 1 :] for at, other in enumerate(others)]


def test_every_bit_of_a_signature_counts() -> None:
    token, now = "spr1.t." + "x" * 43, time.time()
    given: dict[str, Any] = {
        "keys": {"m1": ADA.trusted()},
        "audience": "sprite-1",
        "method": EXECUTE,
        "body": BODY,
        "token": token,
        "now": now,
    }
    tried = 0
    for _ in range(scaled(1, 50)):
        signature = ADA.signed(EXECUTE, BODY, token=token)
        verify(signature, **given)
        for at in range(len(signature)):
            for bit in range(8):
                flipped = signature[:at] + chr(ord(signature[at]) ^ 1 << bit) + signature[at + 1 :]
                with pytest.raises(SignatureRefused):
                    verify(flipped, **given)
                tried += 1
    assert tried > 1000
    found("T19", f"{tried} bits of signatures flipped: all refused")


# T20: used twice.


async def test_a_signature_is_used_up_by_the_first_call(scene: Scene) -> None:
    signature = scene.sign()

    first, again = await scene.ask(signature), await scene.ask(signature)

    assert isinstance(first, bytes)
    assert type(again) is SignatureReplayed
    assert len(scene.server.parsed) == 1
    assert len(executions(scene.loop)) == 1


@pytest.mark.parametrize(
    ("method", "content"),
    [
        (GET_INFO, b""),
        (GET_CONTROL, pb.GetControlRequest(loop_id=LOOP, idempotency_key="none").SerializeToString()),
        (STREAM, pb.StreamEventsRequest(loop_id=LOOP).SerializeToString()),
    ],
    ids=["GetInfo", "GetControl", "StreamEvents"],
)
async def test_that_is_so_for_reads_as_well(scene: Scene, method: str, content: bytes) -> None:
    signature = scene.sign(method=method, content=content, act=None)

    first = await scene.ask(signature, method=method, content=content)
    again = await scene.ask(signature, method=method, content=content)

    assert not isinstance(first, SignatureRefused)
    assert type(again) is SignatureReplayed


async def test_a_call_that_is_refused_for_what_it_asks_uses_its_signature_up_too(scene: Scene) -> None:
    signature = scene.sign(act="bob")

    assert [type(await scene.ask(signature)) for _ in range(2)] == [ActorInvalid, SignatureReplayed]


async def test_of_many_calls_at_once_with_one_signature_one_gets_through(scene: Scene) -> None:
    signature = scene.sign()

    answers = await asyncio.gather(*(scene.ask(signature) for _ in range(scaled(32, 512))))

    kinds = Counter(type(each) for each in answers)
    assert kinds == {bytes: 1, SignatureReplayed: len(answers) - 1}
    assert len(executions(scene.loop)) == 1
    found("T20", f"one signature, {len(answers)} calls at once: 1 got through")


async def test_a_signature_is_of_no_use_elsewhere(scene: Scene, repo: LoopFiles, tmp_path: Path) -> None:
    files = CredentialSources(token_file=tmp_path / "tokens", trusted_keys=tmp_path / "keys.json")
    (tmp_path / "other").mkdir()
    signature = scene.sign()
    with contextlib.closing(Repo(repo.repo, state_folder=tmp_path / "state-2", runtime=str(STANDIN))) as served:
        async with (
            guarded(served, tmp_path / "other", files, audience="sprite-2") as second,
            grpc.aio.insecure_channel(second.address) as channel,
        ):
            elsewhere = await answer(channel, EXECUTE, BODY, metadata(scene.token, signature))
    other_method = await scene.ask(signature, method=GET_CONTROL)
    scene.server.clock.ahead = 100
    later = await scene.ask(signature)

    assert [type(each) for each in (elsewhere, other_method, later)] == [
        SignatureWrongAudience,
        SignatureWrongMethod,
        SignatureStale,
    ]
    assert executions(repo) == []
    found("T20", "at another Sprite, for another method, after 100 s: refused, 0 executions")


async def test_a_control_is_not_run_again_by_its_signature_after_a_restart_and_its_key_has_the_same_answer(
    config: ServeConfig, repo: LoopFiles, tmp_path: Path
) -> None:
    repo.ask_approval()
    files, tokens = sources(tmp_path)
    config = dataclasses.replace(
        config, token=None, token_file=files.token_file, trusted_keys=files.trusted_keys, require_signature="control"
    )
    signature = ADA.signed(EXECUTE, BODY, token=tokens["full"])
    answers = []
    for sent in (signature, signature, ADA.signed(EXECUTE, BODY, token=tokens["full"])):
        async with running(config) as address, grpc.aio.insecure_channel(address) as channel:
            answers.append(await answer(channel, EXECUTE, BODY, metadata(tokens["full"], sent)))

    first, replayed, again = answers
    assert isinstance(first, bytes)
    assert isinstance(again, bytes)
    assert type(replayed) is SignatureReplayed
    results = [pb.ExecuteControlResponse.FromString(each).result for each in (first, again)]
    assert [result.replayed for result in results] == [False, True]
    results[0].replayed = True
    assert results[0] == results[1]
    assert len(executions(repo)) == 1
    found("T20", "the same signature after a restart: refused; signed anew: the same answer, 1 execution")


async def test_a_control_that_was_refused_is_not_run_by_its_signature_after_a_restart(
    config: ServeConfig, repo: LoopFiles, tmp_path: Path
) -> None:
    """Though what it was refused for is so no more."""
    files, tokens = sources(tmp_path)
    config = dataclasses.replace(
        config, token=None, token_file=files.token_file, trusted_keys=files.trusted_keys, require_signature="control"
    )
    sent = metadata(tokens["full"], ADA.signed(EXECUTE, BODY, token=tokens["full"]))
    answers = []
    for _ in range(2):
        async with running(config) as address, grpc.aio.insecure_channel(address) as channel:
            answers.append(await answer(channel, EXECUTE, BODY, sent))
        repo.ask_approval()

    assert [type(each) for each in answers] == [ApprovalNotPending, SignatureReplayed]
    assert executions(repo) == []
    found("T20", "the signature of a refused control after a restart: refused, 0 executions")


async def test_a_control_that_came_too_soon_is_not_run_by_its_signature_after_a_restart(
    config: ServeConfig, repo: LoopFiles, tmp_path: Path
) -> None:
    files, tokens = sources(tmp_path)
    config = dataclasses.replace(
        config,
        token=None,
        token_file=files.token_file,
        trusted_keys=files.trusted_keys,
        require_signature="control",
        max_control_rate=1,
    )
    repo.append(line(event()))
    sent = metadata(tokens["full"], ADA.signed(EXECUTE, BODY, token=tokens["full"]))
    answers = []
    for asked_before in (BURST, 0):
        async with running(config) as address, grpc.aio.insecure_channel(address) as channel:
            for _ in range(asked_before):
                other = ADA.signed(EXECUTE, BODY, token=tokens["full"])
                await answer(channel, EXECUTE, BODY, metadata(tokens["full"], other))
            answers.append(await answer(channel, EXECUTE, BODY, sent))
        repo.ask_approval()

    assert [type(each) for each in answers] == [RateLimited, SignatureReplayed]
    assert executions(repo) == []


async def test_without_room_to_remember_it_no_signature_is_taken(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene.server.access.replays, "_capacity", 1)
    scene.server.access.replays.take(
        Proof(issuer="opsmgr-1", key_id="m1", actor=None, nonce="x" * 16, expires=time.time() + 60)
    )

    assert type(await scene.ask(scene.sign())) is ReplayCacheFull
    assert (scene.server.parsed, executions(scene.loop)) == ([], [])


# T21: the clock.


@pytest.mark.parametrize("ahead", [-91, -61, -31, -29, 29, 31, 58, 62, 91])
async def test_the_window_is_that_of_the_agents_clock(scene: Scene, ahead: int) -> None:
    scene.server.clock.ahead = ahead

    response = await scene.ask(scene.sign())

    if -30 <= ahead <= 60:
        assert isinstance(response, bytes)
    else:
        assert isinstance(response, SignatureStale)
        assert abs(int(response.details["skewSeconds"]) - ahead) <= 2
        assert response.details["serverTime"].endswith("Z")
    assert len(executions(scene.loop)) == (-30 <= ahead <= 60)
    found("T21", f"agent's clock {ahead:+} s: {'taken' if isinstance(response, bytes) else 'refused'}")


async def test_a_signature_lasts_no_longer_by_a_clock_that_is_set_back(scene: Scene) -> None:
    signature = scene.sign()
    first = await scene.ask(signature)
    refusals = []
    for ahead in (3600, 0, -3600, 0):
        scene.server.clock.ahead = ahead
        refusals.append(type(await scene.ask(signature)))

    assert isinstance(first, bytes)
    assert refusals == [SignatureStale, SignatureReplayed, SignatureStale, SignatureReplayed]
    found("T21", "set forward and back by an hour: no signature counts twice")


async def test_a_stream_goes_on_while_the_clock_is_set(scene: Scene) -> None:
    content = pb.StreamEventsRequest(loop_id=LOOP, follow=True).SerializeToString()
    signature = scene.sign(method=STREAM, content=content)
    call: Any = scene.channel.unary_stream(STREAM, response_deserializer=pb.StreamEventsResponse.FromString)
    following = call(content, metadata=metadata(scene.token, signature), timeout=DEADLINE)
    seen: list[int] = []
    for count, ahead in enumerate((0, 3600, -3600, 0), 2):
        scene.server.clock.ahead = ahead
        scene.loop.append(line(event()))
        while len(seen) < count:
            seen += [each.cursor.event_line_offset for each in (await following.read()).events]
    following.cancel()

    assert seen == [1, 2, 3, 4, 5]
    found("T21", "set by an hour either way under a following stream: 5 events, none lost")


def test_signatures_are_not_checked_without_knowing_whom_they_are_for(tmp_path: Path) -> None:
    files, _ = sources(tmp_path)

    with pytest.raises(ValueError, match="without the Sprite's id"):
        Access(CredentialFiles(files))
