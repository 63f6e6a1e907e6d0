"""Every recorded case gives what the recorded adapters printed for it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.contract import json_text
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import OpsError
from sprite_agent.repo import Repo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = sorted(case.parent for case in GOLDEN.glob("*/case.json"))

Json = dict[str, Any]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def spec(case: Path) -> Json:
    return dict(json.loads((case / "case.json").read_bytes()))


@pytest.fixture
async def repo(case: Path, spec: Json, tmp_path: Path) -> AsyncIterator[Repo]:
    path = tmp_path / "repo"
    shutil.copytree(case / "repo", path)
    # Git keeps no empty folders.
    (path / ".superloop" / "loops" / spec["loop"]).mkdir(parents=True, exist_ok=True)
    for file, moment in spec["mtimes"].items():
        os.utime(path / file, (moment, moment))
    repo = Repo(path, state_folder=tmp_path / "state", runtime=None)
    yield repo
    repo.close()


def as_recorded(envelope: Any, repo: Repo) -> Json:
    """An envelope as the recorded ones are kept: without what varies, plain JSON values."""
    text = json_text.encode(envelope).decode().replace(str(repo.path), "@REPO@")
    return {**json.loads(text), "emittedAt": "@TIME@"}


def typed(value: Any) -> Any:
    """`value`, made so that true is not 1; 3 and 3.0 are one number."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return value


async def test_the_snapshot_is_the_recorded_one_or_refused_as_recorded(repo: Repo, spec: Json, case: Path) -> None:
    if not spec["expect"]["snapshot_ok"]:
        with pytest.raises(OpsError):
            repo.read_loop(spec["loop"], trace_id=spec["trace_id"], run_id=spec["run_id"])
        return

    reading = repo.read_loop(spec["loop"], trace_id=spec["trace_id"], run_id=spec["run_id"])

    expected = json.loads((case / "expected" / "snapshot.json").read_bytes())
    assert typed(as_recorded(reading.snapshot, repo)) == typed(expected)


async def test_the_events_are_the_recorded_ones_up_to_the_recorded_failure(repo: Repo, spec: Json, case: Path) -> None:
    query = EventQuery(
        loop_id=spec["loop"],
        after_line=spec["cursor"] or 0,
        max_events=spec["max_events"],
        trace_id=spec["trace_id"],
    )
    events: list[Json] = []
    cursor: Json = {}
    failure = None
    try:
        async for batch in repo.stream_events(query):
            events += [as_recorded(event, repo) for event in batch.events]
            cursor = {**batch.cursor}
    except OpsError as error:
        failure = error

    recorded = (case / "expected" / "events.ndjson").read_text().splitlines()
    assert [typed(event) for event in events] == [typed(json.loads(line)) for line in recorded]
    assert (failure is None) == spec["expect"]["events_ok"], failure
    if failure is None:
        expected = json.loads((case / "expected" / "cursor.json").read_bytes())
        assert cursor == {name: expected[name] for name in ("eventLineOffset", "eventLineCount")}


def test_there_are_recorded_cases() -> None:
    assert len(CASES) >= 44
