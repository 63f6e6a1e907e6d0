"""Supervises one target: streams its events, projects them, goes down the ladder when it must and up when it can.

The ladder is stream, poll, local. Only the stream is held; the lower rungs are used for one
pass at a time between two tries at the stream, so the way up is always open.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING

import structlog

from opsmgr import store as files
from opsmgr.agent_memory import load_memory
from opsmgr.cursors import Position, load_cursor
from opsmgr.errors import InputInvalid, NoAnswer
from opsmgr.fleet.pacing import Pacing
from opsmgr.fleet.sleep import sleeps
from opsmgr.fleet.view import TargetView
from opsmgr.passes.feed import Feed
from opsmgr.passes.reconcile import ReconcileOptions, reconcile_held
from opsmgr.transport.retry import RetryPolicy
from sprite_agent.contract.streaming import EventQuery
from sprite_agent.errors import Draining, HistoryRewritten, LogReplaced, LogTruncated, OpsError

if TYPE_CHECKING:
    from opsmgr.config import FleetSettings
    from opsmgr.fleet.metrics import FleetMetrics
    from opsmgr.fleet.slots import Slot, Slots
    from opsmgr.fleet.view import Reach, Rung
    from opsmgr.store import LoopStore
    from opsmgr.targets import Target
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.streaming import EventBatch

ONE_TRY = RetryPolicy(attempts=1)
"""Tries are paced here: one that waits inside of a call could not be looked after."""
_RENEWAL_JITTER = 0.5
"""Seconds over which streams that have ended in good order are opened anew."""

_log = structlog.get_logger("opsmgr.fleet")


class Follower:
    """The supervision of one target. `run` it; end it by cancelling that."""

    def __init__(
        self, target: Target, *, settings: FleetSettings, catch_ups: Slots, passes: Slots, metrics: FleetMetrics
    ) -> None:
        self.view = TargetView(target=target)
        self._target = target
        self._settings = settings
        self._catch_ups = catch_ups
        self._passes = passes
        self._metrics = metrics
        self._options = ReconcileOptions(loop_id=target.loop, thresholds=target.thresholds, skip_malformed=True)
        self._pacing = Pacing(poll_seconds=settings.poll_seconds)
        self._feed = Feed()
        self._position = Position()
        self._caught_up = False
        self._due = asyncio.Event()
        self._intents_seen: float | None = None
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Supervises until cancelled. Whatever goes wrong is told in the view and tried again."""
        while True:
            try:
                store = self._target.store()
                with store.locked():
                    await self._supervise(store)
            except OpsError as error:
                self._fail(error)
            except Exception:  # noqa: BLE001  # a bug met in one target must not end the supervision of the others
                _log.exception("a bug", target=self._target.name)
            await asyncio.sleep(self._settings.poll_seconds)

    def look_for_intents(self) -> None:
        """Has the target projected anew if somebody has controlled it. Blocks on the disk, shortly: for any thread."""
        try:
            changed = self._target.store().intents.stat().st_mtime
        except FileNotFoundError:
            changed = 0.0  # nobody has yet
        except (OSError, OpsError):
            return
        if self._intents_seen is not None and changed != self._intents_seen:
            self._loop.call_soon_threadsafe(self._due.set)
        self._intents_seen = changed

    async def _supervise(self, store: LoopStore) -> None:
        """Reads the target by one transport, for good."""
        await asyncio.to_thread(self._resume, store)
        transport = self._target.connect(policy=ONE_TRY)
        try:
            while True:
                await self._stream_once(transport, store)
        finally:
            await transport.close()

    def _resume(self, store: LoopStore) -> None:
        """Goes on where the files say."""
        self._feed = Feed()
        self._position = load_cursor(store.cursor, self._target.loop)
        self.view.state = files.load_if_readable(store.state, "manager_state")
        self.view.received_line = self._position.line
        self._look_at_files(store)

    def _look_at_files(self, store: LoopStore) -> None:
        self.view.health = files.load_if_readable(store.health, "manager_health")
        with contextlib.suppress(InputInvalid):  # no pass can do without that file: the next one tells
            self.view.frozen = load_memory(store).frozen

    async def _stream_once(self, transport: Transport, store: LoopStore) -> None:
        """Streams until it ends, by whatever end, and then does what that asks for."""
        try:
            await self._stream(transport, store)
        except (LogReplaced, LogTruncated, HistoryRewritten) as error:
            _log.warning("another log", target=self._target.name, reason=error.reason)
            if not self._feed.is_overtaken:  # else that is told, and the cursor is in the new log
                self._feed.start_over(error)
                self._position = Position()
        except OpsError as error:
            await self._go_without(transport, store, error)
        else:
            await asyncio.sleep(random.uniform(0, _RENEWAL_JITTER))  # noqa: S311  # spreads load
        if self._feed.is_overtaken:
            await self._go_back(store)
        self.view.reconnects += 1
        self._metrics.reconnected(self._target.name)

    async def _stream(self, transport: Transport, store: LoopStore) -> None:
        query = EventQuery(
            loop_id=self._target.loop,
            after_line=self._position.line,
            resume_token=self._position.resume_token,
            follow=True,
            skip_malformed=True,
        )
        first, slot = True, None
        passing = asyncio.create_task(self._pass_when_due(transport, store))
        try:
            async with contextlib.aclosing(transport.events(query)) as batches:
                async for batch in batches:
                    if self._feed.is_overtaken:
                        return
                    self._take(batch, first=first)
                    first, caught_up = False, batch.caught_up
                    del batch  # not kept while it waits for its turn
                    slot = await self._metered(slot, caught_up=caught_up)
        finally:
            if slot is not None:
                slot.release()
            passing.cancel()
            await asyncio.wait({passing})  # not for its outcome: a cancellation of this task must stay one

    def _take(self, batch: EventBatch, *, first: bool) -> None:
        """Takes what has come; it is handled by the next pass."""
        if first:
            self._reach("stream")
        self._feed.put(batch)
        self._position = self._position.after(batch)
        self._caught_up = batch.caught_up
        view = self.view
        view.contact = time.monotonic()
        view.received_line, view.log_lines = self._position.line, batch.cursor["eventLineCount"]
        if batch.caught_up:
            view.received_line = view.log_lines  # what is left is blank, or was passed over
        if first or batch.events or batch.skipped:
            view.touch()
            self._metrics.received(self._target.name, len(batch.events))
            self._due.set()

    async def _metered(self, slot: Slot | None, *, caught_up: bool) -> Slot | None:
        """Lets so many catch up at once, for the memory; whoever has caught up is free to go on."""
        if caught_up:
            if slot is not None:
                slot.release()
            return None
        if slot is None or slot.is_over:
            return await self._catch_ups.take()
        slot.progress()
        return slot

    async def _pass_when_due(self, transport: Transport, store: LoopStore) -> None:
        """One pass after another: soon after something has come, and now and then if nothing has."""
        while True:
            slow = self._settings.reproject_seconds * random.uniform(0.9, 1.1)  # noqa: S311  # spreads load
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(slow):
                    await self._due.wait()
            if not self._caught_up:
                self._due.clear()  # set again by the batch that ends the catching up
                continue
            self._due.clear()
            try:
                with await self._passes.take():
                    passed = await self._pass(transport, store, self._feed)
            except Exception:  # noqa: BLE001  # nobody waits for this task: its stream would go on without a pass
                _log.exception("a bug", target=self._target.name)
                passed = False
            if passed:
                self._pacing.reached()  # not before: a stream that breaks until then is as good as none
            await asyncio.sleep(self._settings.settle_seconds if passed else self._settings.poll_seconds)

    async def _pass(self, transport: Transport, store: LoopStore, feed: Feed | None) -> bool:
        """Brings the files up to date; whether it could."""
        began = time.monotonic()
        failure: OpsError | None = None
        try:
            self.view.state = await reconcile_held(transport, store, self._options, feed=feed)
        except OpsError as error:
            failure = error
            self.view.error = error
        else:
            self.view.error = None
            self.view.contact = time.monotonic()
        await asyncio.to_thread(self._look_at_files, store)
        self.view.touch()
        self._metrics.passed(self._target.name, time.monotonic() - began, failure)
        return failure is None

    async def _go_without(self, transport: Transport, store: LoopStore, error: OpsError) -> None:
        """Waits for the next try at the stream; reads on a lower rung where that is due."""
        now = time.monotonic()
        self._pacing.lost(now)
        self.view.retries += 1
        self._fail(error)
        is_gone = isinstance(error, NoAnswer)
        answers = not is_gone and not isinstance(error, Draining)  # which is about to be gone: a pass would fail
        known = self.view.state is not None
        asleep = is_gone and await sleeps(self._target.state_command, runs=self.view.runs or not known)
        if asleep:
            self._reach("none", asleep=True)
        elif self._pacing.is_poll_due(now, answers=answers):
            self._pacing.polled(now)
            await self._poll(transport, store)
        elif self.view.reach not in {"unreachable", "starting"}:
            self._reach(self.view.rung if self.view.rung != "stream" else "none")
        await asyncio.sleep(self._pacing.wait(error.retry_after, asleep=asleep))

    async def _poll(self, transport: Transport, store: LoopStore) -> None:
        """One pass without a stream, by the agent or else by the repo itself where that is allowed."""
        with await self._passes.take():
            if await self._pass(transport, store, None):
                self._reach("poll")
            else:
                fallback = self._target.local_fallback()
                if fallback is None or not await self._pass_by(fallback, store):
                    self._reach("none", failed=True)
        await self._go_back(store)

    async def _go_back(self, store: LoopStore) -> None:
        """Gives up what has come and was not handled: the cursor says where to go on."""
        self._feed = Feed()
        self._position = await asyncio.to_thread(load_cursor, store.cursor, self._target.loop)

    async def _pass_by(self, fallback: Target, store: LoopStore) -> bool:
        lower = fallback.connect()
        try:
            passed = await self._pass(lower, store, None)
        finally:
            await lower.close()
        if passed:
            self._reach("local")
        return passed

    def _reach(self, rung: Rung, *, asleep: bool = False, failed: bool = False) -> None:
        """Notes how the target is read now."""
        if rung != "none":
            reach: Reach = "connected"
        else:
            reach = "suspended" if asleep else "unreachable" if failed else "reconnecting"
        if (rung, reach) != (self.view.rung, self.view.reach):
            _log.info("target", target=self._target.name, rung=rung, reach=reach)
            self.view.rung, self.view.reach = rung, reach
            self.view.touch()
        if rung == "stream" or asleep:
            self.view.error = None

    def _fail(self, error: OpsError) -> None:
        self.view.error = error
        self.view.touch()
        self._metrics.failed(self._target.name, error.reason)
        _log.info("lost", target=self._target.name, reason=error.reason, message=error.message)
