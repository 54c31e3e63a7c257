"""Runs one section of the GPU script; each row goes into a file of JSON lines when it is begun and when it is done.

python -m braid.benchmarks.gpu.section checks --rows FILE [--device cuda] [--shapes v3] [--seconds 60]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from braid.kernels.gpu.gemm import set_descriptor_memory

from . import ceilings, checks, invariance, layers, mail, network, rivals, sanitizer, speed
from .setting import Row, Section, Setting
from .sizes import MODELS

SECTIONS: dict[str, Section] = {
    "ceilings": ceilings.measure,
    "checks": checks.check,
    "invariance": invariance.probe,
    "speed": speed.measure,
    "layers": layers.measure,
    "rivals": rivals.measure,
    "sanitizer": sanitizer.check,
    "mail": mail.check,
    "network": network.check,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", choices=MODELS, default="v3")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rivals", type=Path)
    parser.add_argument("--skip", type=int, default=0, help="rows that are not to be begun again")
    parser.add_argument("--row-seconds", type=float, help="end the process when a row takes longer")
    args = parser.parse_args(arguments)
    set_descriptor_memory(torch.device(args.device))
    stop_at = time.monotonic() + args.seconds
    with args.rows.open("a") as file:

        def tell(row: Row) -> None:
            print(json.dumps(row), file=file, flush=True)

        def begin(name: str) -> None:
            tell({"name": name, "failed": "it ended its process"})

        more = args.rivals, args.skip, begin, args.row_seconds
        for row in SECTIONS[args.section](Setting(torch.device(args.device), args.shapes, stop_at, *more)):
            tell(row)


if __name__ == "__main__":
    main()
