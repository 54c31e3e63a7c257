"""Torch definition of every kernel but attention; also the CPU path.

Invariant: a row of the result has the same bits whatever the number and content of the other rows.
Everything is out of place, so autograd may run through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What a CPU GEMM must look like for a row to keep its bits (fuzzed on AVX-512 with MKL and oneDNN, 1 to 4 threads):
# - fp32: rows round in classes {1}, {2, 3}, {4 ..}, and threads cut M in fours: so M is padded to a multiple of 4;
# - fp32: a row's bits depend on its address modulo 16: so K is padded to a multiple of 4 and operands start aligned;
# - small products (bf16: up to 4096 multiply-adds, fp32: under 400) take another code path: M is padded until past it.
ROW_MULTIPLE = 4
MAX_ROWS = 512
ALIGNMENT = 16
SMALL_MATRIX = 1 << 19
MIN_OUTPUTS = 32  # with up to 8, a matrix that has its inputs as rows rounds otherwise

Stack = Tensor | tuple[Tensor, ...]  # matrices of the experts: [E, N, K], or E packed ones


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [M, K], weight: [N, K], packed or not, bias: [N] -> [M, N] in x's dtype."""
    assert x.dim() == 2, f"linear takes [M, K], not {tuple(x.shape)}"
    if x.shape[0] == 0:
        return x.new_zeros(0, weight.shape[0])
    missing = -x.shape[1] % ROW_MULTIPLE
    if missing:
        x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, missing))
    x, weight = aligned(x), weight if _is_packed(weight) else aligned(weight)
    if x.shape[0] <= MAX_ROWS:
        return _linear_tile(x, weight, bias)
    return torch.cat([_linear_tile(x[at : at + MAX_ROWS], weight, bias) for at in range(0, x.shape[0], MAX_ROWS)])


def _linear_tile(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_rows = x.shape[0]
    missing = padded_rows(num_rows, weight) - num_rows
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    if weight.is_mkldnn:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        out = F.linear(x, weight, bias)
    return out[:num_rows] if missing else out


def packed(weight: Tensor) -> Tensor:
    """The matrix in the layout that `linear` reads fastest: the same bits, for `linear` only, no way back.

    A plain bf16 matrix is laid out anew by each product, which takes as long as the product itself for a few rows. A
    small fp32 matrix is read up to three times as fast with its inputs as rows; a large one no faster, or slower.
    """
    outputs, inputs = weight.shape
    if weight.dtype == torch.bfloat16 and inputs % ROW_MULTIPLE == 0 and _packs_bf16():
        out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return out
    is_small = outputs >= MIN_OUTPUTS and weight.numel() <= SMALL_MATRIX
    if weight.dtype == torch.float32 and is_small and inputs % ROW_MULTIPLE == outputs % ROW_MULTIPLE == 0:
        return weight.t().contiguous().t()
    return aligned(weight)


def _is_packed(weight: Tensor) -> bool:
    """Where not so, the matrix is copied unless it is contiguous."""
    if weight.is_mkldnn:
        return True
    return (
        weight.stride() == (1, weight.shape[0])
        and (weight.shape[0] % ROW_MULTIPLE or weight.data_ptr() % ALIGNMENT) == 0
    )


def _packs_bf16() -> bool:
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def padded_rows(num_rows: int, weight: Tensor) -> int:
    """Rows that a product of `num_rows` rows with this matrix must be padded to."""
    small_product = 400 if weight.dtype == torch.float32 else 4096
    num_rows = max(num_rows, small_product // (weight.shape[-1] * weight.shape[-2]) + 1)
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def aligned(x: Tensor) -> Tensor:
    """Contiguous and starting at a multiple of 16 bytes; weights should be so from the start, a mapped file may not."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def batched_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x: [B, M, K], weight: [B, K, N] -> [B, M, N]; rows keep their bits whatever M and B."""
    (num_batches, num_rows, depth), num_columns = x.shape, weight.shape[-1]
    missing_rows = padded_rows(num_rows, weight) - num_rows
    missing, missing_columns = -depth % ROW_MULTIPLE, -num_columns % ROW_MULTIPLE
    if missing or missing_rows:
        x = F.pad(x, (0, missing, 0, missing_rows))
    if missing or missing_columns:
        weight = F.pad(weight, (0, missing_columns, 0, missing))
    if num_batches == 1:  # threads would share the one product, and cut it otherwise than they cut a batch
        x, weight = x.expand(2, -1, -1), weight.expand(2, -1, -1)
    return torch.bmm(aligned(x), weight)[:num_batches, :num_rows, :num_columns]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., H] -> same shape and dtype; computed in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). By torch.exp: torch's own silu rounds otherwise in the tail of its vector loop."""
    return x / (1.0 + torch.exp(-x))


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: [M, 2I], gate columns first -> [M, I]; computed in fp32, rounded once."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (silu(gate.float()) * up.float()).to(gate_up.dtype)


def swiglu_mlp(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """x: [M, H], w13: [2I, H] (gate rows first), w2: [H, I] -> [M, H]."""
    return linear(swiglu(linear(x, w13)), w2)


def grouped_mlp(x: Tensor, row_of_pair: Tensor, expert_of_pair: Tensor, w13: Stack, w2: Stack) -> Tensor:
    """One MLP row per (token row, expert) pair, in the order given.

    x: [n, H], row_of_pair, expert_of_pair: int64 [P] (expert = index into w13),
    w13: E matrices [2I, H], w2: E matrices [H, I] -> [P, H].
    """
    if row_of_pair.numel() == 0:
        return x.new_zeros(0, w2[0].shape[0])
    experts, sizes, place_of_pair = _padded_groups(expert_of_pair, w13, w2)
    rows = torch.zeros(sum(sizes), dtype=torch.int64)  # what fills a group up is row 0; nobody reads its result
    grouped = x.index_select(0, rows.index_copy_(0, place_of_pair, row_of_pair))
    gate_up = [linear(part, w13[e]) for part, e in zip(torch.split(grouped, sizes), experts, strict=True)]
    activated = swiglu(torch.cat(gate_up))
    out = [linear(part, w2[e]) for part, e in zip(torch.split(activated, sizes), experts, strict=True)]
    return torch.cat(out).index_select(0, place_of_pair)


def _padded_groups(expert_of_pair: Tensor, w13: Stack, w2: Stack) -> tuple[list[int], list[int], Tensor]:
    """The experts present, the rows of each one's group, padded here once, and int64 [P], each pair's place in them."""
    counts = torch.bincount(expert_of_pair, minlength=len(w13))
    experts: list[int] = counts.nonzero().flatten().tolist()
    present: list[int] = counts.tolist()
    sizes = [max(padded_rows(present[e], w13[0]), padded_rows(present[e], w2[0])) for e in experts]
    first_places = torch.zeros_like(counts)
    first_places[experts] = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    order = torch.argsort(expert_of_pair, stable=True)
    shift = first_places - (counts.cumsum(0) - counts)  # from the place in `order` to the place among padded groups
    places = torch.arange(len(order)) + shift[expert_of_pair[order]]
    return experts, sizes, torch.empty_like(order).index_copy_(0, order, places)


def combine(shared: Tensor | None, rows: Tensor, topk_weights: Tensor) -> Tensor:
    """shared: [M, H] or None, rows: [M, k, H], topk_weights: fp32 [M, k] -> [M, H] in rows' dtype.

    fp32; shared expert first, then slots 0 .. k-1 in that order, whoever computed them (DESIGN law 5).
    """
    total = torch.zeros_like(rows[:, 0], dtype=torch.float32) if shared is None else shared.float()
    for slot in range(rows.shape[1]):
        total = total + rows[:, slot].float() * topk_weights[:, slot, None]
    return total.to(rows.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """x: [..., d], cos, sin: broadcastable to x with equal halves -> [..., d] in x's dtype, computed in fp32.

    `interleaved`: input pairs are (0, 1), (2, 3) .. as DeepSeek stores them, else (0, d/2), (1, d/2 + 1) ..; the output
    always has the pairs' first members in its first half, which dot products of a query and a key cannot tell.
    """
    half = x.shape[-1] // 2
    wide = x.float()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
