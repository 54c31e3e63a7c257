"""Loading by role: the right bits in the right place, nothing else read, and not twice the memory."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from braid.kernels.quant import dequantise
from braid.kernels.reference import linear
from braid.model.checkpoint import Checkpoint
from braid.model.network_weights import from_state_dict
from braid.model.safetensors_file import CheckpointError
from braid.model.tensor_names import mtp_copies
from braid.model.torch_ops import TorchOps
from braid.model.weights import load_attention, load_experts

PACKING = TorchOps(is_packing=True)
WriteCheckpoint = Callable[..., Path]
MTP_LAYER = 3

# Prints what loading cost above the interpreter's own memory, and what stayed.
MEASURE = """
import json, sys, torch
from pathlib import Path
from braid.model.checkpoint import Checkpoint
from braid.model.weights import load_attention, load_experts
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
checkpoint, role, seen = Checkpoint(sys.argv[1]), sys.argv[2], []
config, progress = checkpoint.config, lambda done, total: seen.append((done, total))
before = status("VmRSS")
if role == "attention":
    kept = load_attention(checkpoint, config, torch.bfloat16, progress)
else:
    kept = load_experts(checkpoint, config, range(config.num_hidden_layers), range(8), torch.bfloat16, progress)
print(json.dumps({"peak": status("VmHWM") - before, "resident": seen[-1][1], "done": seen[-1][0]}))
"""


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor as float32, fp8 dequantised; without the MTP module's copies, for which the main ones serve."""
    raw = {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    state = {}
    for name, tensor in raw.items():
        if tensor.dtype == torch.float8_e4m3fn:
            state[name] = dequantise(tensor, raw[name + "_scale_inv"], torch.empty(tensor.shape))
        elif not name.endswith("_scale_inv"):
            state[name] = tensor.float()
    return {name: tensor for name, tensor in state.items() if name not in mtp_copies(Checkpoint(path).config)}


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)


def assert_same(got: Any, expected: Any) -> None:
    pairs = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert pairs
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "fp8", "ue8m0"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_loads_what_the_files_hold(write_checkpoint: WriteCheckpoint, dtype: str, wanted: torch.dtype) -> None:
    path = write_checkpoint(dtype=dtype)
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    attention, experts = from_state_dict(config, stored(path), wanted)
    assert_same(load_attention(checkpoint, config, wanted, has_mtp=True), attention)
    loaded = load_experts(checkpoint, config, range(4), range(8), wanted)
    assert loaded.keys() == experts.keys() == {1, 2, MTP_LAYER}
    for layer, stack in experts.items():
        assert_same(loaded[layer], stack)
        assert loaded[layer].expert_ids == stack.expert_ids


def test_without_q_lora_and_with_tied_embeddings(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(changes={"q_lora_rank": None, "tie_word_embeddings": True, "model_type": "deepseek_v2"})
    checkpoint = Checkpoint(path)
    expected, _ = from_state_dict(checkpoint.config, stored(path), torch.float32)
    loaded = load_attention(checkpoint, checkpoint.config, torch.float32, has_mtp=True)
    assert_same(loaded, expected)
    assert loaded.lm_head is loaded.embed_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_multiply_to_the_same_bits(write_checkpoint: WriteCheckpoint, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(write_checkpoint())
    config = checkpoint.config
    plain = load_attention(checkpoint, config, dtype, has_mtp=True)
    prepared = load_attention(checkpoint, config, dtype, has_mtp=True, ops=PACKING)
    pairs = list(zip(tensors_of(prepared), tensors_of(plain), strict=True))
    stacks = load_experts(checkpoint, config, range(4), range(8), dtype)
    for layer, stack in load_experts(checkpoint, config, range(4), range(8), dtype, ops=PACKING).items():
        pairs += [*zip(stack.w13, stacks[layer].w13, strict=True), *zip(stack.w2, stacks[layer].w2, strict=True)]
        assert stack.expert_ids == stacks[layer].expert_ids
    for one, other in pairs:
        assert one.shape == other.shape
        if one.is_mkldnn:
            x = torch.randn(5, one.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
            assert torch.equal(linear(x, one), linear(x, other))
        else:
            assert torch.equal(one, other)


def test_some_experts_in_the_order_asked_for(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint()
    checkpoint = Checkpoint(path)
    _, every = from_state_dict(checkpoint.config, stored(path), torch.float32)
    (some,) = load_experts(checkpoint, checkpoint.config, [2], [5, 0], torch.float32).values()
    assert some.expert_ids == (5, 0)
    for stack, source in ((some.w13, every[2].w13), (some.w2, every[2].w2)):
        assert isinstance(stack, Tensor)
        assert isinstance(source, Tensor)
        assert torch.equal(stack, source[[5, 0]])


def test_an_expert_worker_reads_its_experts_and_nothing_else(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = Checkpoint(write_checkpoint(dtype="fp8"))
    load_experts(checkpoint, checkpoint.config, [1, 2], [3, 6], torch.float32)
    weights = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"
        for layer in (1, 2)
        for expert in (3, 6)
        for kind in ("gate", "up", "down")
    }
    assert checkpoint.names_read == weights | {name + "_scale_inv" for name in weights}


def test_an_attention_worker_reads_no_routed_expert_and_no_mtp_unless_asked(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = Checkpoint(write_checkpoint(dtype="fp8"))
    weights = load_attention(checkpoint, checkpoint.config, torch.float32)
    assert weights.mtp == ()
    assert not any(".mlp.experts." in name or ".layers.3." in name for name in checkpoint.names_read)


def test_the_mtp_modules_copies_are_neither_read_nor_held_twice(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = Checkpoint(write_checkpoint())
    weights = load_attention(checkpoint, checkpoint.config, torch.float32, has_mtp=True)
    assert weights.mtp[0].embed_tokens is weights.embed_tokens
    assert weights.mtp[0].shared_head is weights.lm_head
    assert not mtp_copies(checkpoint.config) & checkpoint.names_read


@pytest.mark.parametrize("role", ["attention", "experts"])
def test_progress_counts_every_byte_once(write_checkpoint: WriteCheckpoint, role: str) -> None:
    checkpoint = Checkpoint(write_checkpoint(changes={"topk_method": "greedy"}))
    config, seen = checkpoint.config, list[tuple[int, int]]()
    loaded: Any
    if role == "attention":
        loaded = load_attention(checkpoint, config, torch.bfloat16, lambda *step: seen.append(step))
    else:
        loaded = tuple(
            load_experts(checkpoint, config, [1], range(8), torch.bfloat16, lambda *step: seen.append(step)).values()
        )
    gates = 2 * 8 * config.hidden_size * 2 if role == "attention" else 0  # kept as fp32, counted as bfloat16
    absorbed = sum(w.nbytes for layer in loaded.layers for w in (layer.w_uk, layer.w_uv)) if role == "attention" else 0
    resident = sum(tensor.nbytes for tensor in tensors_of(loaded)) - gates - absorbed
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert seen[-1] == (resident, resident)


def test_impossible_experts_are_refused(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = Checkpoint(write_checkpoint())
    for expert_ids in ([8], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"must be different and lie in 0\.\.7"):
            load_experts(checkpoint, checkpoint.config, [1], expert_ids, torch.float32)


def test_damage_is_said_before_anything_is_read(write_checkpoint: WriteCheckpoint) -> None:
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    checkpoint = Checkpoint(write_checkpoint(edit=lambda state: state.__delitem__(name)))
    seen: list[int] = []
    with pytest.raises(CheckpointError, match=r"experts\.7\.down_proj"):
        load_experts(checkpoint, checkpoint.config, [1], [0], torch.float32, lambda done, total: seen.append(done))
    assert seen == []
    assert checkpoint.names_read == frozenset()


@pytest.mark.parametrize("role", ["attention", "experts"])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_peak_memory_is_little_more_than_what_stays(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, role: str, dtype: str
) -> None:
    sizes = {"attention": {"vocab_size": 24000, "intermediate_size": 8192}, "experts": {"moe_intermediate_size": 2048}}
    changes = {"hidden_size": 1024, "num_nextn_predict_layers": 0, "n_shared_experts": 0, **sizes[role]}
    path = write_checkpoint(dtype=dtype, changes=changes)
    command = [sys.executable, "-P", "-c", MEASURE, str(path), role]
    measured = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout)
    assert measured["done"] == measured["resident"] > 100e6
    assert measured["peak"] <= 1.2 * measured["resident"]
