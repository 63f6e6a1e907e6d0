"""The logs that are measured with: the same for the same seed, and logs by the contract."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.transport.local import LocalTransport
from sprite_agent.contract.streaming import EventQuery
from tools.bench.logs import KINDS, LOOP, LogStore, add_loop, append, chunks

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.logs import Kind

LINES = 4_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_log_and_another_seed_another(kind: Kind) -> None:
    first, second, other = (b"".join(chunks(kind, LINES, seed)) for seed in (1, 1, 2))

    assert first == second
    assert first != other


@pytest.mark.parametrize(("kind", "low", "high"), [("small", 363, 369), ("mix", 1_450, 1_750)])
def test_lines_have_the_mean_size_of_their_kind(kind: Kind, low: int, high: int) -> None:
    assert low <= len(b"".join(chunks(kind, LINES, 1))) / LINES <= high


def test_a_quarter_of_a_mix_carries_a_payload_of_2_to_8_kb() -> None:
    lines = b"".join(chunks("mix", LINES, 1)).splitlines()
    large = [len(line) for line in lines if len(line) > 1_000]

    assert 0.22 <= len(large) / LINES <= 0.28
    assert min(large) >= 2_048
    assert max(large) <= 8_192 + 500


@pytest.mark.parametrize("kind", KINDS)
async def test_every_line_is_an_event_by_the_contract_and_bears_its_number(kind: Kind, tmp_path: Path) -> None:
    add_loop(tmp_path / "repo", LOOP, LogStore(tmp_path, 1).log(kind, LINES))
    transport = LocalTransport(tmp_path / "repo")

    found = [event async for batch in transport.events(EventQuery(loop_id=LOOP)) for event in batch.events]
    await transport.close()

    assert [event["event"]["raw"]["data"]["n"] for event in found] == list(range(1, LINES + 1))
    assert [event["cursor"]["eventLineOffset"] for event in found] == list(range(1, LINES + 1))


async def test_the_documents_beside_a_log_make_a_snapshot_by_the_contract(tmp_path: Path) -> None:
    add_loop(tmp_path / "repo", LOOP, LogStore(tmp_path, 1).log("small", 50))
    transport = LocalTransport(tmp_path / "repo")

    snapshot = await transport.snapshot(LOOP)
    await transport.close()

    assert snapshot.envelope["cursor"]["eventLineCount"] == 50
    assert snapshot.envelope["run"]["status"] == "awaiting_approval"
    artifacts: dict[str, Any] = {**snapshot.envelope["artifacts"]}
    assert all(artifact["exists"] for artifact in artifacts.values())


def test_a_log_is_made_once_and_known_by_its_digest(tmp_path: Path) -> None:
    store = LogStore(tmp_path, 1)

    log = store.log("small", 50)

    assert store.log("small", 50) is log
    content = log.path.read_bytes()
    assert (log.lines, log.size, log.sha256) == (50, len(content), hashlib.sha256(content).hexdigest())


def test_an_appended_line_bears_its_number_and_a_moment(tmp_path: Path) -> None:
    log = add_loop(tmp_path / "repo", "loop-1", None)

    append(log, 1)
    append(log, 2)

    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["data"]["n"] for event in events] == [1, 2]
    assert events[0]["data"]["at"] < events[1]["data"]["at"]
