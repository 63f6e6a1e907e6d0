"""`opsmgr run`: the supervisor as a process: its config, its signals, its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from typing import TYPE_CHECKING

import structlog

from opsmgr.config import load_config
from opsmgr.errors import InputInvalid, LoopLocked
from opsmgr.fleet.endpoint import served
from opsmgr.fleet.metrics import FleetMetrics
from opsmgr.fleet.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opsmgr.config import Config

_log = structlog.get_logger("opsmgr.fleet")


async def run(config: Config) -> None:
    """Supervises the targets of `config` until SIGTERM or SIGINT; SIGHUP reads its file anew.

    Settings of the daemon itself count from its next start on; targets at once.

    Raises:
        LoopLocked: another one is at work with the same status file.
        InputInvalid: the address for metrics can't be had.
    """
    loop = asyncio.get_running_loop()
    ended, changed = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGHUP, changed.set)
    metrics = FleetMetrics()
    supervisor = Supervisor(config.fleet, metrics)
    with _alone(config.fleet.status_file), _endpoint(config, metrics, supervisor):
        _log.info("supervising", targets=len(config.targets), config=str(config.path))
        running = asyncio.create_task(supervisor.run())
        reloading = asyncio.create_task(_reload(config, supervisor, changed))
        try:
            await asyncio.wait(
                [running, reloading, asyncio.create_task(ended.wait())], return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            _log.info("draining")
            for task in (reloading, running):
                task.cancel()
            done = await asyncio.gather(reloading, running, return_exceptions=True)
    for error in done:
        if isinstance(error, Exception):
            raise error
    _log.info("ended")


async def _reload(config: Config, supervisor: Supervisor, changed: asyncio.Event) -> None:
    """Supervises what the file says, each time that it is to be read; a file with a mistake changes nothing."""
    path: Path = config.path
    await supervisor.supervise(config.targets)
    while True:
        await changed.wait()
        changed.clear()
        try:
            config = await asyncio.to_thread(load_config, path)
        except InputInvalid as error:
            _log.error("the config is not taken", error=error.message)
            continue
        await supervisor.supervise(config.targets)
        _log.info("supervising", targets=len(config.targets), config=str(path))


@contextlib.contextmanager
def _alone(status_file: Path) -> Iterator[None]:
    """Keeps a second daemon from telling other things in the same file."""
    lock_file = status_file.parent / f".{status_file.name}.lock"
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputInvalid(f"{lock_file} can't be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(lock, 20, 0).decode(errors="replace").strip()
            raise LoopLocked(f"process {pid} supervises already, with the status file {status_file}") from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _endpoint(config: Config, metrics: FleetMetrics, supervisor: Supervisor) -> Iterator[None]:
    address = config.fleet.metrics
    if address is None:
        yield
        return
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        try:
            had = stack.enter_context(
                served(host.strip("[]"), int(port), metrics.registry, lambda: supervisor.stalled_seconds)
            )
        except OSError as error:
            raise InputInvalid(f"metrics can't be served on {address}: {error.strerror}") from error
        _log.info("metrics", address=f"http://{host}:{had}/metrics")
        yield
