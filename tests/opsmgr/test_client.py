"""The library: clients of real loops, over both transports, through lost connections and replaced logs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import opsmgr
from opsmgr import connect
from opsmgr.agent_memory import AgentMemory, save_memory
from opsmgr.client import Settings
from opsmgr.store import LoopStore, default_folder
from sprite_agent.face.server import running
from sprite_agent.face.tls import TlsFiles
from support.certificates import Authority
from support.certificates import put as put_file
from support.repos import LOOP, STANDIN, LoopFiles, event, line, put
from support.runtime import executions
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Agent, AgentProgram

    from opsmgr import Client, EventStream
    from sprite_agent.face.config import ServeConfig

Json = dict[str, Any]

TOKEN = "token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it


@pytest.fixture(params=["local", "sprite_service"])
def opened(request: pytest.FixtureRequest, repo: LoopFiles, tmp_path: Path) -> Callable[[], Client]:
    """Makes clients of the repo's loop, by each of the transports."""
    if request.param == "local":
        return lambda: connect(loop=LOOP, repo=repo.repo, state_dir=tmp_path / "state", superloop_bin=str(STANDIN))
    agent: Agent = request.getfixturevalue("agent")
    return lambda: connect(loop=LOOP, address=agent.address, token=agent.token, folder=tmp_path / "files")


def numbered(first: int, count: int) -> bytes:
    """Lines with events."""
    return b"".join(line(event(n=number)) for number in range(first, first + count))


async def lines_of(stream: EventStream, count: int | None = None) -> list[int]:
    """The lines of the next `count` events; all that are left without one."""
    found: list[int] = []
    async with asyncio.timeout(DEADLINE):
        while count is None or len(found) < count:
            try:
                found.append((await anext(stream))["cursor"]["eventLineOffset"])
            except StopAsyncIteration:
                break
    return found


# Looking and following.


async def test_a_client_says_who_answers_and_how_the_loop_is(opened: Callable[[], Client], repo: LoopFiles) -> None:
    repo.append(numbered(1, 3))

    async with opened() as client:
        info, snapshot = await client.info(), await client.snapshot()

    assert info.loops == [LOOP]
    assert snapshot.envelope["cursor"] == {"eventLineOffset": 3, "eventLineCount": 3}


async def test_without_following_the_events_end_with_the_log(opened: Callable[[], Client], repo: LoopFiles) -> None:
    repo.append(numbered(1, 500))

    async with opened() as client:
        assert await lines_of(client.events(follow=False)) == list(range(1, 501))


@pytest.mark.parametrize("stop", [1, 2, 249, 500])
async def test_a_stored_position_goes_on_with_the_next_event_also_from_within_a_batch(
    opened: Callable[[], Client], repo: LoopFiles, stop: int
) -> None:
    repo.append(numbered(1, 500))
    async with opened() as client:
        stream = client.events(follow=False)
        await lines_of(stream, stop)
        stored = json.dumps(asdict(stream.position))

    async with opened() as client:
        stream = client.events(opsmgr.Position(**json.loads(stored)), follow=False)

        assert await lines_of(stream) == list(range(stop + 1, 501))
        assert stream.position.line == 500


async def test_after_a_snapshot_come_the_events_that_it_does_not_cover(
    opened: Callable[[], Client], repo: LoopFiles
) -> None:
    repo.append(numbered(1, 5))
    async with opened() as client:
        seen = await client.snapshot()
        stream = client.events(seen)
        repo.append(numbered(6, 2))

        assert await lines_of(stream, 2) == [6, 7]


async def test_a_position_in_a_log_that_was_replaced_is_lost(opened: Callable[[], Client], repo: LoopFiles) -> None:
    repo.append(numbered(1, 5))
    async with opened() as client:
        stream = client.events(follow=False)
        await lines_of(stream)
        repo.replace(numbered(101, 9))

        with pytest.raises(opsmgr.PositionLost, match="log"):
            await lines_of(client.events(stream.position, follow=False))
        assert await lines_of(client.events(follow=False)) == list(range(1, 10))


@pytest.mark.parametrize("stop", [1, 2, 99, 250])
async def test_a_position_within_a_batch_in_a_log_that_was_replaced_is_lost(
    opened: Callable[[], Client], repo: LoopFiles, stop: int
) -> None:
    repo.append(numbered(1, 300))
    async with opened() as client:
        stream = client.events()
        await lines_of(stream, stop)
    repo.replace(numbered(1001, 400))

    async with opened() as client:
        with pytest.raises(opsmgr.PositionLost, match="log"):
            await lines_of(client.events(stream.position, follow=False))


async def test_a_position_within_a_batch_in_a_log_that_was_cut_off_before_it_is_lost(
    opened: Callable[[], Client], repo: LoopFiles
) -> None:
    repo.append(numbered(1, 600))
    async with opened() as client:
        stream = client.events()
        await lines_of(stream, 350)
    repo.log.write_bytes(numbered(1, 250) + numbered(9001, 50))

    async with opened() as client:
        with pytest.raises(opsmgr.PositionLost, match="300 lines, of which 350"):
            await lines_of(client.events(stream.position, follow=False))


async def test_a_malformed_record_is_an_error_unless_somebody_is_told_of_it(
    opened: Callable[[], Client], repo: LoopFiles
) -> None:
    repo.append(numbered(1, 1), b"not an event\n", numbered(3, 1))
    told: list[opsmgr.SkippedRecord] = []

    async with opened() as client:
        strict = client.events(follow=False)
        assert await lines_of(strict, 1) == [1]
        with pytest.raises(opsmgr.EventMalformed):
            await lines_of(strict)
        assert await lines_of(client.events(follow=False, on_malformed=told.append)) == [1, 3]

    assert [record.first_line for record in told] == [2]


async def test_events_go_on_over_an_agent_that_was_killed_and_started_again(
    start_agent: Callable[..., AgentProgram], repo: LoopFiles, tmp_path: Path
) -> None:
    listen = f"unix:{tmp_path}/agent.sock"
    program = start_agent("--listen", listen)
    repo.append(numbered(1, 100))
    told: list[opsmgr.OpsError] = []
    async with connect(
        loop=LOOP,
        address=program.address(),
        token=TOKEN,
        folder=tmp_path / "files",
    ) as client:
        stream = client.events(
            on_retry=lambda error, _: told.append(error),
            policy=opsmgr.RetryPolicy(attempts=1000, base=0.02, cap=0.1),
        )
        before = await lines_of(stream, 100)
        program.process.send_signal(signal.SIGKILL)
        program.exit_code()
        repo.append(numbered(101, 100))
        start_agent("--listen", listen)
        after = await lines_of(stream, 100)

    assert before + after == list(range(1, 201))
    assert isinstance(told[0], opsmgr.NoAnswer)


async def test_clients_of_several_loops_work_side_by_side(agent: Agent, repo: LoopFiles, tmp_path: Path) -> None:
    other = LoopFiles(tmp_path / "other")
    repo.append(numbered(1, 3))
    async with (
        connect(loop=LOOP, address=agent.address, token=agent.token) as one,
        connect(loop=LOOP, repo=other.repo) as two,
    ):
        reading = asyncio.gather(lines_of(one.events(), 6), lines_of(two.events(), 4))
        repo.append(numbered(4, 3))
        other.append(numbered(1, 4))

        assert [*await reading] == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]]


async def test_streams_that_are_left_open_end_with_their_client(opened: Callable[[], Client], repo: LoopFiles) -> None:
    repo.append(numbered(1, 3))
    async with opened() as client:
        stream = client.events()
        await lines_of(stream, 1)

    assert await lines_of(stream) == []


async def test_who_waits_for_an_event_when_the_client_closes_waits_no_longer(
    opened: Callable[[], Client], repo: LoopFiles
) -> None:
    repo.append(numbered(1, 3))
    async with opened() as client:
        stream = client.events()
        await lines_of(stream, 3)
        waiting = asyncio.create_task(lines_of(stream))
        await asyncio.sleep(0)

    assert await waiting == []


async def test_a_client_can_be_opened_again(opened: Callable[[], Client], repo: LoopFiles) -> None:
    repo.append(numbered(1, 3))
    client = opened()
    for _ in range(2):
        async with client:
            assert await lines_of(client.events(), 3) == [1, 2, 3]


async def test_a_reader_that_is_cancelled_can_go_on_from_its_position(
    opened: Callable[[], Client], repo: LoopFiles
) -> None:
    repo.append(numbered(1, 3))
    async with opened() as client:
        stream = client.events()
        await lines_of(stream, 3)
        waiting = asyncio.create_task(lines_of(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        repo.append(numbered(4, 1))

        assert await lines_of(client.events(stream.position), 1) == [4]


async def test_a_client_that_is_not_open_says_so(opened: Callable[[], Client]) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await opened().snapshot()


# Control.


@pytest.fixture
def asking(repo: LoopFiles) -> LoopFiles:
    """The repo, whose loop waits for approval."""
    repo.append(line(event("approval_requested")))
    repo.ask_approval()
    return repo


def approving(asking: LoopFiles, tmp_path: Path, **settings: Any) -> Client:
    """A client of a loop on this machine that waits for approval."""
    return connect(loop=LOOP, repo=asking.repo, state_dir=tmp_path / "state", superloop_bin=str(STANDIN), **settings)


def intents(store: LoopStore) -> list[Json]:
    return [json.loads(entry) for entry in store.intents.read_text().splitlines()]


async def test_a_key_is_run_once_and_its_state_can_be_asked_for(asking: LoopFiles, tmp_path: Path) -> None:
    async with approving(asking, tmp_path) as client:
        first = await client.approve(by="ada", note="fine", key="k1", confirm="decision")
        again = await client.approve(by="ada", note="fine", key="k1", confirm="decision")
        state = await client.control_state("k1")

    assert (first["status"], first["replayed"], again["replayed"]) == ("confirmed", False, True)
    assert state["state"] == "done"
    assert len(executions(asking)) == 1


async def test_an_effect_that_is_none_is_refused_and_nothing_is_run(asking: LoopFiles, tmp_path: Path) -> None:
    async with approving(asking, tmp_path) as client:
        with pytest.raises(opsmgr.InputInvalid, match="confirm is 'bad'; it can be completion, decision, none"):
            await client.approve(by="ada", confirm="bad")  # type: ignore[arg-type]  # what it is about

    assert not executions(asking)


async def test_control_leaves_the_records_of_the_command_line(asking: LoopFiles, tmp_path: Path) -> None:
    async with approving(asking, tmp_path) as client:
        await client.reject(by="ada", key="k1", confirm="none")

    (record,) = intents(LoopStore(default_folder(asking.repo, LOOP)))
    assert (record["intent"], record["idempotencyKey"], record["requestedBy"]) == ("reject", "k1", "ada")


async def test_the_records_go_to_the_folder_that_was_given(asking: LoopFiles, tmp_path: Path) -> None:
    async with approving(asking, tmp_path, folder=str(tmp_path / "files")) as client:
        await client.approve(by="ada", confirm="none")

    assert len(intents(LoopStore(tmp_path / "files"))) == 1
    assert not default_folder(asking.repo, LOOP).exists()


async def test_an_approval_that_was_not_looked_at_is_refused_and_the_error_has_the_key(
    asking: LoopFiles, tmp_path: Path
) -> None:
    async with approving(asking, tmp_path) as client:
        seen = await client.snapshot()
        asking.ask_approval(candidate="another")

        with pytest.raises(opsmgr.PreconditionRefused) as refused:
            await client.approve(by="ada", expected=seen, confirm="none")

    assert refused.value.reason == "APPROVAL_CHANGED"
    assert refused.value.details["idempotencyKey"].startswith("approve-")
    assert executions(asking) == []


async def test_an_approval_that_was_looked_at_is_run(asking: LoopFiles, tmp_path: Path) -> None:
    async with approving(asking, tmp_path) as client:
        result = await client.approve(by="ada", expected=await client.snapshot(), confirm="decision")

    assert result["status"] == "confirmed"


async def test_a_cancel_that_was_meant_for_an_earlier_run_is_refused(asking: LoopFiles, tmp_path: Path) -> None:
    put(asking.state, {"active": True, "loop_id": LOOP})
    async with approving(asking, tmp_path) as client:
        seen = await client.snapshot()
        asking.append(line(event("loop_start", run_id="run-2")))

        with pytest.raises(opsmgr.PreconditionRefused) as refused:
            await client.cancel(by="ada", expected=seen, confirm="none")

    assert refused.value.reason == "RUN_MISMATCH"


async def test_control_that_is_frozen_is_refused(asking: LoopFiles, tmp_path: Path) -> None:
    async with approving(asking, tmp_path) as client:
        save_memory(client.target.store(), AgentMemory(frozen="it went back"))

        with pytest.raises(opsmgr.AgentStateRolledBack, match="it went back"):
            await client.cancel(by="ada")


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    """An agent's file of trusted keys; the private half of the one in it is `m1.json` beside."""
    words = ["--kid", "m1", "--issuer", "opsmgr-1", "--out", "m1.json", "--trusted-keys", "trusted.json"]
    program = Path(sys.executable).with_name("sprite-agent")
    subprocess.run([program, "keys", "pair", *words], check=True, cwd=tmp_path, timeout=DEADLINE, capture_output=True)
    return tmp_path / "trusted.json"


async def test_files_given_as_text_are_what_a_signed_control_over_tls_goes_by(
    asking: LoopFiles, config: ServeConfig, trusted: Path, tmp_path: Path
) -> None:
    authority = Authority()
    cert, key = authority.issue().put(tmp_path, "agent")
    served = replace(
        config,
        listen="127.0.0.1:0",
        tls=TlsFiles(cert=cert, key=key),
        trusted_keys=trusted,
        require_signature="all",
    )

    async with (
        running(served) as address,
        connect(
            loop=LOOP,
            address=address,
            token=TOKEN,
            tls_ca=str(put_file(tmp_path / "ca.pem", authority.pem)),
            signing_key=str(tmp_path / "m1.json"),
            sprite_id="sprite-1",
            folder=str(tmp_path / "files"),
        ) as client,
    ):
        result = await client.approve(by="ada", confirm="decision", expected=await client.snapshot())

    assert result["status"] == "confirmed"
    assert "ada@opsmgr-1#" in " ".join(result["command"])


async def test_a_key_that_is_not_known_was_not_run(opened: Callable[[], Client]) -> None:
    async with opened() as client:
        with pytest.raises(opsmgr.ControlNotFound):
            await client.control_state("never")


# Which loop.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "needs a target"),
        ({"loop": "demo"}, "where loop demo is"),
        ({"loop": "demo", "repo": "r", "tokn_file": "t"}, "does not know tokn_file"),
        ({"target": opsmgr.Target(name="a", loop="a"), "loop": "b"}, "not both"),
    ],
    ids=["nothing", "no place", "unknown setting", "two ways"],
)
def test_a_target_that_is_not_clear_is_refused(words: Json, message: str) -> None:
    with pytest.raises(opsmgr.InputInvalid, match=message):
        connect(**words)


async def test_a_token_without_an_agent_is_refused(repo: LoopFiles) -> None:
    with pytest.raises(opsmgr.InputInvalid, match="token is for an agent"):
        async with connect(loop=LOOP, repo=repo.repo, token="t"):  # noqa: S106  # of no use anywhere
            pass


@pytest.mark.parametrize("token", ["", "two words", "t\n", "t\u00e9"], ids=ascii)
async def test_a_token_that_can_be_none_is_refused(agent: Agent, token: str) -> None:
    with pytest.raises(opsmgr.InputInvalid, match="token must hold one token"):
        async with connect(loop=LOOP, address=agent.address, token=token):
            pass


async def test_a_token_that_is_given_beats_the_environment(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_MANAGER_SERVICE_TOKEN", "two words")

    async with connect(loop=LOOP, address=agent.address, token=agent.token) as client:
        assert (await client.info()).loops == [LOOP]


async def test_a_target_can_be_named_by_a_config(repo: LoopFiles, tmp_path: Path) -> None:
    config = tmp_path / "opsmgr.toml"
    config.write_text(f'[[targets]]\nname = "here"\nloop = "{LOOP}"\ntransport = "local"\nrepo = "{repo.repo}"\n')
    repo.append(numbered(1, 2))

    async with connect("here", config=config) as client:
        assert await lines_of(client.events(follow=False)) == [1, 2]
    with pytest.raises(opsmgr.InputInvalid, match="has no target 'there'; it has here"):
        connect("there", config=config)


def test_every_setting_of_connect_is_a_field_of_a_target() -> None:
    assert Settings.__annotations__.keys() <= opsmgr.Target.__dataclass_fields__.keys()


# The names.


def test_every_public_name_is_there() -> None:
    assert {name for name in opsmgr.__all__ if getattr(opsmgr, name, None) is None} == set()


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        opsmgr.nothing  # noqa: B018  # type: ignore[attr-defined]


@pytest.mark.parametrize("word", ["import opsmgr", "import opsmgr.cli"])
def test_importing_it_imports_nothing_slow(word: str) -> None:
    code = f"import sys; {word}; print({{'grpc', 'google.protobuf'}} & sys.modules.keys())"

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=DEADLINE)

    assert ended.stdout == "set()\n"
