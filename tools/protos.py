"""Generates the code for protos/, and checks that what is committed is current, clean and compatible.

protos.py generate | check | baseline
"""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PROTOS = ROOT / "protos"
BASELINE = PROTOS / "baseline.binpb"
GENERATED = Path("sprite_agent/v1")


def generate(into: Path) -> None:
    """Writes the generated modules and stubs below `into`."""
    _run(
        [
            sys.executable, "-m", "grpc_tools.protoc",
            f"--plugin=protoc-gen-mypy={BIN / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}",
            f"-I{PROTOS}",
            f"--python_out={into}", f"--grpc_python_out={into}",
            f"--mypy_out=quiet:{into}", f"--mypy_grpc_out=quiet:{into}",
            *sorted(str(path) for path in PROTOS.rglob("*.proto")),
        ],
    )  # fmt: skip


def check() -> None:
    """Exits with a message when the protos or the generated code are not as they should be."""
    _run([str(BIN / "buf"), "lint"])
    _run([str(BIN / "buf"), "breaking", "--against", str(BASELINE)])
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        committed = {path.name for path in (ROOT / "src" / GENERATED).glob("*_pb2*")}
        expected = {path.name for path in (Path(fresh) / GENERATED).iterdir()}
        _, different, missing = filecmp.cmpfiles(
            Path(fresh) / GENERATED, ROOT / "src" / GENERATED, expected | committed, shallow=False
        )
    if stale := sorted({*different, *missing}):
        sys.exit(f"protos: generated code is not current: {', '.join(stale)}; run `make protos`")
    print(f"protos: linted, compatible with the baseline, {len(expected)} generated files current")


def baseline() -> None:
    """Records the present protos as the ones later protos must stay compatible with."""
    _run([str(BIN / "buf"), "build", "--exclude-source-info", "-o", str(BASELINE)])


def _run(command: list[str]) -> None:
    if code := subprocess.run(command, cwd=PROTOS, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["generate"]:
            generate(ROOT / "src")
        case ["check"]:
            check()
        case ["baseline"]:
            baseline()
        case _:
            sys.exit(__doc__)
