"""What is shown of a run: a table for people, and a document for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from tools.bench.results import Figure, Result, Series

FORMAT = "opsmgr-bench/1"
_COLOURS = {"met": "green", "missed": "red", "not resolved": "yellow"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that one run has found."""

    seed: int
    quick: bool
    machine: dict[str, Any]
    load: dict[str, list[float]]
    """The load average before and after."""
    seconds: dict[str, float]
    """How long each benchmark took."""
    results: dict[str, Result]

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
        "quick": report.quick,
        "seed": report.seed,
        "machine": report.machine,
        "load": report.load,
        "benchmarks": {
            name: {
                "seconds": round(report.seconds[name], 1),
                "figures": {figure.key: _figure(figure, quick=report.quick) for figure in result.figures},
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
    }


def _figure(figure: Figure, *, quick: bool) -> dict[str, Any]:
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
        told["verdict"] = None if quick else figure.verdict
    return told


def table(report: Report) -> Table:
    """Every figure; those with a target first, with what is to be said of it."""
    title = "quick run: it works; the figures say nothing" if report.quick else None
    made = Table("measure", "value", "quartiles", "target", "verdict", title=title)
    for column in made.columns[1:3]:
        column.justify = "right"
    judged = [figure for figure in report.figures if figure.target is not None]
    for figure in (*judged, *(figure for figure in report.figures if figure.target is None)):
        verdict = "" if report.quick or figure.verdict is None else figure.verdict.value
        low, high = figure.spread.quartiles
        many = len(figure.spread.values) > 1
        made.add_row(
            figure.text,
            f"{number(figure.spread.median)} {figure.unit}".rstrip(),
            f"{number(low)} to {number(high)}" if many else "",
            "" if figure.target is None else str(figure.target),
            f"[{_COLOURS[verdict]}]{verdict}" if verdict else "",
            end_section=bool(judged) and figure is judged[-1],
        )
    return made


def number(value: float) -> str:
    """Three digits that count."""
    if value == int(value) or abs(value) >= 100:  # noqa: PLR2004  # from here on the digits before the point suffice
        return f"{value:,.0f}"
    return f"{value:#.3g}"
