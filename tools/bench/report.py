"""What is shown of a run: a table for people, and a document for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tools.bench.plan import Size

if TYPE_CHECKING:
    from tools.bench.results import Figure, Result, Series

FORMAT = "opsmgr-bench/1"
_COLOURS = {"met": "green", "missed": "red", "not resolved": "yellow", "kept": "green", "broken": "red"}
_TITLES = {
    Size.QUICK: "quick run: it works; the figures say nothing",
    Size.GATE: "gates, with shorter logs and fewer rounds than the targets are for",
    Size.FULL: None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that one run has found."""

    seed: int
    size: Size
    machine: dict[str, Any]
    load: dict[str, list[float]]
    """The load average before and after."""
    seconds: dict[str, float]
    """How long each benchmark took."""
    results: dict[str, Result]
    failures: dict[str, str] = field(default_factory=dict)
    """Why a benchmark has no result."""

    @property
    def has_verdicts(self) -> bool:
        """Whether it was thorough enough to say that a target is met or missed."""
        return self.size is Size.FULL

    @property
    def figures(self) -> list[Figure]:
        """Those of all benchmarks."""
        return [figure for result in self.results.values() for figure in result.figures]

    @property
    def series(self) -> list[Series]:
        """Those of all benchmarks."""
        return [series for result in self.results.values() for series in result.series]


def document(report: Report) -> dict[str, Any]:
    """The report as a JSON document."""
    return {
        "format": FORMAT,
        "size": report.size,
        "seed": report.seed,
        "machine": report.machine,
        "load": report.load,
        "benchmarks": {
            name: {
                "seconds": round(report.seconds[name], 1),
                "figures": {figure.key: _figure(figure, report.size) for figure in result.figures},
                "series": {
                    series.key: {
                        "text": series.text,
                        "across": series.across,
                        "unit": series.unit,
                        "points": [list(point) for point in series.points],
                    }
                    for series in result.series
                },
                "notes": result.notes,
            }
            for name, result in report.results.items()
        },
        "failures": report.failures,
    }


def _figure(figure: Figure, size: Size) -> dict[str, Any]:
    low, high = figure.spread.quartiles
    told: dict[str, Any] = {
        "text": figure.text,
        "unit": figure.unit,
        "median": figure.spread.median,
        "quartiles": [low, high],
        "values": list(figure.spread.values),
    }
    if figure.target is not None:
        told["target"] = {"relation": figure.target.relation, "bound": figure.target.bound}
        told["noise"] = figure.noise
        told["verdict"] = figure.verdict if size is Size.FULL else None
        if size is Size.GATE and figure.target.margin is not None:
            told["gate"] = {"margin": figure.target.margin, "kept": figure.target.keeps_gate(figure.spread)}
    return told


def table(report: Report) -> Table:
    """Every figure; those with a target first, with what is to be said of it."""
    aim, said = ("gate", "") if report.size is Size.GATE else ("target", "verdict")
    made = Table("measure", "value", "quartiles", aim, said, title=_TITLES[report.size])
    for column in made.columns[1:3]:
        column.justify = "right"
    rows = [(figure, *_judgement(figure, report.size)) for figure in report.figures]
    judged = [row for row in rows if row[1]]
    for row in (*judged, *(row for row in rows if not row[1])):
        figure, bound, word = row
        low, high = figure.spread.quartiles
        many = len(figure.spread.values) > 1
        made.add_row(
            figure.text,
            f"{number(figure.spread.median)} {figure.unit}".rstrip(),
            f"{number(low)} to {number(high)}" if many else "",
            bound,
            f"[{_COLOURS[word]}]{word}" if word else "",
            end_section=bool(judged) and row is judged[-1],
        )
    return made


def _judgement(figure: Figure, size: Size) -> tuple[str, str]:
    """What the figure should be in a run of this size, and whether it is; empty where that is not said."""
    target = figure.target
    if target is None:
        return "", ""
    if size is Size.GATE:
        return target.gate, ("kept" if target.keeps_gate(figure.spread) else "broken") if target.gate else ""
    return str(target), figure.verdict or "" if size is Size.FULL else ""


def number(value: float) -> str:
    """Three digits that count."""
    if value == int(value) or abs(value) >= 100:  # noqa: PLR2004  # from here on the digits before the point suffice
        return f"{value:,.0f}"
    return f"{value:#.3g}"
