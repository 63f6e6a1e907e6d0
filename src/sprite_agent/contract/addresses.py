"""Which addresses can be reached from this machine only."""

from __future__ import annotations

import ipaddress

MAX_PORT = 65535


def is_local(address: str) -> bool:
    """Whether a gRPC address (HOST:PORT or unix:PATH) is a Unix socket or on loopback.

    Raises:
        ValueError: it is neither HOST:PORT nor unix:PATH.
    """
    if address.startswith("unix:"):
        if address == "unix:":
            raise ValueError("'unix:' needs a path, as in unix:/run/sprite-agent/agent.sock")
        return True
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise ValueError(f"{address!r} is not HOST:PORT or unix:PATH")
    name = host.removeprefix("[").removesuffix("]")
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
