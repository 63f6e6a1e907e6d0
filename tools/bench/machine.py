"""What a run was measured on and with: a figure without it is nobody's to compare."""

from __future__ import annotations

import os
import platform
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("grpcio", "protobuf", "msgspec", "orjson", "jsonschema-rs")


def describe(folder: Path) -> dict[str, Any]:
    """Versions, processor, and the file system that `folder` is on."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "sqlite": sqlite3.sqlite_version,
        "kernel": platform.release(),
        "cpu": _cpu(),
        "nproc": len(os.sched_getaffinity(0)),
        "memoryMiB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "fileSystem": _file_system(folder),
    }


def load() -> list[float]:
    """Processes that wanted to run, on average of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """The type of the mount that holds `folder`."""
    place = folder.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(mount), kind) for mount, kind in mounts if place.is_relative_to(mount)]
    return max(holding)[1] if holding else "unknown"
