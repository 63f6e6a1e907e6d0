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
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from sprite_agent.contract import mirror
from sprite_agent.contract.events import EventContext, build_event, check_event
from sprite_agent.contract.json_text import object_in
from sprite_agent.contract.validation import validate
from sprite_agent.event_log.records import RecordReader
from sprite_agent.v1 import service_pb2 as pb
from tools.bench.floors import BATCH_LINES
from tools.bench.logs import KINDS, LOOP
from tools.bench.results import Result, figure
from tools.bench.rounds import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sprite_agent.event_log.records import Record
    from tools.bench.plan import Plan

_T = TypeVar("_T")

BATCHES = 20
QUICK_BATCHES = 2
_IMPORTED = "import sys, opsmgr.client, sprite_agent.face.server; print('jsonschema' in sys.modules)"


def run(plan: Plan) -> Result:
    """Every step over the same batches, in random order."""
    figures = []
    for kind in KINDS:
        lines = plan.sized(BATCHES, QUICK_BATCHES) * BATCH_LINES
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

    def records() -> list[Record]:
        return [record for record in RecordReader(judges=True).feed(text) if record is not None]

    def built() -> list[Any]:
        return [build_event(value, told, line, context) for value, told, line in raw]

    def raw_messages() -> list[pb.StreamEventsResponse]:
        messages = []
        for batch in batched(raw):
            messages.append(message := pb.StreamEventsResponse())
            for _, told, line in batch:
                event = message.raw_events.add()
                event.line = line
                event.json = told
        return messages

    def mirrored() -> list[pb.StreamEventsResponse]:
        messages = []
        for batch in batched(envelopes):
            messages.append(message := pb.StreamEventsResponse())
            for envelope in batch:
                mirror.event_to_message(envelope, message.events.add())
        return messages

    raw = [(object_in(line), line.decode(), number) for number, line in enumerate(lines, 1)]
    envelopes = built()
    messages, mirrors = raw_messages(), mirrored()
    sent = [message.SerializeToString() for message in messages]
    return {
        "floor: orjson.loads": lambda: [orjson.loads(line) for line in lines],
        "floor: split lines": text.splitlines,
        "agent: records, judged": records,
        "agent: build and validate": lambda: [check_event(value, line, context) for value, _, line in raw],
        "agent: raw to message": raw_messages,
        "agent: serialize": lambda: [message.SerializeToString() for message in messages],
        "manager: parse": lambda: [pb.StreamEventsResponse.FromString(data) for data in sent],
        "manager: JSON of raw": lambda: [object_in(raw.json) for message in messages for raw in message.raw_events],
        "manager: build and validate": built,
        "of that, validation": lambda: [validate("loop_run_event", envelope) for envelope in envelopes],
        "not raw: mirror to message": mirrored,
        "not raw: mirror back": lambda: [
            mirror.event_from_message(event) for message in mirrors for event in message.events
        ],
    }


def batched(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The items, as many at a time as a message has."""
    for start in range(0, len(items), BATCH_LINES):
        yield items[start : start + BATCH_LINES]


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
