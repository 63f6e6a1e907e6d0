"""Draws a run: how far each target is reached, and how cost grows. SVG, the same bytes for the same report."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine as _Layout

from tools.bench.report import number
from tools.bench.targets import Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.report import Report
    from tools.bench.results import Figure, Series

_STYLE: Any = {
    "svg.hashsalt": "opsmgr-bench",  # ids in the file are made from it, instead of at random
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": "#424a53",
    "xtick.color": "#424a53",
    "ytick.color": "#424a53",
    "text.color": "#1f2328",
}
_COLOURS = {Verdict.MET: "#2da44e", Verdict.MISSED: "#cf222e", Verdict.NOT_RESOLVED: "#d4a72c"}
_LINE = "#0969da"
_PLAIN = "#8c959f"
_SIGNS = {"<=": "\N{LESS-THAN OR EQUAL TO}", ">=": "\N{GREATER-THAN OR EQUAL TO}", "==": "="}
_COLUMNS = 3
_SHORTEST, _LONGEST = 0.02, 30.0
"""Bars are cut off there, on a scale of powers of ten."""
_WIDTH = 12.0
"""Inches, as all sizes here."""
_BAR, _PANEL, _MARGIN = 0.27, 2.3, 0.9
_SHARES = 4, 2
"""Widths of the bars and of the words beside them."""
_TITLE = 42
"""Characters of a line of a title."""


def draw(report: Report, path: Path) -> None:
    """Writes the chart of what the report has: bars for targets, a panel for each series."""
    judged = [figure for figure in report.figures if figure.target is not None and figure.target.bound > 0]
    rows = -(-len(report.series) // _COLUMNS)
    heights = [_BAR * len(judged) + _MARGIN, _PANEL * rows]
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(_WIDTH, sum(heights)), layout=_Layout(h_pad=0.1, w_pad=0.12))
        panes: Any = canvas.subfigures(2, 1, height_ratios=[height or 0.01 for height in heights])
        above, below = panes
        if judged:
            axes, words = above.subplots(1, 2, sharey=True, width_ratios=_SHARES)
            _bars(axes, words, judged, verdicts=report.has_verdicts)
        if rows:
            grid = below.add_gridspec(rows, _COLUMNS)
            for place, series in enumerate(report.series):
                _grows(below.add_subplot(grid[place]), series)
        canvas.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def _bars(axes: Any, words: Any, figures: list[Figure], *, verdicts: bool) -> None:
    """One bar for each target: how large what was measured is, as a part of the bound; beside it, in words."""
    words.axis("off")
    for row, figure in enumerate(figures):
        target = figure.target
        assert target is not None  # noqa: S101  # the caller has chosen them by it
        parts = [value / target.bound for value in (figure.spread.median, *figure.spread.quartiles)]
        median, low, high = (min(max(part, _SHORTEST), _LONGEST) for part in parts)
        verdict = figure.verdict if verdicts else None
        colour = _PLAIN if verdict is None else _COLOURS[verdict]
        axes.barh(row, median - _SHORTEST, left=_SHORTEST, height=0.62, color=colour)
        axes.plot([low, high], [row, row], color="#1f2328", linewidth=1.2, solid_capstyle="butt")
        beside = {"y": row, "va": "center", "fontsize": 8}
        words.text(0.0, s=f"{number(figure.spread.median)} {figure.unit}".rstrip(), **beside)
        words.text(0.43, s=f"{_SIGNS.get(target.relation, target.relation)} {target.bound:,g}", **beside)
        if verdict is not None:
            words.text(0.72, s=verdict.value, color=colour, fontweight="bold", **beside)
    axes.axvline(1, color="#1f2328", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(_SHORTEST, _LONGEST)
    ticks = [0.1, 0.5, 1, 2, 10]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(figures)), [_label(figure) for figure in figures], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.set_xlabel("measured / target, with quartiles; 1 is the target")


def _label(figure: Figure) -> str:
    """The text of a figure, and where the good side is not the left one, that."""
    at_least = figure.target is not None and figure.target.relation == ">="
    return f"{figure.text} (more is better)" if at_least else figure.text


def _grows(axes: Any, series: Series) -> None:
    """One series, from nothing upwards, over a scale of powers of ten."""
    across = [point[0] for point in series.points]
    up = [point[1] for point in series.points]
    axes.plot(across, up, color=_LINE, marker="o", markersize=4, linewidth=1.6)
    for x, y in series.points:
        axes.annotate(number(y), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(across) / 2, max(across) * 2)
    axes.set_xticks(across, [f"{x:,.0f}" for x in across])
    axes.minorticks_off()
    axes.set_ylim(0, max(up) * 1.25)
    axes.set_xlabel(series.across)
    axes.set_ylabel(series.unit)
    axes.set_title(textwrap.fill(series.text, _TITLE), loc="left", fontsize=9, fontweight="bold")
