"""Follows a loop to its end, and approves what it asks for when its promise is kept and its gates are green.

    approver.py ADDRESS LOOP TOKEN_FILE POSITION_FILE

It may be stopped at any moment and started again: it goes on with the first event that it has not dealt with.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from opsmgr import Client, OpsError, Position, PositionLost, PreconditionRefused, connect


async def main(address: str, loop: str, token_file: Path, position_file: Path) -> None:
    """Begins where the last one stopped, and tells how it ends."""
    position = Position(**json.loads(position_file.read_text())) if position_file.exists() else None
    async with connect(loop=loop, address=address, token_file=token_file) as client:
        print(f"agent {(await client.info()).agent_version}")
        try:
            await follow(client, position, position_file)
        except PositionLost as lost:  # the log was replaced: this one is new, from its first line
            print(f"{lost.reason}: {lost.message}")
            await follow(client, None, position_file)


async def follow(client: Client, position: Position | None, position_file: Path) -> None:
    """Deals with every event once; lost connections are made anew underneath."""
    events = client.events(after=position)
    async for envelope in events:
        print(f"line {envelope['cursor']['eventLineOffset']}: {envelope['event']['name']}")
        if envelope["event"]["name"] == "approval_requested":
            await decide(client)
        draft = position_file.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(events.position)))  # after it is dealt with, not before
        draft.replace(position_file)
        if envelope["event"]["name"] == "loop_complete":
            return


async def decide(client: Client) -> None:
    """Approves exactly what it has looked at."""
    seen = await client.snapshot()
    approval = seen.envelope["runtime"]["approval"]
    if approval is None or approval["status"] != "pending":
        return  # decided by somebody else
    candidate = approval["candidate"]
    if not candidate["promise"]["matched"] or not set(candidate["gates"].values()) <= {"ok", "skipped"}:
        print("left to a person")
        return
    key = f"approver-{seen.envelope['artifacts']['approval']['sha256']}"  # the same request, the same key: run once
    try:  # no answer ends this program, and the next one asks again with the same key
        result = await client.approve(by="approver", key=key, confirm="decision", expected=seen)
    except PreconditionRefused as refused:  # it has changed since
        print(f"not approved: {refused.message}")
    else:
        print(f"approve {result['status']}: {result['reason']}")


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))
    except OpsError as error:
        sys.exit(f"{error.reason}: {error.message}")
