"""docs/metrics.md names the metrics that there are, and its rules and the dashboard use no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsmgr.fleet.metrics import FleetMetrics
from sprite_agent.face.metrics import AgentMetrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import CollectorRegistry, Metric

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "metrics.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
ROW = re.compile(r"^\| `([a-z_]+)` \|", re.MULTILINE)
RULE = re.compile(r"^ *- alert: (\w+)\n *expr: (.+)$", re.MULTILINE)


def section(heading: str) -> str:
    """The text below a heading."""
    return TEXT.partition(f"\n## {heading}")[2].partition("\n## ")[0]


def families(registry: CollectorRegistry) -> dict[str, Metric]:
    """The metrics of a registry, by the names that a query has for them."""
    return {f"{one.name}_total" if one.type == "counter" else one.name: one for one in registry.collect()}


def manager() -> dict[str, Metric]:
    metrics = FleetMetrics()
    metrics.watch(list)
    return families(metrics.registry)


def agent() -> dict[str, Metric]:
    return families(AgentMetrics().registry)


def process() -> dict[str, Metric]:
    return {name: one for name, one in (manager() | agent()).items() if name.startswith("process_")}


ALL = {"The manager": manager, "The agent": agent, "The process": process}


@pytest.mark.parametrize("heading", ALL)
def test_a_program_s_metrics_are_described_and_no_others(heading: str) -> None:
    there = {name for name in ALL[heading]() if heading == "The process" or not name.startswith("process_")}

    assert set(ROW.findall(section(heading))) == there


@pytest.mark.parametrize("heading", ALL)
def test_a_metric_is_described_as_the_kind_that_it_is(heading: str) -> None:
    there = ALL[heading]()
    rows = [line for line in section(heading).splitlines() if ROW.match(line)]

    assert rows
    for row in rows:
        assert f"| {there[row.split('`')[1]].type} |" in row


def in_use(expressions: Iterable[str]) -> set[str]:
    """The metrics that expressions are about; a histogram's by its own name."""
    histograms = {name for each in ALL.values() for name, one in each().items() if one.type == "histogram"}
    found: set[str] = set()
    for expression in expressions:
        words = re.findall(r"\b(?:opsmgr|sprite_agent|process)_[a-z_]+", re.sub(r'"[^"]*"', '""', expression))
        assert words, f"no metric of ours in {expression}"
        found |= {re.sub(r"_(bucket|sum|count)$", "", word) if word not in histograms else word for word in words}
    return found


def test_the_rules_use_described_metrics_only() -> None:
    rules = RULE.findall(TEXT)

    assert len(rules) == TEXT.count("- alert:") > 0
    assert in_use(expression for _, expression in rules) <= set(ROW.findall(TEXT))


def test_each_rule_is_named_by_the_metrics_that_it_uses() -> None:
    named = {
        (name, rule) for row in TEXT.splitlines() for name in ROW.findall(row) for rule in re.findall(r"\*(\w+)\*", row)
    }
    rules = dict(RULE.findall(TEXT))

    assert {rule for _, rule in named} == set(rules)
    for name, rule in named:
        assert name in in_use([rules[rule]])


# The dashboard.


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_the_dashboard_uses_described_metrics_only() -> None:
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    expressions += [one["definition"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]

    assert in_use(expressions) <= set(ROW.findall(TEXT))


def test_the_dashboard_asks_whichever_source_was_chosen() -> None:
    (source,) = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource"]

    assert source["query"] == "prometheus"
    assert {panel["datasource"]["uid"] for panel in panels()} == {f"${{{source['name']}}}"}


def test_the_dashboard_can_be_imported_with_panels_that_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]

    assert len(set(numbers)) == len(numbers)
    assert DASHBOARD["id"] is None
    assert DASHBOARD["schemaVersion"] >= 39
