"""Which limits of a Hopper multiprocessor a compiled kernel breaks: numbers in, reasons out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_SHARED_BYTES = 232448  # a block's, of 228 KiB
MAX_REGISTERS = 65536  # of a multiprocessor, 32 threads a warp
INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "UTMALDG")
WARP_GROUP_PRODUCT = {"f8E4M3FN": "QGMMA", "bf16": "HGMMA"}


@dataclass(frozen=True, slots=True)
class Measured:
    """`registers` a thread, `spill_bytes` a thread's stack, `warps` with those that only load; counts in the code."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    instructions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a kernel's source asks for: the operand types of its products (MLIR's names), and tensor copies."""

    products: frozenset[str]
    copies_tiles: bool

    @property
    def has_tensor_code(self) -> bool:
        return bool(self.products) or self.copies_tiles


def asked(ttir: str) -> Asked:
    """`ttir`: Triton's own intermediate form, before it has chosen instructions."""
    products = re.findall(r"= tt\.dot .*? : tensor<(?:\d+x)+(\w+)> \*", ttir)
    return Asked(frozenset(products), "tt.descriptor_load" in ttir)


def broken_limits(measured: Measured, asked: Asked) -> list[str]:
    """Empty where the kernel is as it must be."""
    reasons = []
    if measured.spill_bytes:
        reasons.append(f"spills {measured.spill_bytes} bytes a thread; take smaller tiles or more warps")
    if measured.shared_bytes > MAX_SHARED_BYTES:
        reasons.append(f"needs {measured.shared_bytes} bytes of shared memory of {MAX_SHARED_BYTES}; take fewer stages")
    registers = measured.registers * 32 * measured.warps
    if registers > MAX_REGISTERS:
        reasons.append(f"needs {registers} registers of {MAX_REGISTERS}; take smaller tiles or fewer warps")
    wanted = {WARP_GROUP_PRODUCT[product] for product in asked.products if product in WARP_GROUP_PRODUCT}
    if asked.copies_tiles:
        wanted.add("UTMALDG")
    reasons += [f"has no {name}" for name in sorted(wanted) if not measured.instructions.get(name)]
    # one instruction family a kernel, or two tiles of it round differently; and HMMA on fp8 is fp16, and slow
    if wanted & {"QGMMA", "HGMMA"} and measured.instructions.get("HMMA"):
        reasons.append("multiplies by HMMA, not by warp groups; give the weights' side 64 rows and the tokens' 16")
    return reasons


def told_too_early(ptx: str) -> list[str]:
    """Empty where a word that other processors acquire is released behind a barrier of the block: without one it tells
    of the stores of one thread only, which no interpreter shows."""
    has_stored, reasons = False, []
    for found in re.finditer(r"\b(?:bar\.sync|st\.release\.sys|st\.global)\b", ptx):
        if found[0] == "st.release.sys" and has_stored:
            reasons.append("releases a word while other threads may still store; put a barrier before it")
        has_stored = found[0] == "st.global"
    return reasons
