"""How rivals are called for the experts' products, by stand-ins of theirs that only do what their interfaces say."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import triton_interpreter

triton_interpreter.repair()

from braid.benchmarks.gpu.cases import Draw  # noqa: E402
from braid.benchmarks.gpu.rival_experts import EXPERTS  # noqa: E402
from braid.benchmarks.gpu.rivals import AGREES, beside, comparisons  # noqa: E402
from braid.benchmarks.gpu.setting import Setting, each  # noqa: E402
from braid.benchmarks.gpu.sizes import TINY  # noqa: E402

CPU = torch.device("cpu")
CONFIG = replace(TINY, hidden_size=128)
VLLM = "vllm/model_executor/layers/fused_moe/fused_moe.py"

# A product row by row, 128 columns a program; the names are the interface.
FUSED_MOE = """
import a_package_that_is_not_here

@triton.jit
def write_zeros_to_output():
    pass

@triton.jit
def fused_moe_kernel(
    a_ptr, b_ptr, c_ptr, b_bias_ptr, a_scale_ptr, b_scale_ptr, topk_weights_ptr, sorted_token_ids_ptr, expert_ids_ptr,
    num_tokens_post_padded_ptr, N, K, EM, num_valid_tokens, stride_am, stride_ak, stride_be, stride_bk, stride_bn,
    stride_cm, stride_cn, stride_asm, stride_ask, stride_bse, stride_bsk, stride_bsn, MORE
    group_n: tl.constexpr, group_k: tl.constexpr, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr, top_k: tl.constexpr, compute_type: tl.constexpr, USE_TD: tl.constexpr = False,
):
    tiles = tl.cdiv(N, BLOCK_SIZE_N)
    tile, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    if tile * BLOCK_SIZE_M < tl.load(num_tokens_post_padded_ptr):
        pair = tl.load(sorted_token_ids_ptr + tile * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M))
        expert = tl.load(expert_ids_ptr + tile)
        inside = (pair < num_valid_tokens)[:, None]
        total = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
        for start in range(0, K, BLOCK_SIZE_K):
            depth = start + tl.arange(0, BLOCK_SIZE_K)
            a_at = a_ptr + (pair // top_k)[:, None] * stride_am + depth[None, :] * stride_ak
            a_scale_at = a_scale_ptr + (pair // top_k) * stride_asm + start // group_k * stride_ask
            b_at = b_ptr + expert * stride_be + column[None, :] * stride_bn + depth[:, None] * stride_bk
            b_scale_at = b_scale_ptr + expert * stride_bse + column // group_n * stride_bsn
            a_scale = tl.load(a_scale_at[:, None], mask=inside, other=0.0)
            a = tl.load(a_at, mask=inside, other=0.0)
            total += tl.dot(a, tl.load(b_at)) * a_scale * tl.load(b_scale_at + start // group_k * stride_bsk)[None, :]
        c_at = c_ptr + pair[:, None] * stride_cm + column[None, :] * stride_cn
        tl.store(c_at, total.to(compute_type), mask=inside)
"""

DEEP_GEMM = """
import torch

def get_mk_alignment_for_contiguous_layout():
    return 128

def get_mn_major_tma_aligned_tensor(scales):
    return scales.mT.contiguous().mT

def wide(codes, scales, rows):
    spread = scales.repeat_interleave(rows, -2).repeat_interleave(128, -1)
    return codes.float() * spread[..., : codes.shape[-2], : codes.shape[-1]]

def m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, expected_m):
    assert masked_m.dtype == torch.int32 and isinstance(expected_m, int) and a[0].shape[1] % 128 == 0
    assert a[1].stride(-2) == 1, "scales are to be column-major"
    for group, count in enumerate(masked_m.tolist()):
        a_rows = wide(a[0][group, :count], a[1][group, :count], 1)
        d[group, :count] = (a_rows @ wide(b[0][group], b[1][group], 128).T).bfloat16()
        d[group, count:] = torch.nan  # what they leave there is nobody's

def m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices):
    assert m_indices.dtype == torch.int32 and len(m_indices) == len(a[0]) and len(a[0]) % 128 == 0
    for owners in m_indices.view(-1, 128):
        assert len(set(owners.tolist()) - {-1}) == 1, "a tile of two experts"
    for row, owner in enumerate(m_indices.tolist()):
        if owner >= 0:
            d[row] = (wide(a[0][row, None], a[1][row, None], 1)[0] @ wide(b[0][owner], b[1][owner], 128).T).bfloat16()
"""


@pytest.fixture(autouse=True)
def _imports_of_this_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("deep_gemm", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    carry(tmp_path, VLLM, FUSED_MOE.replace("MORE", ""))
    carry(tmp_path, "deep_gemm/__init__.py", DEEP_GEMM)
    return tmp_path


def carry(folder: Path, file: str, text: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)


def row_of(rival: str, folder: Path | None, rows: int = 20) -> dict[str, object]:
    """As the script's section makes it, at tiny sizes: three of eight experts are here."""
    setting = Setting(CPU, "tiny", time.monotonic() + 60, folder)
    make = partial(EXPERTS[rival], draw=Draw(CPU), config=CONFIG, rows=rows, held=3)
    (row,) = each(setting, iter([(rival, partial(beside, rival, make, setting))]))
    return row


@pytest.mark.parametrize("rows", [20, 70])
@pytest.mark.parametrize("rival", EXPERTS)
def test_a_rival_gets_the_same_work(rival: str, rows: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and of 64; the layout of decode, and that of prompts."""
    monkeypatch.setattr("braid.benchmarks.gpu.rival_experts.MASKED_ROWS", 20)
    row = row_of(rival, folder, rows)
    assert "failed" not in row, row
    assert {"rival", "us", "ours_us", "ratio"} <= set(row)
    assert isinstance(difference := row["difference"], float)
    assert difference < AGREES / 5


def test_a_rival_that_computes_something_else_is_not_timed(folder: Path) -> None:
    carry(folder, "deep_gemm/__init__.py", DEEP_GEMM.replace("codes.float() *", "codes.float() * 1.5 *"))
    row = row_of("DeepGEMM", folder)
    assert "us" not in row
    assert "differs from ours by" in str(row["failed"])


def test_what_is_absent_or_has_another_interface_says_so(folder: Path, tmp_path: Path) -> None:
    assert "pass --rivals DIR" in str(row_of("DeepGEMM", None)["failed"])
    carry(folder, VLLM, FUSED_MOE.replace("MORE", "stride_of_tomorrow,"))
    assert "asks for stride_of_tomorrow, which vLLM 0.32's did not" in str(row_of("vLLM Triton", folder)["failed"])
    (folder / VLLM).unlink()
    assert VLLM in str(row_of("vLLM Triton", folder)["failed"])
    carry(folder, "deep_gemm/__init__.py", DEEP_GEMM.replace("m_grouped_fp8_gemm_nt_masked", "renamed"))
    told = "deep_gemm has no m_grouped_fp8_gemm_nt_masked or fp8_m_grouped_gemm_nt_masked"
    assert told in str(row_of("DeepGEMM", folder)["failed"])


def test_a_rival_that_is_not_carried_names_the_folder(tmp_path: Path) -> None:
    assert f"no deep_gemm in {tmp_path} that loads here" in str(row_of("DeepGEMM", tmp_path)["failed"])


def test_experts_are_compared_in_decode_and_in_prefill() -> None:
    works = [(rival, what) for rival, what, _ in comparisons(Setting(CPU, "v3", time.monotonic()))]
    for rival in EXPERTS:
        assert (rival, "experts fp8 32 of 256, 128 rows") in works
        assert (rival, "experts fp8 32 of 256, 4096 rows") in works
