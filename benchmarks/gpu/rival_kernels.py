"""Calls of FlashMLA, DeepGEMM, FlashInfer and vLLM's Triton kernels on the operands that ours get."""

from __future__ import annotations

import ast
import atexit
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from braid.kernels.gpu import attention_decode, gemm

from .cases import Draw, Work
from .cases_attention import cached
from .sizes import BLOCK_SIZE, V3
from .timing import copies

HEADS, RANK, WIDTH = V3.num_attention_heads, V3.kv_lora_rank, V3.latent_dim


@dataclass(frozen=True, slots=True)
class Contest:
    """The same work on one set of operands. `result`: what `theirs` made, in the form of what `ours` returns."""

    theirs: Callable[[], object]
    ours: Callable[[], torch.Tensor]
    result: Callable[[], torch.Tensor]


def imported(name: str, folder: Path) -> ModuleType:
    """ImportError that says where it was looked for."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"no {name} in {folder} that loads here: {error}") from error


def extracted(path: Path, names: Collection[str]) -> ModuleType:
    """A module of single Triton kernels out of a file, so that the package around them need not be imported.

    ValueError where one is missing.
    """
    source = path.read_text()
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            first = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    if missing := set(names) - set(found):
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; another release of vLLM may have renamed them")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # not before: Triton reads a kernel's text when it runs
    file = folder / f"rival_{path.stem}.py"
    file.write_text("\n\n".join(["import torch\nimport triton\nimport triton.language as tl\n", *found.values()]))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def vllm_product(folder: Path, draw: Draw, rows: int, inputs: int, outputs: int) -> list[Contest]:
    file = folder / "vllm/model_executor/layers/quantization/utils/fp8_utils.py"
    kernel = extracted(file, ["_w8a8_triton_block_scaled_mm"])._w8a8_triton_block_scaled_mm

    def one() -> Contest:
        x, (weight, scales) = draw.activations(rows, inputs), draw.block_weight(outputs, inputs)
        their_scales = x.scales.t().contiguous()
        out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=draw.device)
        tile = 64 if rows <= 64 else 128

        def theirs() -> None:
            kernel[(triton.cdiv(rows, tile) * triton.cdiv(outputs, 128),)](
                x.codes, weight, out, their_scales, scales, rows, outputs, inputs, 128, 128,
                inputs, 1, 1, inputs, outputs, 1, their_scales.stride(0), 1, 1, scales.stride(0),
                BLOCK_SIZE_M=tile, BLOCK_SIZE_N=128, BLOCK_SIZE_K=128, GROUP_SIZE_M=32, num_warps=4, num_stages=3,
            )  # fmt: skip

        return Contest(theirs, lambda: gemm.linear_fp8(x, weight, scales), lambda: out)

    return taking_turns(one, Work(inputs * outputs), draw)


def deep_gemm(folder: Path, draw: Draw, rows: int, inputs: int, outputs: int) -> list[Contest]:
    theirs_module = imported("deep_gemm", folder)

    def one() -> Contest:
        x, (weight, scales) = draw.activations(rows, inputs), draw.block_weight(outputs, inputs)
        their_scales = x.scales.t().contiguous()
        out = torch.empty(rows, outputs, dtype=torch.bfloat16, device=draw.device)

        def theirs() -> None:  # its own layout of the scales is part of it, as ours is of our quantisation
            theirs_module.fp8_gemm_nt((x.codes, their_scales), (weight, scales), out)

        return Contest(theirs, lambda: gemm.linear_fp8(x, weight, scales), lambda: out)

    return taking_turns(one, Work(inputs * outputs), draw)


def flash_mla(folder: Path, draw: Draw, sequences: int, context: int) -> list[Contest]:
    torch.ops.load_library(str(folder / "_flashmla_C.abi3.so"))  # type: ignore[no-untyped-call]
    return _decode(draw, sequences, context, _flash_mla)


def _flash_mla(q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> Callable[[], Any]:
    q4, cache4, short = q.unsqueeze(1), cache.unsqueeze(2), tables.int()
    attend = torch.ops._flashmla_C.dense_decode_fwd
    return lambda: attend(q4, cache4, RANK, lengths, short, V3.softmax_scale, False, None, None)[0].squeeze(1)


def flash_infer(folder: Path, draw: Draw, sequences: int, context: int) -> list[Contest]:
    theirs_module = imported("flashinfer.mla", folder)

    def prepared(
        q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor
    ) -> Callable[[], Any]:
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=draw.device)
        wrapper = theirs_module.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
        width = tables.shape[1]
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=draw.device)
        dtype = torch.bfloat16
        wrapper.plan(
            starts, starts * width, tables.int().flatten(), lengths, HEADS, RANK, WIDTH - RANK, BLOCK_SIZE, False,
            V3.softmax_scale, dtype, dtype,
        )  # fmt: skip
        return lambda: wrapper.run(q[..., :RANK], q[..., RANK:], cache[..., :RANK], cache[..., RANK:])

    return _decode(draw, sequences, context, prepared)


def vllm_decode(folder: Path, draw: Draw, sequences: int, context: int) -> list[Contest]:
    """Stage 1 and 2 with 4 splits, the batch-variant form that is vLLM's default."""
    file, splits = folder / "vllm/v1/attention/ops/triton_decode_attention.py", 4
    kernels = extracted(file, ["tanh", "_fwd_grouped_kernel_stage1", "_fwd_kernel_stage2"])

    def prepared(
        q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor
    ) -> Callable[[], Any]:
        keys, short = cache.unsqueeze(2), tables.int()
        values, one = keys[..., :RANK], torch.ones(1, device=draw.device)
        middle = torch.empty(sequences, HEADS, splits, RANK + 1, device=draw.device)
        out = torch.empty(sequences, HEADS, RANK, dtype=torch.bfloat16, device=draw.device)
        lse = torch.empty(sequences, HEADS, device=draw.device)

        def theirs() -> torch.Tensor:
            kernels._fwd_grouped_kernel_stage1[(sequences, HEADS // 16, splits)](
                q, keys, values, V3.softmax_scale, short, lengths, middle, short.stride(0), q.stride(0), q.stride(1),
                keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
                *middle.stride()[:3], one, one, kv_group_num=HEADS, q_head_num=HEADS, BLOCK_DMODEL=RANK,
                BLOCK_DPE=WIDTH - RANK, BLOCK_DV=RANK, BLOCK_N=32, BLOCK_H=16, NUM_KV_SPLITS=splits,
                PAGE_SIZE=BLOCK_SIZE, logit_cap=0.0, Lk=WIDTH, Lv=RANK, IS_MLA=True, num_warps=4, num_stages=2,
            )  # fmt: skip
            kernels._fwd_kernel_stage2[(sequences, HEADS)](
                middle, out, lse, lengths, *middle.stride()[:3], *out.stride()[:2], lse.stride(0),
                NUM_KV_SPLITS=splits, BLOCK_DV=RANK, Lv=RANK, num_warps=4, num_stages=2,
            )  # fmt: skip
            return out

        return theirs

    return _decode(draw, sequences, context, prepared)


Prepared = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Callable[[], Any]]


def _decode(draw: Draw, sequences: int, context: int, prepare: Prepared) -> list[Contest]:
    """`prepare`: (q [R, heads, 576], cache, int64 tables, int32 lengths) -> the rival's call."""

    def one() -> Contest:
        cache, tables = cached(draw, V3, sequences, context)
        q = draw.normal(sequences, HEADS, WIDTH)
        plan = attention_decode.plan_decode(
            torch.full((sequences,), context - 1, device=draw.device), tables, BLOCK_SIZE, HEADS
        )
        lengths = torch.full((sequences,), context, dtype=torch.int32, device=draw.device)
        theirs = prepare(q, cache, tables, lengths)
        return Contest(theirs, lambda: attention_decode.mla_decode(q, cache, plan, V3.softmax_scale, RANK), theirs)

    return taking_turns(one, Work(2 * sequences * context * WIDTH), draw)


def taking_turns(one: Callable[[], Contest], work: Work, draw: Draw) -> list[Contest]:
    return [one() for _ in range(copies(work.num_bytes, draw.device))]


DECODES: dict[str, Callable[..., list[Contest]]] = {
    "vLLM Triton": vllm_decode,
    "FlashMLA": flash_mla,
    "FlashInfer": flash_infer,
}
