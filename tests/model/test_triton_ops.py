"""A whole network through the Triton kernels, in the interpreter: as good as torch's bf16, and row-invariant.

The bounds on errors are shares of the logits' own spread. Weights and activations of an fp8 checkpoint carry 4 bits of
mantissa, so that two layers of it are allowed 6%; in bf16 the reference family's own error is the measure.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from triton.runtime.interpreter import GridExecutor
from triton_models import BF16, BLOCKS, CPU, F32, FP8, PLAIN, Loaded, WriteCheckpoint, run, token_ids, triton_ops

from braid.kernels.quant import BlockFp8
from braid.model.checkpoint import Checkpoint
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.mla import plan_attention
from braid.model.mtp import MtpModule
from braid.model.self_test import self_test
from braid.model.step_buffers import StepBuffers
from braid.model.torch_ops import TorchOps
from braid.model.triton_ops import Normed, TritonOps


def steps(network: DeepSeekModel, ids: Tensor, num_prompt: int) -> Tensor:
    """The prompt in one piece, the rest as drafts that are verified: in one absorbed segment."""
    prompt = run(network, ids[:num_prompt], 0, absorbed=False)
    return torch.cat((prompt, run(network, ids[num_prompt:], num_prompt, absorbed=True)))


def error(logits: Tensor, exact: Tensor) -> float:
    """Of a typical number, as a share of the logits' spread. A median: a row may choose another expert."""
    assert not logits.isnan().any()
    return float((logits - exact).abs().median() / exact.std())


def assert_same_tokens(logits: Tensor, exact: Tensor, margin: float) -> None:
    """Where the best token leads by more than `margin` spreads."""
    best = exact.topk(2, dim=1)
    leads = (best.values[:, 0] - best.values[:, 1]) / exact.std() > margin
    assert leads.sum() >= 3, "hardly a row leads by that much: the test would prove little"
    assert torch.equal(logits.argmax(1)[leads], best.indices[:, 0][leads])


@pytest.fixture
def fp8(write_checkpoint: WriteCheckpoint) -> Loaded:
    path = write_checkpoint(dtype="fp8", changes=FP8)
    return Loaded.of(path, BF16, triton_ops(path))


@pytest.mark.parametrize("scale_format", ["fp8", "ue8m0"])
def test_an_fp8_checkpoint(write_checkpoint: WriteCheckpoint, scale_format: str) -> None:
    path, ids = write_checkpoint(dtype=scale_format, changes=FP8), token_ids(13)
    quantization = Checkpoint(path).config.quantization
    assert quantization is not None
    ops = TritonOps(CPU, replace(quantization, scale_fmt="ue8m0" if scale_format == "ue8m0" else None))
    exact = steps(Loaded.of(path, F32, TorchOps()).network(), ids, 10)
    got = steps(Loaded.of(path, BF16, ops).network(), ids, 10)
    assert error(got, exact) < 0.06
    assert_same_tokens(got, exact, margin=0.15)


def test_what_fp8_keeps_comes_as_it_is_stored(fp8: Loaded) -> None:
    stored = {name: t for shard in fp8.checkpoint.shards for name, t in load_file(shard).items()}

    def assert_stored(weight: Any, *names: str) -> None:
        assert isinstance(weight, BlockFp8)
        codes, scales = (torch.cat([stored[name + end] for name in names]) for end in ("", "_scale_inv"))
        assert torch.equal(weight.codes.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(weight.scales, scales)

    dense, sparse = fp8.weights.layers
    attention = "model.layers.1.self_attn."
    assert_stored(sparse.qkv_a_proj, attention + "q_a_proj.weight", attention + "kv_a_proj_with_mqa.weight")
    assert_stored(sparse.q_b_proj, attention + "q_b_proj.weight")
    assert_stored(sparse.o_proj, attention + "o_proj.weight")
    assert sparse.shared is not None
    assert dense.mlp is not None
    mlp = "model.layers.1.mlp.shared_experts."
    assert_stored(sparse.shared.w13, mlp + "gate_proj.weight", mlp + "up_proj.weight")
    assert_stored(sparse.shared.w2, mlp + "down_proj.weight")
    assert dense.mlp.w13.dtype == dense.mlp.w2.dtype == sparse.kv_b_proj.dtype == BF16
    for expert in range(4):
        w13, w2 = (
            BlockFp8(stack.codes[expert], stack.scales[expert]) for stack in (fp8.experts[1].w13, fp8.experts[1].w2)
        )
        mlp = f"model.layers.1.mlp.experts.{expert}."
        assert_stored(w13, mlp + "gate_proj.weight", mlp + "up_proj.weight")
        assert_stored(w2, mlp + "down_proj.weight")


def test_a_bf16_checkpoint_of_odd_sizes_without_q_lora(write_checkpoint: WriteCheckpoint) -> None:
    path, ids = write_checkpoint(changes=PLAIN), token_ids(13)
    exact = steps(Loaded.of(path, F32, TorchOps()).network(), ids, 10)
    theirs = steps(Loaded.of(path, BF16, TorchOps()).network(), ids, 10)
    got = steps(Loaded.of(path, BF16, triton_ops(path)).network(), ids, 10)
    assert error(got, exact) < 1.3 * error(theirs, exact)
    assert_same_tokens(got, exact, margin=0.1)


def test_fp8_weights_agree_with_the_same_in_bf16(fp8: Loaded) -> None:
    ids = token_ids(6)
    dequantised = Loaded.of(fp8.checkpoint.path, BF16, TritonOps(CPU))
    assert isinstance(dequantised.weights.layers[1].o_proj, Tensor)
    assert error(run(fp8.network(), ids, 0, False), run(dequantised.network(), ids, 0, False)) < 0.06


def test_a_row_keeps_its_bits(fp8: Loaded) -> None:
    """Chunks of a prompt, a segment of drafts, neighbours in both forms: a row's logits are one and the same."""
    ids, other = token_ids(8), token_ids(20)[15:]
    alone = fp8.network()
    whole = run(alone, ids[:6], 0, False)
    decoded = torch.cat([run(alone, ids[at : at + 1], at, True) for at in range(6, 8)])
    network = fp8.network()
    assert torch.equal(run(network, ids[:4], 0, False), whole[:4])
    mixed = [Segment(4, 2, BLOCKS[:1], False), Segment(0, 5, BLOCKS[1:2], False)]
    mixed_ids = torch.cat((ids[4:6], other))
    logits = network.forward(Batch(mixed_ids, mixed, torch.arange(7))).logits
    assert torch.equal(logits[:2], whole[4:])
    drafts = [Segment(5, 1, BLOCKS[1:2], True), Segment(6, 2, BLOCKS[:1], True)]
    logits = network.forward(Batch(torch.cat((other[:1], ids[6:])), drafts, torch.arange(3))).logits
    assert torch.equal(logits[1:], decoded)


def test_an_mtp_module_drafts(fp8: Loaded) -> None:
    def drafted(loaded: Loaded, hidden: Tensor, absorbed: bool) -> Tensor:
        config, main = loaded.checkpoint.config, loaded.network()
        module = MtpModule(config, loaded.weights.mtp[0], main.cache, LocalExperts(loaded.experts), main.rope)
        out = module.draft(hidden.to(loaded.dtype), ids, [Segment(0, 5, BLOCKS, absorbed)], torch.arange(5))
        return out.logits

    ids, reference = token_ids(5), Loaded.of(fp8.checkpoint.path, F32, TorchOps())
    hidden = torch.randn(5, fp8.checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(3))
    for absorbed in (False, True):
        assert error(drafted(fp8, hidden, absorbed), drafted(reference, hidden, absorbed)) < 0.06


def test_rows_that_verify_drafts_share_tiles_and_keep_their_bits(fp8: Loaded) -> None:
    """One, two and three rows of three sequences, drafted by the module, in one pass: each has the logits and the
    hidden row of a step in which it is its sequence's only one."""
    network, alone, config = fp8.network(), fp8.network(), fp8.checkpoint.config
    tables = [[block] for block in BLOCKS[:3]]
    prompts = list(token_ids(6).split([2, 1, 3]))
    module = MtpModule(config, fp8.weights.mtp[0], network.cache, LocalExperts(fp8.experts), network.rope)
    segments = [Segment(0, len(ids), table, False) for ids, table in zip(prompts, tables, strict=True)]
    ends = torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1
    output = network.forward(Batch(torch.cat(prompts), segments, ends))
    for layer, theirs in zip(alone.cache.layers, network.cache.layers, strict=True):
        layer.copy_(theirs)
    newest = output.logits.argmax(1)
    after = torch.cat([torch.cat((ids[1:], one[None])) for ids, one in zip(prompts, newest, strict=True)])
    first = module.draft(output.hidden, after, segments, ends[1:])
    drafts = first.logits.argmax(1)
    second = module.draft(first.hidden[1:], drafts[1:], [Segment(3, 1, tables[2], True)], torch.tensor([0]))
    rows = [
        newest[:1],
        torch.stack((newest[1], drafts[0])),
        torch.cat((newest[2:], drafts[1:], second.logits.argmax(1))),
    ]
    verified = [Segment(len(ids), len(r), t, True) for ids, r, t in zip(prompts, rows, tables, strict=True)]
    together = network.forward(Batch(torch.cat(rows), verified, torch.arange(6)))
    first_rows = (0, 1, 3)
    for step in range(3):  # one row of each sequence that has so many
        owners = range(step, 3)
        ones = [Segment(verified[i].start + step, 1, tables[i], True) for i in owners]
        expected = alone.forward(Batch(torch.stack([rows[i][step] for i in owners]), ones, torch.arange(3 - step)))
        of_step = [first_rows[i] + step for i in owners]
        assert torch.equal(together.logits[of_step], expected.logits), step
        assert torch.equal(together.hidden[of_step], expected.hidden), step
    ops, shape = fp8.weights.ops, (config.num_attention_heads, config.latent_dim)
    mixed = plan_attention([*verified, Segment(0, 1, [1], False)], *shape, ops)
    for plan in (plan_attention(verified, *shape, ops, StepBuffers(config, BF16, ops)), mixed):
        assert plan.runs[0].plan.parts[0].items[0] == 3  # six rows, and three tiles of keys are read


def test_a_plan_follows_its_memory() -> None:
    """Other positions and blocks, and rows that were one sequence's are now two sequences' and the other way round."""
    ops, generator = TritonOps(CPU), torch.Generator().manual_seed(0)
    cache = torch.randn(2, 64, 48, generator=generator).to(BF16)
    q, positions, tables, firsts = (
        torch.randn(3, 1, 48, generator=generator).to(BF16),
        torch.tensor([3, 70, 71]),
        torch.zeros(3, 2).long(),
        torch.tensor([0, 1, 1]),
    )
    tables[:] = torch.tensor([1, 0])
    plan = ops.plan_decode(positions, tables, firsts, 1, 48)
    positions.copy_(torch.tensor([63, 64, 2]))
    firsts.copy_(torch.tensor([0, 0, 2]))
    tables[:2] = torch.tensor([0, 1])
    again = ops.plan_decode(positions, tables, firsts, 1, 48, plan)
    assert again is plan
    fresh = ops.plan_decode(positions.clone(), tables.clone(), firsts.clone(), 1, 48)
    assert torch.equal(ops.mla_decode(q, cache, plan, 0.2, 32), ops.mla_decode(q, cache, fresh, 0.2, 32))
    alone = ops.plan_decode(positions, tables, torch.arange(3), 1, 48)
    assert torch.equal(ops.mla_decode(q, cache, plan, 0.2, 32), ops.mla_decode(q, cache, alone, 0.2, 32))


def test_norms_leave_what_products_read(fp8: Loaded) -> None:
    ops, weights = fp8.weights.ops, fp8.weights.layers[1]
    x, hidden = torch.randn(3, 144, generator=torch.Generator().manual_seed(0)).to(BF16), 144
    operand = ops.operand(
        torch.empty(3, hidden, dtype=BF16), lambda _name, width, dtype: torch.empty(3, width, dtype=dtype)
    )
    assert isinstance(operand, Normed)
    normed = ops.rms_norm(x, weights.input_layernorm, 1e-6, out=operand)
    assert torch.equal(ops.tensor(normed), ops.rms_norm(x, weights.input_layernorm, 1e-6))
    assert torch.equal(ops.linear(normed, weights.qkv_a_proj), ops.linear(normed.rows, weights.qkv_a_proj))


def test_it_passes_the_start_up_proof(fp8: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braid.model.self_test.SLICES", ((39, 40), (2, 20)))  # the interpreter is slow
    self_test(fp8.checkpoint.config, BF16, fp8.weights.ops)


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
def test_a_step_asks_nothing_of_the_device(
    write_checkpoint: WriteCheckpoint, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has no numbers to be read: the host's part of every step runs, and no kernel does."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
    path = write_checkpoint(dtype=dtype, changes=FP8)
    meta = Loaded.of(path, BF16, TritonOps(torch.device("meta"), Checkpoint(path).config.quantization))
    network, ids = meta.network(), token_ids(9)
    for num, start, absorbed in ((6, 0, False), (2, 6, True), (2, 7, True), (1, 8, True)):
        logits = run(network, ids[:num], start, absorbed)
        assert logits.shape == (num, 160)
        assert logits.is_meta
    mixed = [Segment(6, 1, BLOCKS[:1], True), Segment(0, 5, BLOCKS[1:2], False)]
    batch = Batch(ids[:6], mixed, torch.tensor([0, 5]), wants_hidden=False)
    assert network.forward(batch).logits.shape == (2, 160)
    module = MtpModule(network.config, meta.weights.mtp[0], network.cache, LocalExperts(meta.experts), network.rope)
    hidden = network.forward(Batch(ids[:2], [Segment(6, 2, BLOCKS, True)], torch.arange(2))).hidden
    assert module.draft(hidden, ids[:2], [Segment(6, 2, BLOCKS, True)], torch.tensor([1])).logits.shape == (1, 160)
