"""Law 5 on the GPU: a row has the same bits alone and in company, in any tile, in chunks and whole.

The last row lists which numbers of rows, and so which tiles, give the same bits in every fp8 product of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from braid.kernels.gpu import attention_decode, attention_prefill, experts, experts_bf16, gemm, heads, index, mlp
from braid.kernels.gpu.norm import Quantised

from .cases_attention import cached
from .cases_experts import chosen
from .cases_products import matrices
from .invariance_rows import (
    choice,
    combined,
    compared,
    latents,
    logits,
    normed,
    num_rows,
    quantised,
    same,
    sampled,
)
from .setting import Row, Setting, each
from .sizes import BLOCK_SIZE

TILES = (16, 32, 64)
FEW_HEADS = 16  # as many as leave lanes of a tile to other rows of the sequence


def probe(setting: Setting) -> Iterator[Row]:
    """Rows with `passed` and `differing`, the parts whose bits are not those of the whole."""
    probes: dict[str, Callable[[Setting], Row]] = {
        "residual + RMSNorm": normed,
        "quantise": quantised,
        "fp8 product": _fp8,
        "bf16 product": _bf16,
        "product of each head": _heads,
        "shared expert fp8": _mlp_fp8,
        "shared expert bf16": _mlp_bf16,
        "gate logits": logits,
        "gate top-k": choice,
        "combine": combined,
        "latent norm + rope + cache write": latents,
        "sample": sampled,
        "experts fp8: rows and tiles": _experts_fp8,
        "experts bf16: rows and tiles": _experts_bf16,
        "MLA decode: batch, rows a sequence, blocks": _decode,
        "MLA decode of few heads: batch, rows a sequence, blocks": partial(_decode, heads=FEW_HEADS),
        "MLA prefill: chunks": _prefill,
        "bit classes of the fp8 product": _bit_classes,
    }
    return each(setting, ((name, partial(function, setting)) for name, function in probes.items()))


def _fp8(setting: Setting) -> Row:
    """The rows together are enough for the kernel of many rows; some of the parts are not."""
    hidden, outputs, draw = setting.config.hidden_size, 2 * setting.config.moe_intermediate_size, setting.draw
    x, (weight, scales) = draw.activations(num_rows(setting), hidden), draw.block_weight(outputs, hidden)
    return compared(gemm.linear_fp8(x, weight, scales), lambda part: gemm.linear_fp8(_part(x, part), weight, scales))


def _part(x: Quantised, part: slice) -> Quantised:
    return Quantised(x.codes[part], x.scales[:, part].contiguous())


def _bf16(setting: Setting) -> Row:
    hidden, outputs, draw = setting.config.hidden_size, 2 * setting.config.moe_intermediate_size, setting.draw
    x, weight = draw.normal(num_rows(setting), hidden), draw.normal(outputs, hidden, scale=hidden**-0.5)
    return compared(gemm.linear_bf16(x, weight), lambda part: gemm.linear_bf16(x[part], weight))


def _heads(setting: Setting) -> Row:
    """W_UK, and W_UV on what it gives."""
    config, draw, nope = setting.config, setting.draw, setting.config.qk_nope_head_dim
    num_heads, rank = config.num_attention_heads, config.kv_lora_rank
    kv_b = draw.normal(num_heads, nope + config.v_head_dim, rank, scale=rank**-0.5)
    x, w_uk, w_uv = draw.normal(num_rows(setting), num_heads, nope), kv_b[:, :nope].transpose(1, 2), kv_b[:, nope:]

    def there_and_back(part: slice) -> Tensor:
        return heads.head_linear(heads.head_linear(x[part], w_uk), w_uv)

    return compared(there_and_back(slice(None)), there_and_back)


def _mlp_fp8(setting: Setting) -> Row:
    hidden, inner, draw = setting.config.hidden_size, setting.config.shared_intermediate_size, setting.draw
    x = draw.activations(num_rows(setting), hidden)
    w13, w2 = draw.block_weight(2 * inner, hidden), draw.block_weight(hidden, inner)
    return compared(
        mlp.swiglu_mlp_fp8(x, *w13, *w2, False),
        lambda part: mlp.swiglu_mlp_fp8(_part(x, part), *w13, *w2, False),
    )


def _mlp_bf16(setting: Setting) -> Row:
    hidden, inner, draw = setting.config.hidden_size, setting.config.shared_intermediate_size, setting.draw
    x, w13 = draw.normal(num_rows(setting), hidden), draw.normal(2 * inner, hidden, scale=hidden**-0.5)
    w2 = draw.normal(hidden, inner, scale=inner**-0.5)
    return compared(mlp.swiglu_mlp_bf16(x, w13, w2), lambda part: mlp.swiglu_mlp_bf16(x[part], w13, w2))


def _experts_fp8(setting: Setting) -> Row:
    config, draw = setting.config, setting.draw
    hidden, inner, held, slots = config.hidden_size, config.moe_intermediate_size, 4, config.num_experts_per_tok
    x = draw.activations(num_rows(setting), hidden)
    w13, w2 = draw.block_weight(2 * inner, hidden, held), draw.block_weight(hidden, inner, held)
    places = chosen(draw, config, num_rows(setting), held)

    def rows_of(part: slice, tile: int) -> Tensor:
        mine, row_of_pair = _pairs(places, slots, part)
        out = torch.zeros(len(mine), hidden, dtype=torch.bfloat16, device=setting.device)
        found = index.dispatch_index(mine, held, tile)
        return experts.grouped_mlp_fp8(_part(x, part), row_of_pair, found, *w13, *w2, False, out).view(
            -1, slots, hidden
        )

    return _compared_in_tiles(num_rows(setting), rows_of)


def _experts_bf16(setting: Setting) -> Row:
    config, draw = setting.config, setting.draw
    hidden, inner, held, slots = config.hidden_size, config.moe_intermediate_size, 4, config.num_experts_per_tok
    x = draw.normal(num_rows(setting), hidden)
    w13, w2 = draw.normal(held, 2 * inner, hidden, scale=0.01), draw.normal(held, hidden, inner, scale=0.01)
    places = chosen(draw, config, num_rows(setting), held)

    def rows_of(part: slice, tile: int) -> Tensor:
        mine, row_of_pair = _pairs(places, slots, part)
        out = torch.zeros(len(mine), hidden, dtype=torch.bfloat16, device=setting.device)
        found = index.dispatch_index(mine, held, tile)
        return experts_bf16.grouped_mlp_bf16(x[part], row_of_pair, found, w13, w2, out).view(-1, slots, hidden)

    return _compared_in_tiles(num_rows(setting), rows_of)


def _pairs(places: Tensor, slots: int, part: slice) -> tuple[Tensor, Tensor]:
    """Experts of the pairs of these rows, and the row of each one."""
    mine = places.view(-1, slots)[part]
    return mine.flatten(), torch.arange(len(mine), device=mine.device).repeat_interleave(slots)


def _compared_in_tiles(rows: int, rows_of: Callable[[slice, int], Tensor]) -> Row:
    whole = rows_of(slice(0, rows), TILES[0])
    found = [compared(whole, lambda part, tile=tile: rows_of(part, tile)) for tile in TILES]  # type: ignore[misc]
    differing = [f"tile {tile}, {part}" for tile, row in zip(TILES, found, strict=True) for part in row["differing"]]
    return {"passed": not differing, "differing": differing, "parts": sum(row["parts"] for row in found)}


def _decode(setting: Setting, heads: int | None = None) -> Row:
    """Rows alone; one to four rows of a sequence together, some across a split's end; the cache in other blocks."""
    config, draw, device = setting.config, setting.draw, setting.device
    rank, heads, scale = config.kv_lora_rank, heads or config.num_attention_heads, config.softmax_scale
    nums, context = ((1, 2, 3, 4, 2), 3000) if setting.is_full_size else ((1, 3), 70)
    cache, tables = cached(draw, config, len(nums), context)
    each = torch.tensor(nums, device=device)
    row_tables, firsts = tables.repeat_interleave(each, 0), (each.cumsum(0) - each).repeat_interleave(each)
    count = sum(nums)
    ends = torch.tensor([2 * attention_decode.SPLIT if num % 2 == 0 else context for num in nums], device=device)
    begins = (ends - each // 2).minimum(context - each)
    positions = begins.repeat_interleave(each) + torch.arange(count, device=device) - firsts
    q = draw.normal(count, heads, config.latent_dim)

    def attended(rows: slice, cache: Tensor, row_tables: Tensor, shares: bool = False) -> Tensor:
        own = (firsts[rows] - rows.start).clamp(min=0) if shares else None
        plan = attention_decode.plan_decode(positions[rows], row_tables[rows], BLOCK_SIZE, heads, own)
        return attention_decode.mla_decode(q[rows], cache, plan, scale, rank)

    every = slice(0, count)
    whole = attended(every, cache, row_tables)
    row = compared(whole, lambda part: attended(part, cache, row_tables, shares=True))
    order = torch.randperm(len(cache), device=device)
    moved, moved_tables = torch.empty_like(cache), order[row_tables]
    moved[order] = cache
    others = {"together": attended(every, cache, row_tables, True), "blocks": attended(every, moved, moved_tables)}
    differing = row["differing"] + [name for name, out in others.items() if not same(whole, out)]
    return {"passed": not differing, "differing": differing, "parts": row["parts"] + len(others)}


def _prefill(setting: Setting) -> Row:
    config, draw = setting.config, setting.draw
    heads, rank, value = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
    # across the end of a piece of keys, in it and on it
    num, cuts = (5000, (512, 1100, attention_prefill.PIECE, 4500)) if setting.is_full_size else (70, (33,))
    cache, tables = cached(draw, config, 1, num)
    q = draw.normal(num, heads, config.qk_head_dim)
    kv_b = draw.normal(heads * (config.qk_nope_head_dim + value), rank, scale=rank**-0.5)

    def attended(begin: int, end: int) -> Tensor:
        plan = attention_prefill.plan_prefill(begin, end - begin, tables[0])
        expand = partial(gemm.linear_bf16, weight=kv_b)
        return attention_prefill.mla_prefill(q[begin:end], cache, expand, plan, config.softmax_scale, rank, value)

    whole = attended(0, num)
    differing = [f"{cut}:{num}" for cut in cuts if not same(whole[cut:], attended(cut, num))]
    differing += [f"0:{cut}" for cut in cuts if not same(whole[:cut], attended(0, cut))]
    return {"passed": not differing, "differing": differing, "parts": 2 * len(cuts)}


def _bit_classes(setting: Setting) -> Row:
    """Row 0 of every matrix's product with more and more rows beside it, each number of them taking another tile."""
    draw, counts = setting.draw, (1, 16, 32, 64, 128, 256, 4096) if setting.is_full_size else (1, 17)
    classes: dict[str, dict[str, list[int]]] = {}
    for name, inputs, outputs in matrices(setting.config):
        x, (weight, scales) = draw.activations(counts[-1], inputs), draw.block_weight(outputs, inputs)
        found: dict[str, list[int]] = {}
        for count in counts:
            row = gemm.linear_fp8(_part(x, slice(0, count)), weight, scales)[0]
            found.setdefault(hashlib.sha256(row.view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:8], []).append(
                count
            )
        classes[name] = found
    differing = [name for name, found in classes.items() if len(found) > 1]
    return {"passed": not differing, "differing": differing, "classes": classes}
