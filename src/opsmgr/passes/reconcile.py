"""One reconcile: snapshot, events after the cursor, project, persist, judge, escalate, telemetry.

The cursor is saved after what it covers. A reconcile that fails leaves state and cursor
as they were, and still writes health and telemetry. Whatever blocks runs in a thread, so
that one event loop can work for many loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from opsmgr import store as files
from opsmgr.agent_memory import escalate, load_memory, save_memory
from opsmgr.cursors import load_cursor, save_cursor
from opsmgr.passes.escalations import find_escalations
from opsmgr.passes.health import Figures, judge
from opsmgr.passes.heartbeat import heartbeat_at, heartbeat_document
from opsmgr.passes.ingest import Pass, ReconcileOptions, failure_code, ingest
from opsmgr.passes.projection import project
from opsmgr.passes.sequence import check_sequence
from opsmgr.passes.telemetry import heartbeat_line, reconcile_line, sequence_line, transport_health
from sprite_agent.contract import clock
from sprite_agent.contract.json_text import member
from sprite_agent.contract.validation import is_valid, validate
from sprite_agent.errors import OpsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsmgr.agent_memory import Escalation
    from opsmgr.passes.feed import Feed
    from opsmgr.store import LoopStore
    from opsmgr.transport.base import Transport

__all__ = ["ReconcileOptions", "reconcile", "reconcile_held", "record_failure"]


async def reconcile(transport: Transport, store: LoopStore, options: ReconcileOptions) -> dict[str, Any]:
    """Brings the manager's files of a loop up to date. Gives the new state.

    Raises:
        LoopLocked: another manager works on the loop; nothing was written.
        OpsError: it failed; health and telemetry say so.
    """
    with store.locked():
        return await reconcile_held(transport, store, options)


async def reconcile_held(
    transport: Transport, store: LoopStore, options: ReconcileOptions, *, feed: Feed | None = None
) -> dict[str, Any]:
    """Likewise for a caller that holds `store.locked()`.

    Args:
        transport: how to reach the loop.
        store: the loop's files.
        options: what is asked for.
        feed: what a subscription has brought since the cursor, with malformed records passed over: the
            events are taken from it. What was handled leaves it; if the pass fails or is cancelled before
            it has written, all of it stays.

    Raises:
        OpsError: it failed; health and telemetry say so.
    """
    done = _begin(transport)
    try:
        await _in_thread(lambda: _load(store, options, done))
        await ingest(transport, options, done, feed)
    except OpsError as error:
        done.failure = error
    try:
        await _in_thread(lambda: _settle(transport, store, options, done))
    finally:  # a pass that is cancelled here has been written all the same
        if feed is not None and done.portion is not None and done.is_kept:
            feed.handled(done.portion, done.lost)
    if done.failure is not None:
        raise done.failure
    assert done.state is not None  # noqa: S101  # no failure
    return done.state


async def record_failure(transport: Transport, store: LoopStore, options: ReconcileOptions, error: OpsError) -> None:
    """Writes down that the loop can't be reached, as a reconcile would that finds so; tries nothing.

    For a caller that holds `store.locked()`.

    Raises:
        OpsError: it can't be written.
    """
    done = _begin(transport)
    try:
        await _in_thread(lambda: _load(store, options, done))
    except OpsError as unreadable:
        done.failure = unreadable
    else:
        done.failure, done.stage = error, "snapshot_unavailable"
    await _in_thread(lambda: _settle(transport, store, options, done))


def _begin(transport: Transport) -> Pass:
    attempts = transport.attempts
    return Pass(
        started_at=clock.now(),
        began=time.monotonic(),
        retries=attempts.retries,
        waited_seconds=attempts.waited_seconds,
    )


async def _in_thread(work: Callable[[], None]) -> None:
    """Does what blocks in a thread. Cancelled, it waits for the thread: the caller may then use the files."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # seen; the cancellation is what counts
        raise


def _load(store: LoopStore, options: ReconcileOptions, done: Pass) -> None:
    done.previous = files.load(store.state)
    done.sequence = files.load(store.sequence)
    if done.sequence is None and store.cursor.exists():  # as it was kept before that file was
        done.sequence = member(done.previous, "sequence")
    done.memory = load_memory(store)
    if not options.from_start:
        done.before = done.after = load_cursor(store.cursor, options.loop_id)


def _settle(transport: Transport, store: LoopStore, options: ReconcileOptions, done: Pass) -> None:
    """Projects and judges a pass, and writes all that follows from it; `done` says if that failed.

    Raises:
        OpsError: not even the telemetry line can be written.
    """
    if done.failure is None and done.snapshot is not None:
        try:
            done.stage = "projection_failed"
            done.state = project(options.loop_id, done.snapshot.envelope, done.events, done.previous)
            done.stage = "reconcile_failed"
        except OpsError as error:
            done.failure = error
    verdict = _judge(transport, store, options, done)
    try:
        _persist(transport, store, options, done, verdict)
        done.is_kept = done.failure is None
    except OpsError as error:
        done.failure = done.failure or error
        done.stage, done.state = "reconcile_failed", None
        verdict = _judge(transport, store, options, done)
        with contextlib.suppress(OpsError):  # what could not be written once may still not be; telemetry tells
            _persist(transport, store, options, done, verdict)
    files.append(store.reconcile_telemetry, reconcile_line(done, verdict.health, options, transport))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What is to be written of a pass."""

    health: dict[str, Any]
    transport_health: dict[str, Any]
    heartbeat: dict[str, Any] | None
    """None: there was no snapshot to see it in."""
    sequence: dict[str, Any] | None
    """None: it was not checked."""
    escalations: list[Escalation]


def _judge(transport: Transport, store: LoopStore, options: ReconcileOptions, done: Pass) -> _Verdict:
    """Judges a pass; writes nothing."""
    now = datetime.now(UTC)
    code = None if done.failure is None else failure_code(transport.name, done.stage, done.failure)
    way = transport_health(
        files.load_if_readable(store.transport_health),
        transport=transport.name,
        trace_id=options.trace_id,
        failure_code=code,
    )
    envelope = done.snapshot.envelope if done.snapshot else None
    heartbeat = None
    if envelope is not None:
        heartbeat = heartbeat_document(
            envelope, options.thresholds, transport=transport.name, now=now, trace_id=options.trace_id
        )
        validate("manager_heartbeat", heartbeat)
    sequence = done.sequence if is_valid("manager_sequence", done.sequence) else None
    if done.failure is None and envelope is not None:
        sequence = check_sequence(envelope, done.events, None if done.lost or options.from_start else done.sequence)
        validate("manager_sequence", sequence)
    projection = member(done.state or done.previous, "projection")
    health = judge(
        Figures(
            transport=transport.name,
            failure_code=code,
            last_failure_code=way["lastFailureCode"],
            failure_streak=way["failureStreak"],
            last_event_at=_text(member(projection, "lastEventAt")),
            last_heartbeat_at=heartbeat_at(envelope),
            last_control_status=_text(member(files.last_line(store.intents), "status")),
            lifecycle_state=_text(member(projection, "status")),
            diverges=member(member(done.state, "divergence"), "any") is True,
            sequence=sequence,
        ),
        options.thresholds,
        now=now,
        trace_id=options.trace_id,
    )
    validate("manager_health", health)
    if done.state is not None:
        done.state |= {"health": health, "trace": {"reconcileTraceId": options.trace_id}, "sequence": sequence}
        validate("manager_state", done.state)
    drifted_before = member(done.sequence, "driftActive") is True
    return _Verdict(
        health=health,
        transport_health=way,
        heartbeat=heartbeat,
        sequence=sequence if done.state is not None else None,
        escalations=find_escalations(done, health, files.load_if_readable(store.health), drifted_before=drifted_before),
    )


def _persist(transport: Transport, store: LoopStore, options: ReconcileOptions, done: Pass, verdict: _Verdict) -> None:
    """Writes everything but the line about the pass.

    The escalations come before the state, which a cursor's step back is held against, and the cursor after both:
    what a kill between them leaves undone is done again, and no alarm is lost. The memory of the ordering checks
    comes after the cursor: events that are seen again are no regression. Where the log is taken from its start it
    comes before: held against the memory of what was before, what follows a new cursor would be a regression.

    Raises:
        InputInvalid: something can't be written.
    """
    files.save(store.transport_health, verdict.transport_health)
    if verdict.heartbeat is not None:
        files.save(store.heartbeat, verdict.heartbeat)
    escalate(store, verdict.escalations, loop_id=options.loop_id, trace_id=options.trace_id, transport=transport.name)
    begins_anew = done.lost is not None or options.from_start
    if done.state is not None:
        files.save(store.state, done.state)
        if begins_anew and verdict.sequence is not None:
            files.save(store.sequence, verdict.sequence)
        save_cursor(store.cursor, done.after, repo_path=done.state["source"]["repoPath"], loop_id=options.loop_id)
    if verdict.sequence is not None and not begins_anew:
        files.save(store.sequence, verdict.sequence)
    files.save(store.health, verdict.health)
    if verdict.heartbeat is not None:
        files.append(store.heartbeat_telemetry, heartbeat_line(verdict.heartbeat))
    if verdict.sequence is not None:
        files.append(store.sequence_telemetry, sequence_line(verdict.sequence, options, transport))
    if done.memory is not None and (done.memory.journal or done.memory.findings):
        save_memory(store, done.memory)  # last: what is escalated is not forgotten before it is written


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
