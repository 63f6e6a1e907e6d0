"""What the daemon counts, for Prometheus."""

from __future__ import annotations

import time
from collections import Counter as Tally
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from opsmgr.fleet.view import REACHES, RUNGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opsmgr.fleet.view import TargetView
    from sprite_agent.errors import OpsError

_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
_HEALTH = ("healthy", "degraded", "critical")
_BY_TARGET = ("target",)


class FleetMetrics:
    """The counts of one daemon. Lives as long as it; belongs to one event loop, and any thread may collect."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._events = self._counter("events", "Events received, by target.")
        self._reconnects = self._counter("reconnects", "Streams that ended and were opened anew, by target.")
        self._failures = self._counter(
            "stream_failures", "Streams that could not be held, by target and reason.", "target", "reason"
        )
        self._passes = self._counter("passes", "Passes, by target and result.", "target", "result")
        self._pass_seconds = Histogram(
            "opsmgr_pass_seconds", "Time for one pass, in seconds.", buckets=_SECONDS, registry=self.registry
        )

    def watch(self, views: Callable[[], Iterable[TargetView]]) -> None:
        """Collects from `views` as well, whenever it is scraped."""
        self.registry.register(_Views(views))

    def received(self, target: str, events: int) -> None:
        """Counts events of a stream."""
        self._events.labels(target).inc(events)

    def reconnected(self, target: str) -> None:
        """Counts a stream that has ended."""
        self._reconnects.labels(target).inc()

    def failed(self, target: str, reason: str) -> None:
        """Counts a stream that could not be held."""
        self._failures.labels(target, reason).inc()

    def passed(self, target: str, seconds: float, failure: OpsError | None) -> None:
        """Counts a pass."""
        self._passes.labels(target, "success" if failure is None else failure.reason).inc()
        self._pass_seconds.observe(seconds)

    def forget(self, target: str) -> None:
        """Drops the series of a target that is no longer supervised."""
        for counter in (self._events, self._reconnects, self._failures, self._passes):
            counter.remove_by_labels({"target": target})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"opsmgr_{name}", text, labels or _BY_TARGET, registry=self.registry)


class _Views(Collector):
    """Gauges that are read off the targets' views when they are asked for."""

    def __init__(self, views: Callable[[], Iterable[TargetView]]) -> None:
        self._views = views

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See prometheus_client."""
        views, now = list(self._views()), time.monotonic()
        reached = Tally(view.reach for view in views)
        targets = GaugeMetricFamily("opsmgr_targets", "Targets, by whether they can be read.", labels=["reach"])
        for reach in REACHES:
            targets.add_metric([reach], reached[reach])
        yield targets
        for name, text, value in _GAUGES:
            family = GaugeMetricFamily(f"opsmgr_{name}", text, labels=_BY_TARGET)
            for view in views:
                if (found := value(view, now)) is not None:
                    family.add_metric([view.target.name], found)
            yield family
        health = GaugeMetricFamily("opsmgr_target_health", "1 for the health of each.", labels=["target", "status"])
        rungs = GaugeMetricFamily("opsmgr_target_rung", "1 for how each is read.", labels=["target", "rung"])
        reaches = GaugeMetricFamily("opsmgr_target_reach", "1 for whether it can be read.", labels=["target", "reach"])
        for view in views:
            is_now = (view.health or {}).get("status")
            for status in _HEALTH:
                health.add_metric([view.target.name, status], float(status == is_now))
            for rung in RUNGS:
                rungs.add_metric([view.target.name, rung], float(rung == view.rung))
            for reach in REACHES:
                reaches.add_metric([view.target.name, reach], float(reach == view.reach))
        yield health
        yield rungs
        yield reaches


_GAUGES: tuple[tuple[str, str, Callable[[TargetView, float], float | None]], ...] = (
    ("target_up", "1 while a target can be read, else 0.", lambda view, _: float(view.reach == "connected")),
    ("target_lag_lines", "Lines of the log that have not come yet.", lambda view, _: view.behind_lines),
    (
        "target_last_contact_seconds",
        "Seconds since a target answered last.",
        lambda view, now: None if view.contact is None else now - view.contact,
    ),
    ("target_pending_approval", "1 while an approval is pending.", lambda view, _: float(view.awaits_approval)),
    ("target_frozen", "1 while control is frozen.", lambda view, _: float(view.frozen is not None)),
)
