"""What the agent counts, for Prometheus: a registry of its own, served over HTTP on a port of its own."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

if TYPE_CHECKING:
    from collections.abc import Iterator

_STREAMS = frozenset({"StreamEvents", "Watch", "ServerReflectionInfo"})
"""Methods whose calls last as long as their callers please."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class StreamLag:
    """How far one stream is behind its log. Lives as long as the stream."""

    def __init__(self) -> None:
        self.lines = 0
        self._behind_since: float | None = None

    def sent(self, *, lines_left: int, caught_up: bool) -> None:
        """Notes how much of the log was left when a batch was sent."""
        self.lines = 0 if caught_up else lines_left
        if caught_up:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = time.monotonic()

    @property
    def seconds(self) -> float:
        """For how long it has not been caught up."""
        return 0.0 if self._behind_since is None else time.monotonic() - self._behind_since


class AgentMetrics:
    """The counts of one agent. Lives as long as its server; any thread may call."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._lags: set[StreamLag] = set()
        self._rpcs = Counter(
            "sprite_agent_rpcs", "Calls answered, by method and gRPC code.", ("method", "code"), registry=self.registry
        )
        self._seconds = Histogram(
            "sprite_agent_rpc_seconds",
            "Time to answer a unary call, in seconds.",
            ("method",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "sprite_agent_refusals", "Calls refused, by reason.", ("reason",), registry=self.registry
        )
        self._controls = Counter(
            "sprite_agent_controls",
            "Controls answered, by intent, status and whether the answer was recorded before.",
            ("intent", "status", "replayed"),
            registry=self.registry,
        )
        self._events = Counter("sprite_agent_events_sent", "Events sent, on all streams.", registry=self.registry)
        self._skipped = Counter(
            "sprite_agent_records_skipped", "Malformed records passed over.", registry=self.registry
        )
        for name, text, value in (
            ("streams_open", "Streams open.", lambda: len(self._lags)),
            ("lag_lines", "Lines of the log that the stream furthest behind has not been sent.", self._most_lines),
            ("lag_seconds", "Seconds for which the stream furthest behind has not been caught up.", self._most_seconds),
        ):
            Gauge(f"sprite_agent_{name}", text, registry=self.registry).set_function(value)
        self.control_serving = Gauge(
            "sprite_agent_control_serving", "1 while control can be served, else 0.", registry=self.registry
        )

    def answered(self, method: str, code: str, seconds: float) -> None:
        """Counts a call."""
        self._rpcs.labels(method, code).inc()
        if method not in _STREAMS:
            self._seconds.labels(method).observe(seconds)

    def refused(self, reason: str) -> None:
        """Counts a refusal, before or after its caller was known."""
        self._refusals.labels(reason).inc()

    def controlled(self, intent: str, status: str | None, *, replayed: bool) -> None:
        """Counts a control that was answered with a result."""
        self._controls.labels(intent, status or "unfinished", str(replayed).lower()).inc()

    def sent(self, *, events: int, skipped: int) -> None:
        """Counts what a batch carried."""
        if events:
            self._events.inc(events)
        if skipped:
            self._skipped.inc(skipped)

    @contextlib.contextmanager
    def stream(self) -> Iterator[StreamLag]:
        """Counts a stream for as long as the block runs."""
        lag = StreamLag()
        self._lags.add(lag)
        try:
            yield lag
        finally:
            self._lags.discard(lag)

    @contextlib.contextmanager
    def served(self, host: str, port: int) -> Iterator[int]:
        """Serves the counts over HTTP inside the block; gives the port, which is a free one for 0.

        Raises:
            OSError: the address can't be had.
        """
        server, thread = start_http_server(port, host, registry=self.registry)
        try:
            yield int(server.server_port)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _most_lines(self) -> int:
        return max((lag.lines for lag in self._lags.copy()), default=0)

    def _most_seconds(self) -> float:
        return max((lag.seconds for lag in self._lags.copy()), default=0.0)
