"""Dense products: block-scaled fp8 (1x128 activations, 128x128 weights) and bf16, weights on the tensor core's M side.

Law 5: tokens sit on wgmma's N, where every tile from 16 to 128 is one instruction family (QGMMA or HGMMA m64nNk32/16)
with the same order over K; so the tile may follow the load and a row keeps its bits. An fp8 group of 128 starts a sum
of its own, which is added in fp32: the promotion that DeepSeek-V3 asks for (paper, section 3.3.2).
Few rows: tiles of 64 outputs, deep pipelines, scales fetched a step ahead. Many rows, fp8: 128 x 128 with a warp group
that does nothing but load. Both take the sum over K in the parts that splits.py gives the weight's shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .norm import Quantised
from .scales import GROUP
from .splits import L2_TILES, Tiling, in_sixteens, merge, narrowed, room_for_parts, tile_places, tiling_of

BF16_DEPTH = 64
TMA_ALIGNMENT = 16  # bytes, of a row


@triton.jit
def store_tile(total, bias_ptr, out_ptr, row, output, M, N, out_stride, HAS_BIAS: tl.constexpr):
    """total: fp32 [outputs, tokens] -> rows of `out`."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=output < N, other=0.0).to(tl.float32)[:, None]
    where = out_ptr + row.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(where, total.T.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (output < N)[None, :])


@triton.jit(do_not_specialize=["M", "steps", "x_scale_stride", "part_steps"])
def fp8_kernel(
    x_tiles, w_tiles, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, steps, x_scale_stride, out_stride, part_steps,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """x: e4m3 [M, K], w: e4m3 [N, K] -> out [parts, M, N]; a program's outputs have one row of weight scales."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first_output = tl.program_id(1) * OUTPUTS
    first_step = tl.program_id(2) * part_steps
    last_step = tl.minimum(first_step + part_steps, steps) - 1
    x_scales = x_scale_ptr + row
    w_scales = w_scale_ptr + first_output // 128 * steps
    x_scale = tl.load(x_scales + first_step.to(tl.int64) * x_scale_stride, mask=row < M, other=0.0)
    w_scale = tl.load(w_scales + first_step)
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for step in tl.range(first_step, last_step + 1):
        x = x_tiles.load([tl.program_id(0) * TOKENS, step * 128])
        w = w_tiles.load([first_output, step * 128])
        ahead = tl.minimum(step + 1, last_step)
        next_scale = tl.load(x_scales + ahead.to(tl.int64) * x_scale_stride, mask=row < M, other=0.0)
        total = tl.fma(tl.dot(w, x.T), tl.broadcast_to((x_scale * w_scale)[None, :], (OUTPUTS, TOKENS)), total)
        x_scale = next_scale
        w_scale = tl.load(w_scales + ahead)
    out = out_ptr + tl.program_id(2).to(tl.int64) * M * N
    store_tile(total, bias_ptr, out, row, first_output + tl.arange(0, OUTPUTS), M, N, out_stride, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "x_scale_stride", "part_steps"])
def fp8_stream_kernel(
    x_tiles, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, K, x_scale_stride, out_stride, part_steps,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, IN_PARTS: tl.constexpr, L2_TILES: tl.constexpr,
):  # fmt: skip
    """The same for many rows, 128 outputs a program: warp-specialised, which allows one product in one loop.

    Two warp groups multiply 64 outputs each, for which Triton cuts the weights' tile in two. Only a descriptor made
    here is cut with it; one from the host would go on copying 128 outputs into the room of 64.
    """
    token_tile, tile = tile_places(L2_TILES)
    first_row = token_tile * TOKENS
    row = first_row + tl.arange(0, TOKENS)
    w_tiles = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [128, 128])
    steps = tl.cdiv(K, 128)
    total = tl.zeros((128, TOKENS), tl.float32)
    part = tl.zeros((128, TOKENS), tl.float32)
    for step in tl.range(0, steps, warp_specialize=True):
        x = x_tiles.load([first_row, step * 128])
        w = w_tiles.load([tile * 128, step * 128])
        scale = tl.load(x_scale_ptr + step * x_scale_stride + row, mask=row < M, other=0.0)
        scale = scale * tl.load(w_scale_ptr + tile * steps + step)
        part = tl.fma(tl.dot(w, x.T), tl.broadcast_to(scale[None, :], (128, TOKENS)), part)
        if IN_PARTS:
            is_whole = (step + 1) % part_steps == 0
            total = tl.where(is_whole, total + part, total)
            part = tl.where(is_whole, 0.0, part)
    output = tile * 128 + tl.arange(0, 128)
    store_tile(total + part, bias_ptr, out_ptr, row, output, M, N, out_stride, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "part_steps", "num_parts"])
def bf16_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, M, N, K, x_stride, out_stride, part_steps, num_parts,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x: [M, K] with rows x_stride apart, w: [N, K] -> out [parts, M, N]. By pointers: small models have odd strides.

    A program adds up `num_parts` parts.
    """
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    depth = tl.arange(0, DEPTH)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + output.to(tl.int64)[:, None] * K
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for index in range(0, num_parts):
        first = (tl.program_id(2) * num_parts + index) * part_steps * DEPTH
        part = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        for start in tl.range(first, tl.minimum(first + part_steps * DEPTH, K), DEPTH):
            inside = start + depth < K
            x = tl.load(x_rows + (start + depth)[None, :], mask=(row < M)[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_rows + (start + depth)[None, :], mask=(output < N)[:, None] & inside[None, :], other=0.0)
            part = tl.dot(w, x.T, part)
        total += part
    out = out_ptr + tl.program_id(2).to(tl.int64) * M * N
    store_tile(total, bias_ptr, out, row, output, M, N, out_stride, HAS_BIAS)


def linear_fp8(
    x: Quantised, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x: [M, K], weight: e4m3 [N, K], weight_scale: fp32 [ceil(N/128), ceil(K/128)], bias: [N] -> [M, N].

    In `out`'s dtype (rows may be strided), bf16 if not given. ValueError where K is not a multiple of 16.
    """
    out = _room(x.codes, weight, out)
    tiling = fp8_tiling(x, weight)
    if tiling.programs > 1:
        return merge(parts_fp8(x, weight, weight_scale), bias, out) if out.numel() else out
    run_fp8(x, weight, weight_scale, bias, out, tiling)
    return out


def parts_fp8(x: Quantised, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The product as [parts, M, N], in fp32 and still to be added up in ascending order, or one part in bf16."""
    tiling = fp8_tiling(x, weight)
    parts = room_for_parts(tiling, x.codes.shape[0], weight.shape[0], x.codes.device)
    run_fp8(x, weight, weight_scale, None, parts[0], tiling)
    return parts


def fp8_tiling(x: Quantised, weight: Tensor) -> Tiling:
    return tiling_of(x.codes.shape[0], weight.shape[0], triton.cdiv(weight.shape[1], GROUP))


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x: bf16 [M, K] (rows may be strided), weight: bf16 [N, K], bias: [N] -> [M, N] in `out`'s dtype, else bf16."""
    out = _room(x, weight, out)
    tiling = bf16_tiling(x, weight)
    if tiling.programs > 1:
        return merge(parts_bf16(x, weight), bias, out) if out.numel() else out
    run_bf16(x, weight, bias, out, tiling)
    return out


def parts_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """As parts_fp8."""
    tiling = bf16_tiling(x, weight)
    parts = room_for_parts(tiling, x.shape[0], weight.shape[0], x.device)
    run_bf16(x, weight, None, parts[0], tiling)
    return parts


def bf16_tiling(x: Tensor, weight: Tensor) -> Tiling:
    (num_rows, depth), num_outputs = x.shape, weight.shape[0]
    tiling = tiling_of(num_rows, num_outputs, triton.cdiv(depth, BF16_DEPTH))
    return tiling if in_sixteens(depth, x.stride(0), x.data_ptr()) else narrowed(tiling)


def tiles_of(matrix: Tensor, rows: int) -> TensorDescriptor:
    """What the tensor memory accelerator reads tiles of `rows` x 128 codes by; what is outside reads as zero."""
    if matrix.shape[1] % TMA_ALIGNMENT:
        raise ValueError(
            f"an fp8 product over {matrix.shape[1]} columns: rows must be multiples of {TMA_ALIGNMENT} bytes for the "
            f"tensor memory accelerator, so keep this matrix in bfloat16"
        )
    return TensorDescriptor.from_tensor(matrix, [rows, GROUP])


def set_descriptor_memory(device: torch.device) -> None:
    """Gives the kernels of this thread that make their descriptors themselves the memory to put them in."""

    def memory(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(memory)


def _room(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16, device=x.device)
    return out


def run_fp8(
    x: Quantised, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, tiling: Tiling
) -> None:
    """out: [M, N], or the first of the tiling's [programs, M, N], which takes no bias."""
    (num_rows, depth), num_outputs = x.codes.shape, weight.shape[0]
    if num_rows == 0:
        return
    grid, has_bias = tiling.grid(num_rows, num_outputs), bias is not None
    x_tiles, strides = tiles_of(x.codes, tiling.tokens), (x.scales.stride(0), out.stride(0))
    if tiling.is_large:
        set_descriptor_memory(out.device)
        fp8_stream_kernel[grid](
            x_tiles, weight, x.scales, weight_scale, bias, out, num_rows, num_outputs, depth, *strides,
            tiling.part_steps, HAS_BIAS=has_bias, TOKENS=tiling.tokens, IN_PARTS=tiling.parts > 1, L2_TILES=L2_TILES,
            num_warps=4, num_stages=4,
        )  # fmt: skip
    else:
        fp8_kernel[grid](
            x_tiles, tiles_of(weight, tiling.outputs), x.scales, weight_scale, bias, out, num_rows, num_outputs,
            triton.cdiv(depth, GROUP), *strides, tiling.part_steps,
            HAS_BIAS=has_bias, TOKENS=tiling.tokens, OUTPUTS=tiling.outputs,
            num_warps=4, num_stages=_stages(tiling.tokens),
        )  # fmt: skip


def run_bf16(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tiling: Tiling) -> None:
    """As run_fp8."""
    (num_rows, depth), num_outputs = x.shape, weight.shape[0]
    if num_rows == 0:
        return
    bf16_kernel[tiling.grid(num_rows, num_outputs)](
        x, weight, bias, out, num_rows, num_outputs, depth, x.stride(0), out.stride(0), tiling.part_steps,
        tiling.parts // tiling.programs,
        HAS_BIAS=bias is not None, TOKENS=tiling.tokens, OUTPUTS=tiling.outputs, DEPTH=BF16_DEPTH,
        num_warps=8 if tiling.is_large else 4, num_stages=4 if tiling.is_large else _stages(tiling.tokens),
    )  # fmt: skip


def _stages(tokens: int) -> int:
    """Some 72 KB, of which three programs fit an SM; a stage holds 128 bytes of each output and token."""
    return 73 * 1024 // (128 * (64 + tokens))
