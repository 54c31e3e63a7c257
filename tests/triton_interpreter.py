"""Repairs Triton's interpreter, which is silently wrong about bf16 and fp8, and refuses scalars of a newer numpy.

Its products of bf16 operands multiply the raw bits, fp32 -> bf16 truncates, fp32 -> e4m3 loses carries and wraps. Here
operands become fp32 first, and casts are torch's: to nearest, ties to even, e4m3 saturating as the GPU's. Arithmetic on
bf16 tensors stays wrong: kernels widen right after each load. Poisoned and odd sizes are the tests' business.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is declared: import this before the first of them

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
E4M3_MAX = 448.0

convert_before = interpreter._convert_float
patch_before = interpreter._patch_lang_tensor


def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source not in TORCH or target not in TORCH:
        return convert_before(data, source, target, rounding)
    width = source.primitive_bitwidth // 8
    bits = np.array(data, order="C").view(UNSIGNED[width])
    values = torch.from_numpy(bits.view(f"int{8 * width}")).view(TORCH[source])
    if target == tl.float8e4nv:
        values = values.float().clamp(-E4M3_MAX, E4M3_MAX)
    width = target.primitive_bitwidth // 8
    return values.to(TORCH[target]).contiguous().view(SIGNED[width]).numpy().view(UNSIGNED[width])


def widened(handle: Any) -> Any:
    if handle.dtype.scalar in (tl.bfloat16, tl.float8e4nv):
        return convert_float(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32)
    return handle.data


def create_dot(self: Any, a: Any, b: Any, to: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """In float64, where sums of bf16 and fp8 products are exact: numpy's BLAS adds up a number in an order that on
    some CPUs follows from its place in the tile."""
    total = np.matmul(widened(a).astype(np.float64), widened(b).astype(np.float64)) + to.data
    return interpreter.TensorHandle(total.astype(to.data.dtype), to.dtype.scalar)


def patch_tensor(tensor: Any, scope: Any) -> None:
    patch_before(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def repair() -> None:
    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpreterBuilder.create_dot = create_dot
