"""What `make check` holds to: a target with a margin, and a figure for it.

Each benchmark that has gates runs at a size of its own for them. `python -m tools.bench --gate` shows the same
in a table, with everything else that was measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.figures import found
from tools.bench.gates import GATED, Gate, gates
from tools.bench.logs import LogStore
from tools.bench.measuring import BENCHMARKS
from tools.bench.plan import Plan, Size
from tools.bench.results import Result, figure
from tools.bench.spreads import spread
from tools.bench.targets import TARGETS, Target

if TYPE_CHECKING:
    from tools.bench.targets import Relation

SEED = 5


@pytest.mark.alone
@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", GATED)
def test_every_figure_keeps_its_gate(name: str) -> None:
    # Its logs are large, and pytest would keep them for a while.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        plan = Plan(seed=SEED, size=Size.GATE, folder=place, logs=LogStore(place, SEED), say=lambda _: None)
        judged = gates(name, BENCHMARKS[name](plan))

    for gate in judged:
        found("gate", str(gate))
    assert [str(gate) for gate in judged if not gate.kept] == []


@pytest.mark.parametrize(
    ("relation", "margin", "kept", "broken"),
    [("<=", 2, 20, 20.1), ("<", 2, 19.9, 20), (">=", 2, 5, 4.9), ("==", 1, 10, 11), ("<=", 1, 10, 10.1)],
)
def test_a_margin_lets_a_figure_miss_its_bound_so_many_times(
    relation: Relation, margin: float, kept: float, broken: float
) -> None:
    target = Target(key="replay.k", text="", relation=relation, bound=10, margin=margin)

    assert target.keeps_gate(spread([kept]))
    assert not target.keeps_gate(spread([broken]))


def test_rounds_that_were_disturbed_break_no_gate_but_those_that_all_got_worse_do() -> None:
    target = Target(key="live.k", text="p50", relation="<=", bound=6, margin=2)

    assert target.keeps_gate(spread([5, 6, 19, 20, 108]))
    assert not target.keeps_gate(spread([12, 13, 13, 14, 14]))
    assert str(Gate(target=target, found=spread([12, 13, 13.5, 14, 14]))) == (
        "live.k (p50): 13.5 (13 to 14); its gate is <= 12"
    )


def test_no_round_may_lose_a_line() -> None:
    assert not Target(key="live.k", text="", relation="==", bound=0, margin=1).keeps_gate(spread([0, 0, 0, 1]))


def test_a_gate_is_worded_with_its_margin_and_a_target_without_margin_has_none() -> None:
    assert Target(key="k", text="", relation="<=", bound=18, unit="ms", margin=2).gate == "<= 36 ms"
    assert Target(key="k", text="", relation=">=", bound=0.15, margin=2).gate == ">= 0.075"
    assert Target(key="k", text="", relation="<=", bound=18).gate == ""


def test_a_broken_gate_is_told_with_figure_value_and_bound() -> None:
    target = Target(key="live.lost", text="live: lines lost", relation="==", bound=0, unit="lines", margin=1)

    assert (
        str(Gate(target=target, found=spread([3]))) == "live.lost (live: lines lost): 3 lines; its gate is == 0 lines"
    )


def test_a_gate_whose_figure_was_not_measured_is_broken() -> None:
    everything = Result(figures=tuple(figure(target.key, target.bound) for target in TARGETS))
    less = Result(figures=tuple(each for each in everything.figures if each.key != "control.executions"))

    assert [gate.target.key for gate in gates("control", everything) if not gate.kept] == []
    assert [str(gate) for gate in gates("control", less) if not gate.kept] == [
        "control.executions (one key sent 16 times at once: executions): not measured; its gate is == 1"
    ]


def test_what_noise_moves_has_no_gate() -> None:
    measured_in = {target.unit for target in TARGETS if target.margin is not None}

    assert measured_in == {"", "lines", "MB", "KiB"}
