"""micro: microseconds of each step that an event takes from the log to the manager, one thread, nothing around it.

The steps are the project's own functions. What they are called with stands in `_steps`, in
one place: when the hot path changes, this is what changes with it.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from sprite_agent.contract import mirror
from sprite_agent.contract.validation import validate
from sprite_agent.event_log.envelopes import EventContext, build_event
from sprite_agent.event_log.records import RecordReader, judged
from sprite_agent.event_log.stream import MAX_BATCH_EVENTS
from sprite_agent.v1 import service_pb2 as pb
from tools.bench.logs import KINDS, LOOP
from tools.bench.results import Result, figure
from tools.bench.rounds import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.bench.plan import Plan

BATCHES = 20
QUICK_BATCHES = 2
_IMPORTED = "import sys, opsmgr.client, sprite_agent.face.server; print('jsonschema' in sys.modules)"


def run(plan: Plan) -> Result:
    """Every step over the same batches, in random order."""
    figures = []
    for kind in KINDS:
        lines = plan.sized(BATCHES, QUICK_BATCHES) * MAX_BATCH_EVENTS
        text = plan.logs.log(kind, lines).path.read_bytes()
        steps = _steps(text)
        rounds = interleaved(plan, f"micro {kind}", {name: partial(_cost, step, lines) for name, step in steps.items()})
        for name, costs in rounds.items():
            figures.append(figure(f"micro.{kind}.{name}", costs, "µs", text=f"{name}, {kind}"))
    done = subprocess.run([sys.executable, "-c", _IMPORTED], capture_output=True, text=True, check=True, timeout=30)
    slow = int(done.stdout.strip() == "True")
    figures.append(figure("micro.python_jsonschema", slow, text="Python's jsonschema is loaded at run time (1: yes)"))
    return Result(figures=tuple(figures))


def _steps(text: bytes) -> dict[str, Callable[[], object]]:
    """Each step over the whole text; what one needs of those before it is made here, unmeasured."""
    lines = text.splitlines()
    context = EventContext(
        source={"repoPath": "/repo", "loopId": LOOP},
        trace_id=None,
        emitted_at="2026-01-02T03:04:05Z",
        line_count=len(lines),
    )

    def records() -> list[Any]:
        return [judged(record) for record in RecordReader().feed(text) if record is not None]

    def to_messages(envelopes: list[Any]) -> list[pb.StreamEventsResponse]:
        messages = []
        for start in range(0, len(envelopes), MAX_BATCH_EVENTS):
            message = pb.StreamEventsResponse()
            for envelope in envelopes[start : start + MAX_BATCH_EVENTS]:
                mirror.event_to_message(envelope, message.events.add())
            messages.append(message)
        return messages

    def from_messages(messages: list[pb.StreamEventsResponse]) -> list[Any]:
        return [mirror.event_from_message(event) for message in messages for event in message.events]

    def validated(envelopes: list[Any]) -> None:
        for envelope in envelopes:
            validate("loop_run_event", envelope)

    made = records()
    envelopes = [build_event(record, context) for record in made]
    messages = to_messages(envelopes)
    sent = [message.SerializeToString() for message in messages]
    received = from_messages(messages)
    return {
        "orjson.loads": lambda: [orjson.loads(line) for line in lines],
        "split lines": text.splitlines,
        "records, judged": records,
        "envelope, validated": lambda: [build_event(record, context) for record in made],
        "validation alone": lambda: validated(envelopes),
        "mirror to message": lambda: to_messages(envelopes),
        "serialize": lambda: [message.SerializeToString() for message in messages],
        "parse": lambda: [pb.StreamEventsResponse.FromString(data) for data in sent],
        "mirror back": lambda: from_messages(messages),
        "validate back": lambda: validated(received),
    }


def _cost(step: Callable[[], object], events: int) -> float:
    """Microseconds of CPU per event."""
    # A whole log is kept alive here, which no real stream does: the collector would look through it again and again.
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        step()
        return (time.process_time() - began) / events * 1e6
    finally:
        gc.enable()
