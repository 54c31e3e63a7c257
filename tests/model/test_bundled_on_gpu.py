"""The bundled model through the kernels for GPUs, here in Triton's interpreter, against the CPU in float32."""

from __future__ import annotations

from pathlib import Path

import torch
import triton_interpreter
from torch import Tensor

from braid.model.checkpoint import Checkpoint
from braid.model.config import ModelConfig
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.kv_cache import LatentCache
from braid.model.ops import Ops
from braid.model.tokenizer import Tokenizer
from braid.model.torch_ops import TorchOps
from braid.model.triton_ops import TritonOps
from braid.model.weights import load_attention, load_experts

triton_interpreter.repair()

BUNDLED = Path(__file__).parents[2] / "model" / "bundled"
PROMPT = "def read_lines(path"
MAX_ERROR = 0.05  # of the logits' spread: bfloat16 through five layers
MAX_LOGPROB_ERROR = 0.05


def logits_of(ops: Ops, dtype: torch.dtype) -> Tensor:
    """[N, vocab]: all but the last token of the prompt in the MHA form, that one in the absorbed form."""
    config, checkpoint = ModelConfig.from_path(BUNDLED), Checkpoint(BUNDLED)
    ids = torch.tensor(Tokenizer(BUNDLED).encode(PROMPT))
    layers, experts = range(config.num_hidden_layers), tuple(range(config.n_routed_experts or 0))
    weights = load_attention(checkpoint, config, dtype, has_mtp=False, ops=ops)
    local = LocalExperts(load_experts(checkpoint, config, layers, experts, dtype, ops=ops))
    network = DeepSeekModel(config, weights, LatentCache(config, 2, dtype), local)
    last = len(ids) - 1
    prompt = network.forward(Batch(ids[:last], [Segment(0, last, [1], False)], torch.arange(last))).logits
    token = network.forward(Batch(ids[last:], [Segment(last, 1, [1], True)], torch.arange(1))).logits
    return torch.cat([prompt, token])


def test_its_logits_are_those_of_the_cpu() -> None:
    with torch.inference_mode():
        exact = logits_of(TorchOps(), torch.float32)
        ours = logits_of(TritonOps(torch.device("cpu"), None), torch.bfloat16)
    errors = (ours - exact).abs() / exact.std(dim=-1, keepdim=True)
    assert errors.max() < MAX_ERROR
    best = exact.argmax(dim=-1, keepdim=True)
    assert torch.equal(ours.argmax(dim=-1, keepdim=True), best)
    logprobs = [torch.log_softmax(logits, dim=-1).gather(1, best) for logits in (ours, exact)]
    assert (logprobs[0] - logprobs[1]).abs().max() < MAX_LOGPROB_ERROR
