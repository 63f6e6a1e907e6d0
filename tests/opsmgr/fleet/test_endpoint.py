"""What the daemon answers over HTTP."""

from __future__ import annotations

import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest

from opsmgr.fleet.endpoint import served
from opsmgr.fleet.metrics import FleetMetrics
from support.waiting import DEADLINE, until


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=DEADLINE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_counts_are_served() -> None:
    metrics = FleetMetrics()
    metrics.received("one", 7)
    with served("127.0.0.1", 0, metrics.registry, lambda: 0.0) as port:
        status, text = get(port, "/metrics")

    assert status == 200
    assert 'opsmgr_events_total{target="one"} 7.0' in text


@pytest.mark.parametrize(("stalled", "status"), [(0.0, 200), (14.0, 200), (15.0, 503)])
def test_a_daemon_in_which_nothing_moves_is_not_healthy(stalled: float, status: int) -> None:
    with served("127.0.0.1", 0, FleetMetrics().registry, lambda: stalled) as port:
        answered, text = get(port, "/healthz")

    said: Any = json.loads(text)
    assert answered == status
    assert said == {"ok": status == 200, "stalledSeconds": stalled}


def test_there_is_nothing_else() -> None:
    with served("127.0.0.1", 0, FleetMetrics().registry, lambda: 0.0) as port:
        assert get(port, "/")[0] == 404


def test_a_connection_that_says_nothing_holds_up_nobody() -> None:
    with (
        served("127.0.0.1", 0, FleetMetrics().registry, lambda: 0.0) as port,
        socket.create_connection(("127.0.0.1", port)),
    ):
        assert get(port, "/healthz")[0] == 200


def test_a_connection_that_is_reset_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with served("127.0.0.1", 0, FleetMetrics().registry, lambda: 0.0) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        get(port, "/healthz")  # which came later
        until(lambda: not any("process_request" in each.name for each in threading.enumerate()), "it is done with")

    assert capsys.readouterr().err == ""


def test_it_is_served_on_ipv6_as_well() -> None:
    with (
        served("::1", 0, FleetMetrics().registry, lambda: 0.0) as port,
        urllib.request.urlopen(f"http://[::1]:{port}/healthz", timeout=DEADLINE) as answer,
    ):
        assert answer.status == 200


def test_the_series_of_a_target_that_is_gone_are_dropped() -> None:
    metrics = FleetMetrics()
    for name in ("one", "other"):
        metrics.received(name, 1)
        metrics.reconnected(name)
    metrics.forget("one")
    with served("127.0.0.1", 0, metrics.registry, lambda: 0.0) as port:
        text = get(port, "/metrics")[1]

    assert 'target="one"' not in text
    assert 'opsmgr_reconnects_total{target="other"} 1.0' in text
