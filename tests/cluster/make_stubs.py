"""Writes the gRPC stubs of cluster/braid_v1.proto: `python tests/cluster/make_stubs.py [OUT_DIR]`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


def make_stubs(out: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        # the virtual path braid/cluster makes the generated files import each other as braid.cluster.*
        paths = [f"-Ibraid/cluster={CLUSTER}", f"--python_out={made}", f"--pyi_out={made}", f"--grpc_python_out={made}"]
        command = [sys.executable, "-m", "grpc_tools.protoc", *paths, "braid/cluster/braid_v1.proto"]
        subprocess.run(command, check=True, timeout=60, cwd=made)
        for file in sorted(Path(made, "braid", "cluster").iterdir()):
            (out / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    make_stubs(Path(sys.argv[1]) if len(sys.argv) > 1 else CLUSTER)
