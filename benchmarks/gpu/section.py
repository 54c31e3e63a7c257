"""Runs one section of the GPU script and writes its rows as lines of JSON while they come.

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
from .setting import Section, Setting
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
    args = parser.parse_args(arguments)
    set_descriptor_memory(torch.device(args.device))
    setting = Setting(torch.device(args.device), args.shapes, time.monotonic() + args.seconds, args.rivals)
    with args.rows.open("w") as file:
        for row in SECTIONS[args.section](setting):
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main()
