"""The network on the GPU as workers run it: the start-up proof, the bundled model beside the CPU, steps as graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from braid.model.checkpoint import Checkpoint
from braid.model.config import ModelConfig
from braid.model.deepseek import Batch, DeepSeekModel, Segment
from braid.model.experts import LocalExperts
from braid.model.kv_cache import LatentCache
from braid.model.ops import Ops
from braid.model.self_test import self_test
from braid.model.torch_ops import TorchOps
from braid.model.triton_ops import TritonOps
from braid.model.weights import load_attention, load_experts

from .setting import Row, Setting, each
from .sizes import BUNDLED, V3

PATH = Path(__file__).resolve().parents[2] / "model" / "bundled"
SEQUENCES, PROMPT, STEPS = 4, 100, 40
TABLES = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(SEQUENCES)]
GROUPS = ((1, 2, 3), (2, 3, 1), (3, 1, 2))  # rows of three sequences in a step, in turn
MAX_ERROR = 0.015  # of a typical logit, as a share of their spread; bf16 on a CPU: 0.0043


class EagerOps(TritonOps):
    """Calls its kernels anew in every step."""

    def noted(self, work: Callable[[], object]) -> None:
        work()


def check(setting: Setting) -> Iterator[Row]:
    """Rows with `passed`, and us of a step."""
    if setting.device.type != "cuda":
        yield {"name": "network", "failed": "tests/model has the same in Triton's interpreter, which is slow"}
        return
    with torch.inference_mode():
        yield from each(setting, rows(setting.device))


def rows(device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    for name, config in (("V3", V3), ("bundled", BUNDLED)):
        yield f"start-up proof, {name}", partial(proof, config, device)
    yield "bundled model, GPU beside CPU", partial(beside_cpu, device)
    yield "bundled model, steps as graphs", partial(played, device)
    yield "bundled model, rows of a sequence together", partial(verified, device)


def proof(config: ModelConfig, device: torch.device) -> Row:
    begun = time.perf_counter()
    self_test(config, torch.bfloat16, TritonOps(device, config.quantization))
    return {"passed": True, "seconds": time.perf_counter() - begun}


def beside_cpu(device: torch.device) -> Row:
    exact = torch.stack(list(steps(network(torch.float32, TorchOps()))))
    got = torch.stack(list(steps(network(torch.bfloat16, TritonOps(device)))))
    error = float((got - exact).abs().median() / exact.std())
    agreed = float((got.argmax(-1) == exact.argmax(-1)).float().mean())
    return {"passed": error < MAX_ERROR, "median_error": error, "same_tokens": agreed}


def played(device: torch.device) -> Row:
    """After the first of its shape a step is a graph; its bits must be those of the calls, and of a row alone."""
    graphs, eager = network(torch.bfloat16, TritonOps(device)), network(torch.bfloat16, EagerOps(device))
    alone = network(torch.bfloat16, TritonOps(device))
    together = list(steps(graphs))
    passed = all(torch.equal(one, other) for one, other in zip(together, steps(eager), strict=True))
    passed &= all(torch.equal(one[:1], other) for one, other in zip(together, steps(alone, 1), strict=True))
    return {"passed": passed, "us": step_us(graphs), "eager_us": step_us(eager)}


def verified(device: torch.device) -> Row:
    """As drafts are verified: one graph of six rows, whichever sequences they are of; the bits are those of rows that
    come one by one."""
    one_by_one = torch.stack(list(steps(network(torch.bfloat16, TritonOps(device)), len(GROUPS))), 1)
    together = in_groups(network(torch.bfloat16, TritonOps(device)))
    return {"passed": torch.equal(together, one_by_one[:, : together.shape[1]]), "rows": together.shape[1]}


def network(dtype: torch.dtype, ops: Ops) -> DeepSeekModel:
    checkpoint, config = Checkpoint(PATH), BUNDLED
    layers, every = range(config.num_hidden_layers), range(config.n_routed_experts or 0)
    experts = LocalExperts(load_experts(checkpoint, config, layers, every, dtype, ops=ops))
    cache = LatentCache(config, 3 * SEQUENCES, dtype, device=ops.device)
    return DeepSeekModel(config, load_attention(checkpoint, config, dtype, ops=ops), cache, experts)


def steps(model: DeepSeekModel, sequences: int = SEQUENCES) -> Iterator[Tensor]:
    """Logits [sequences, vocab] on the host: of the prompts' last rows, then of random tokens after them."""
    ids = token_ids()
    yield prefill(model, ids[:sequences]).cpu()
    for at in range(PROMPT, PROMPT + STEPS):
        yield decode(model, ids[:sequences, at], at).cpu()


def in_groups(model: DeepSeekModel) -> Tensor:
    """[sequences, rows, vocab] on the host: what `steps` gives, with several rows of a sequence in one step."""
    ids, count = token_ids()[: len(GROUPS)], len(GROUPS)
    logits, ends = [[row] for row in prefill(model, ids).cpu()[:, None]], [PROMPT] * count
    for turn in range(STEPS // sum(GROUPS[0]) * count):
        nums = GROUPS[turn % count]
        segments = [Segment(end, num, table, True) for end, num, table in zip(ends, nums, TABLES, strict=False)]
        own_ids = torch.cat([own[s.start : s.start + s.num] for own, s in zip(ids, segments, strict=True)])
        out = model.forward(Batch(own_ids, segments, torch.arange(len(own_ids)))).logits.cpu()
        for seen, more in zip(logits, out.split_with_sizes(nums), strict=True):
            seen.append(more)
        ends = [end + num for end, num in zip(ends, nums, strict=True)]
    return torch.stack([torch.cat(seen) for seen in logits])


def token_ids() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(BUNDLED.vocab_size, (SEQUENCES, PROMPT + STEPS), generator=generator)


def prefill(model: DeepSeekModel, ids: Tensor) -> Tensor:
    """Logits of the prompts' last rows."""
    prompts = [Segment(0, PROMPT, table, False) for table in TABLES[: len(ids)]]
    last_rows = torch.arange(1, len(ids) + 1) * PROMPT - 1
    logits: Tensor = model.forward(Batch(ids[:, :PROMPT].flatten(), prompts, last_rows)).logits
    return logits


def decode(model: DeepSeekModel, ids: Tensor, position: int) -> Tensor:
    segments = [Segment(position, 1, table, True) for table in TABLES[: len(ids)]]
    logits: Tensor = model.forward(Batch(ids, segments, torch.arange(len(ids)))).logits
    return logits


def step_us(model: DeepSeekModel) -> float:
    """Of a whole step, with the host's part and its waiting for the end."""
    ids, seconds = torch.arange(SEQUENCES), []
    for _ in range(50):
        begun = time.perf_counter()
        decode(model, ids, PROMPT + STEPS)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(seconds)
