"""Which addresses can be reached from this machine only."""

from __future__ import annotations

import ipaddress
import re

MAX_PORT = 65535

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:\s/]+)):(?P<port>[0-9]{1,5})")


def is_local(address: str) -> bool:
    """Whether a gRPC address (HOST:PORT or unix:PATH) is a Unix socket or on loopback.

    Raises:
        ValueError: it is neither HOST:PORT nor unix:PATH, or no text.
    """
    try:
        address.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{address!a} is not valid UTF-8") from error
    if address.startswith("unix:"):
        if address == "unix:":
            raise ValueError("'unix:' needs a path, as in unix:/run/sprite-agent/agent.sock")
        return True
    match = _HOST_PORT.fullmatch(address)
    if match is None or int(match["port"]) > MAX_PORT:
        raise ValueError(
            f"{address!r} is not HOST:PORT or unix:PATH; an IPv6 address stands in brackets, as in [::1]:PORT"
        )
    try:
        return match["name"] == "localhost" or ipaddress.ip_address(match["v6"] or match["name"]).is_loopback
    except ValueError:
        return False
