"""Which addresses count as reachable from this machine only."""

from __future__ import annotations

import pytest

from sprite_agent.contract.addresses import is_local


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:0",
        "127.0.0.1:50051",
        "127.0.0.1:65535",
        "127.8.9.10:50051",
        "localhost:50051",
        "[::1]:50051",
        "unix:/run/agent.sock",
        "unix:agent.sock",
        "unix:///run/agent.sock",
    ],
)
def test_loopback_and_unix_sockets_are_local(address: str) -> None:
    assert is_local(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:50051",
        "[::]:50051",
        "10.0.0.1:50051",
        "192.168.1.1:50051",
        "169.254.0.1:50051",
        "8.8.8.8:50051",
        "[2001:db8::1]:50051",
        "[fe80::1]:50051",
        "[::ffff:8.8.8.8]:50051",
        "example.com:50051",
        "localhost.example.com:50051",
        "127.0.0.1.example.com:50051",
        "127.1:50051",
        "2130706433:50051",
        "0:50051",
        "*:50051",
    ],
)
def test_other_addresses_are_not_local(address: str) -> None:
    assert not is_local(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":",
        "unix:",
        "localhost",
        "127.0.0.1",
        ":50051",
        "127.0.0.1:",
        "127.0.0.1:http",
        "127.0.0.1:-1",
        "127.0.0.1:+1",
        "127.0.0.1: 1",
        "127.0.0.1:1.5",
        "127.0.0.1:65536",
        "127.0.0.1:99999999999999999999",
        "127.0.0.1:\u0663",
        "127.0.0.1:\u00b2",
        "unix-abstract:agent",
        "dns:///localhost",
    ],
)
def test_what_is_no_address_is_said_to_be_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT or unix:PATH|needs a path"):
        is_local(address)


@pytest.mark.parametrize("address", ["::1:50051", "[::1:50051", "::1]:50051"])
def test_an_ipv6_address_needs_its_brackets(address: str) -> None:
    # gRPC takes all of ::1:50051 for an address, and for one that is not loopback.
    try:
        assert not is_local(address)
    except ValueError as error:
        assert "HOST:PORT" in str(error)  # noqa: PT017  # either answer refuses it


@pytest.mark.parametrize("address", ["127.0.0.1\udc80:50051", "unix:/run/\udc80.sock"])
def test_what_is_no_text_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"\\udc80.*' is not valid UTF-8"):
        is_local(address)
