"""An fp8 checkpoint, loaded and run by us, against transformers on the same weights dequantised in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import FAMILIES
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from braid.kernels.quant import ScaleFormat
from braid.model.checkpoint import Checkpoint
from braid.model.convert import convert
from braid.model.deepseek import Batch, DeepSeekModel
from braid.model.experts import LocalExperts
from braid.model.kv_cache import LatentCache
from braid.model.mla import Segment
from braid.model.ops import Ops
from braid.model.weights import load_attention, load_experts

SIZES = {  # several blocks and smaller edge blocks both ways
    "vocab_size": 200,
    "hidden_size": 144,
    "intermediate_size": 272,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 132,
    "kv_lora_rank": 130,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 8,
    "v_head_dim": 36,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 256,
}
NUM_PROMPT, NUM_TOKENS = 40, 48


def dequantise_float64(path: Path) -> dict[str, Tensor]:
    """Name -> float32, the product of code and scale made in float64 by indexing, with none of our code."""
    (shard,) = path.glob("*.safetensors")
    raw, state = load_file(shard), {}
    for name, tensor in raw.items():
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = np.indices(tensor.shape)
            scale = raw[name + "_scale_inv"].double().numpy()[rows // 128, columns // 128]
            state[name] = torch.from_numpy((tensor.double().numpy() * scale).astype(np.float32))
        elif not name.endswith("_scale_inv"):
            state[name] = tensor.float()
    return state


def oracle_logits(path: Path, config: DeepseekV3Config, state: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    config.save_pretrained(path)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    model = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return torch.as_tensor(model(token_ids[None]).logits[0])


def our_logits(path: Path, token_ids: Tensor, ops: Ops) -> Tensor:
    """The prompt in one piece, the rest one token at a time."""
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    cache = LatentCache(config, num_blocks=1, dtype=torch.float32)
    experts = LocalExperts(load_experts(checkpoint, config, range(3), range(8), torch.float32, ops=ops))
    model = DeepSeekModel(config, load_attention(checkpoint, config, torch.float32, ops=ops), cache, experts)
    starts = [0, *range(NUM_PROMPT, NUM_TOKENS)]
    logits = []
    for start, stop in zip(starts, [*starts[1:], NUM_TOKENS], strict=True):
        segment = Segment(start, stop - start, [0], absorbed=start > 0)
        logits.append(model.forward(Batch(token_ids[start:stop], [segment], torch.arange(stop - start))).logits)
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_logits_of_an_fp8_checkpoint(tmp_path: Path, scale_format: ScaleFormat, family: str) -> None:
    torch.manual_seed(1)
    config = DeepseekV3Config(**SIZES, initializer_range=0.1)
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "float32")
    convert(tmp_path / "float32", tmp_path / "fp8", "fp8", scale_format=scale_format)
    token_ids = torch.randint(0, 200, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    expected = oracle_logits(tmp_path / "oracle", config, dequantise_float64(tmp_path / "fp8"), token_ids)
    got = our_logits(tmp_path / "fp8", token_ids, FAMILIES[family])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(dim=1), expected.argmax(dim=1))
    assert expected.std() > 0.5  # logits so small that anything agrees would prove nothing
