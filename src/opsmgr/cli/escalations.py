"""What an operator has to hear of: the escalations of one target, of several, or of all."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from opsmgr.cli.output import for_people, print_json, printable, reported
from opsmgr.cli.targets import targets_options

if TYPE_CHECKING:
    from pathlib import Path

    from opsmgr.config import Config
    from opsmgr.targets import Target


_EVERY = 0.5
"""Seconds between two looks at a log that is followed."""


class Tail:
    """What is appended to a log of ours from now on, across its rotation. Holds the log open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._opened()
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)

    def read(self) -> list[dict[str, Any]]:
        """The records that have come since the last call; lines that can't be read are left out."""
        found = self._complete()
        fresh = self._opened()
        if fresh is None:
            return found
        if self._file is not None and os.path.samestat(os.fstat(self._file.fileno()), os.fstat(fresh.fileno())):
            fresh.close()
            return found
        found += self._complete()  # what was appended before it was rotated away
        if self._file is not None:
            self._file.close()
        self._file = fresh
        return found + self._complete()

    def _opened(self) -> BinaryIO | None:
        try:
            return self._path.open("rb")
        except FileNotFoundError:
            return None

    def _complete(self) -> list[dict[str, Any]]:
        from sprite_agent.contract import json_text

        found: list[dict[str, Any]] = []
        if self._file is None:
            return found
        while (line := self._file.readline()).endswith(b"\n"):
            record, _ = json_text.attempt(line, max_depth=json_text.DOCUMENT_DEPTH)
            found += [record] if isinstance(record, dict) else []
        self._file.seek(-len(line), os.SEEK_CUR)  # it is still being written
        return found


class _Moment(click.ParamType[datetime]):
    """A moment by ISO 8601; one without a zone is UTC."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """See click.ParamType."""
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no moment, as in 2026-01-31T12:00:00Z", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@click.command()
@targets_options
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="The last so many.")
@click.option("--since", type=_Moment(), metavar="MOMENT", help="Only those from then on.")
@click.option("--category", multiple=True, help="Only these; may be given several times.")
@click.option("--follow", "follows", is_flag=True, help="Go on with those that come, until interrupted.")
@click.option("--json", is_flag=True, help="JSON, also on a terminal and for errors.")
def escalations(
    *,
    targets: list[Target],
    config: Config | None,
    limit: int,
    since: datetime | None,
    category: tuple[str, ...],
    follows: bool,
    json: bool,
) -> None:
    """Prints the last escalations, the newest last. Reaches for no agent."""
    del config
    with reported(json=json):
        tails = {target.name: Tail(target.store().escalations) for target in targets} if follows else {}
        found = [record for target in targets for record in _records(target, since, category)]
        found.sort(key=_when)  # those of one second stay in the order in which they were written
        people = for_people(json=json)
        for record in found[-limit:]:
            _tell(record, people=people)
        while tails:
            time.sleep(_EVERY)
            for name, tail in tails.items():
                for record in tail.read():
                    if _is_wanted(record, since, category):
                        _tell({"target": name, **record}, people=people)


def _tell(record: dict[str, Any], *, people: bool) -> None:
    if people:
        click.echo(printable(_sentence(record)))
    else:
        print_json(record)


def _records(target: Target, since: datetime | None, categories: tuple[str, ...]) -> list[dict[str, Any]]:
    from opsmgr import overview

    records = overview.last_records(target.store().escalations, 100_000)
    return [{"target": target.name, **record} for record in records if _is_wanted(record, since, categories)]


def _is_wanted(record: dict[str, Any], since: datetime | None, categories: tuple[str, ...]) -> bool:
    return (not categories or record.get("category") in categories) and (since is None or _moment(record) >= since)


def _when(record: dict[str, Any]) -> str:
    return str(record.get("timestamp"))


def _moment(record: dict[str, Any]) -> datetime:
    try:
        return datetime.fromisoformat(_when(record))
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)


def _sentence(record: dict[str, Any]) -> str:
    evidence = record.get("evidence")
    said = evidence.get("message") if isinstance(evidence, dict) else None
    if said is None and isinstance(evidence, dict):
        reasons = evidence.get("reasons")
        codes = [each.get("code") for each in reasons if isinstance(each, dict)] if isinstance(reasons, list) else []
        said = ", ".join(map(str, codes)) or "; ".join(f"{key}: {value}" for key, value in evidence.items())
    return f"{record.get('timestamp')}  {record['target']}  {record.get('category')}  {said or ''}"
