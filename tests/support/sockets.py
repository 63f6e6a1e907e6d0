"""Connections to gRPC addresses, on which nothing was said yet."""

from __future__ import annotations

import asyncio


async def dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to HOST:PORT or unix:PATH."""
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))
