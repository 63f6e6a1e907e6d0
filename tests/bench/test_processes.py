"""The processes of a run: what is known of them, and that they end."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from support.waiting import until
from tools.bench.processes import Worker, cpu_seconds, memory, peak_memory


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_cpu_of_a_process_is_known_as_finely_as_it_knows_it_itself() -> None:
    before, began = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - began < 0.1:
        pass
    assert cpu_seconds(os.getpid()) - before == pytest.approx(time.process_time() - began, abs=0.03)


def test_a_worker_is_another_process_whose_memory_is_known() -> None:
    with Worker() as worker:
        worker.call(asyncio.sleep, 0)

        assert worker.pid != os.getpid()
        assert 0 < memory(worker.pid) <= peak_memory(worker.pid)


def test_a_worker_that_takes_too_long_is_ended_with_its_block() -> None:
    with Worker() as worker:
        with pytest.raises(TimeoutError):
            worker.call(asyncio.sleep, 30, patience=0.1)
        pid = worker.pid

    until(lambda: not is_there(pid), "the worker has ended")
