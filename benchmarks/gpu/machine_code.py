"""Reads from a compiled kernel what it takes of a multiprocessor and which instructions it is made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from .verdict import INSTRUCTIONS, Measured

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def measured(kernel: Any, has_tensor_code: bool) -> Measured:
    """`kernel`: Triton's CompiledKernel. Without `has_tensor_code` its instructions are not read, which would take as
    long as to compile it: what asks for no product and no copy of tiles gets none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        use = _said("cuobjdump", "-res-usage", file.name)
        code = _said("nvdisasm", "-c", "-ndf", file.name) if has_tensor_code else ""
    return Measured(
        registers=_number(use, "REG"),
        spill_bytes=_number(use, "STACK") + _number(use, "LOCAL"),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,  # with those that specialisation adds
        instructions={name: len(re.findall(rf"\s{name}[.\s]", code)) for name in INSTRUCTIONS},
    )


def _said(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _number(use: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", use)
    assert found, f"cuobjdump said no {name}: {use[:200]}"
    return int(found.group(1))
