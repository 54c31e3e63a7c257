"""The MTP module against an independent float64 implementation and against transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest
import torch
from generators import make_hf_model
from small_models import NUM_BLOCKS, shuffled_table, small_model
from torch import Tensor
from transformers.modeling_layers import MtpModel

from braid.model.config import ModelConfig, yarn_mscale
from braid.model.deepseek import Batch
from braid.model.experts import LocalExperts
from braid.model.kv_cache import LatentCache
from braid.model.mla import Segment
from braid.model.mtp import MtpModule
from braid.model.network_weights import from_state_dict
from braid.model.rope import RopeTable, inverse_frequencies
from braid.model.tensor_names import expected_tensors

LENGTH = 90


@dataclass(frozen=True)
class Case:
    config: ModelConfig
    state: dict[str, Tensor]
    hidden: Tensor
    next_ids: Tensor


@cache
def case(shape_name: str) -> Case:
    _, values = make_hf_model(shape_name, num_mtp_layers=1)
    config = ModelConfig.from_dict(values)
    generator = torch.Generator().manual_seed(5)
    state = dict(small_model(shape_name).state)
    for name, shape in expected_tensors(config, ["mtp"]).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            state[name] = 1.0 + 0.2 * noise
        else:
            state[name] = 0.05 * noise if noise.dim() == 1 else noise * shape[-1] ** -0.5
    hidden = torch.randn(LENGTH, config.hidden_size, generator=generator)
    return Case(config, state, hidden, torch.randint(config.vocab_size, (LENGTH,), generator=generator))


def module(given: Case) -> MtpModule:
    weights, experts = from_state_dict(given.config, given.state, torch.float32)
    latents = LatentCache(given.config, NUM_BLOCKS, torch.float32, given.config.num_hidden_layers + 1)
    for layer in latents.layers:
        layer.fill_(torch.nan)
    return MtpModule(given.config, weights.mtp[0], latents, LocalExperts(experts), RopeTable(given.config))


def draft(mtp: MtpModule, given: Case, cuts: list[int], absorbed: bool = False) -> Tensor:
    logits = []
    for first, last in pairwise(cuts):
        segment = Segment(first, last - first, shuffled_table(), absorbed)
        rows = torch.arange(last - first)
        logits.append(mtp.draft(given.hidden[first:last], given.next_ids[first:last], [segment], rows).logits.clone())
    return torch.cat(logits)


# ---- the paper's formulas in float64, one token at a time, sharing no code with the product


class Float64Mtp:
    def __init__(self, given: Case) -> None:
        self.config = given.config
        prefix = f"model.layers.{given.config.num_hidden_layers}."
        self.w = {name.removeprefix(prefix): t.double() for name, t in given.state.items() if name.startswith(prefix)}

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        eps = self.config.rms_norm_eps if eps is None else eps
        return x / torch.sqrt((x * x).mean() + eps) * self.w[name + ".weight"]

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Complex rotation of interleaved pairs, one number a pair."""
        angles = position * inverse_frequencies(self.config).double()
        scale = 1.0 if self.config.rope_scaling is None else self.config.rope_scaling.table_scale
        return torch.polar(torch.full_like(angles, scale), angles) * torch.view_as_complex(x.reshape(-1, 2))

    def attention(self, xs: list[Tensor]) -> list[Tensor]:
        config, w = self.config, self.w
        heads, nope, lora = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
        scale = config.qk_head_dim**-0.5
        if config.rope_scaling is not None:
            scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
        keys: list[tuple[Tensor, Tensor, Tensor]] = []
        outputs = []
        for position, x in enumerate(xs):
            compressed = w["self_attn.kv_a_proj_with_mqa.weight"] @ x
            kv = w["self_attn.kv_b_proj.weight"] @ self.norm(compressed[:lora], "self_attn.kv_a_layernorm", 1e-6)
            kv = kv.view(heads, -1)
            keys.append((kv[:, :nope], self.turn(compressed[lora:], position), kv[:, nope:]))
            q_low = self.norm(w["self_attn.q_a_proj.weight"] @ x, "self_attn.q_a_layernorm", 1e-6)
            q = (w["self_attn.q_b_proj.weight"] @ q_low).view(heads, -1)
            out = []
            for head in range(heads):
                turned = self.turn(q[head, nope:], position)
                scores = [q[head, :nope] @ k[head] + (turned * r.conj()).sum().real for k, r, _ in keys]
                weights = torch.softmax(torch.stack(scores) * scale, 0)
                out.append(sum(p * v[head] for p, (_, _, v) in zip(weights, keys, strict=True)))
            outputs.append(w["self_attn.o_proj.weight"] @ torch.cat(out))
        return outputs

    def mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate, up = self.w[prefix + "gate_proj.weight"] @ x, self.w[prefix + "up_proj.weight"] @ x
        return self.w[prefix + "down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)

    def experts(self, x: Tensor) -> Tensor:
        config = self.config
        scores = [1 / (1 + math.exp(-float(logit))) for logit in self.w["mlp.gate.weight"] @ x]
        biased = [s + float(b) for s, b in zip(scores, self.w["mlp.gate.e_score_correction_bias"], strict=True)]
        size = len(scores) // config.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        best = sorted(groups, key=lambda g: -sum(sorted(biased[e] for e in g)[-2:]))[: config.topk_group]
        chosen = sorted((e for g in best for e in g), key=lambda e: -biased[e])[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen)
        out = self.mlp(x, "mlp.shared_experts.")
        for e in chosen:
            out = out + config.routed_scaling_factor * scores[e] / total * self.mlp(x, f"mlp.experts.{e}.")
        return out

    def logits(self, given: Case) -> Tensor:
        xs = []
        for hidden, token in zip(given.hidden.double(), given.next_ids, strict=True):
            pair = (self.norm(self.w["embed_tokens.weight"][token], "enorm"), self.norm(hidden, "hnorm"))
            xs.append(self.w["eh_proj.weight"] @ torch.cat(pair))
        attended = self.attention([self.norm(x, "input_layernorm") for x in xs])
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        xs = [x + self.experts(self.norm(x, "post_attention_layernorm")) for x in xs]
        return torch.stack([self.w["shared_head.head.weight"] @ self.norm(x, "shared_head.norm") for x in xs])


@cache
def expected(shape_name: str) -> Tensor:
    return Float64Mtp(case(shape_name)).logits(case(shape_name))


@pytest.mark.parametrize("shape_name", ["v3", "kimi"])
@pytest.mark.parametrize("absorbed", [False, True], ids=["prompt form", "absorbed form"])
def test_logits_agree_with_float64(shape_name: str, absorbed: bool) -> None:
    given = case(shape_name)
    logits = draft(module(given), given, [0, 40, LENGTH], absorbed)
    assert (logits - expected(shape_name)).abs().max() < 1e-4


@pytest.mark.parametrize("absorbed", [False, True], ids=["prompt form", "absorbed form"])
def test_chunks_change_no_bits(absorbed: bool) -> None:
    given = case("v3")
    whole = draft(module(given), given, [0, LENGTH], absorbed)
    assert torch.equal(draft(module(given), given, [0, 1, 3, 64, 65, LENGTH], absorbed), whole)


def test_only_the_wanted_rows_have_logits() -> None:
    given = case("v3")
    segment, last = Segment(0, LENGTH, shuffled_table(), False), torch.tensor([LENGTH - 1])
    logits = module(given).draft(given.hidden, given.next_ids, [segment], last).logits
    assert torch.equal(logits, draft(module(given), given, [0, LENGTH])[-1:])


def test_a_second_application_reads_what_the_first_one_put_out() -> None:
    """Its logits are those of a longer text whose hidden row at the next position is the module's own output."""
    given, mtp = case("v3"), module(case("v3"))
    first = mtp.draft(
        given.hidden, given.next_ids, [Segment(0, LENGTH, shuffled_table(), False)], torch.tensor([LENGTH - 1])
    )
    token = first.logits.argmax(-1)
    longer = Case(
        given.config, given.state, torch.cat((given.hidden, first.hidden)), torch.cat((given.next_ids, token))
    )
    second = mtp.draft(first.hidden, token, [Segment(LENGTH, 1, shuffled_table(), True)], torch.tensor([0]))
    assert (second.logits - Float64Mtp(longer).logits(longer)[-1:]).abs().max() < 1e-4


def test_the_hook_hears_of_the_layer_after_the_main_ones() -> None:
    given, heard = case("v3"), list[int]()
    segment = Segment(0, LENGTH, shuffled_table(), False)
    module(given).draft(given.hidden, given.next_ids, [segment], torch.tensor([], dtype=torch.int64), heard.append)
    assert heard == [given.config.num_hidden_layers]


@torch.no_grad()
def test_the_whole_chain_agrees_with_transformers() -> None:
    """Main model, then MTP on the main model's hidden rows: proves which hidden rows those are."""
    given = case("v3")
    oracle, _ = make_hf_model("v3", num_mtp_layers=1)
    theirs = MtpModel(oracle, 1).eval()
    theirs.set_experts_implementation("eager")
    load_mtp(theirs, given)
    ids = small_model("v3").token_ids(LENGTH + 1)
    positions = torch.arange(LENGTH)[None]
    hidden = oracle(ids[None, :-1], output_hidden_states=True).hidden_states[-1]
    rows = theirs.forward_layer(0, hidden, positions, None, input_ids=ids[None, 1:])
    shared = {"shared_head.head.weight": "lm_head.weight", "embed_tokens.weight": "model.embed_tokens.weight"}
    prefix = f"model.layers.{given.config.num_hidden_layers}."
    state = {**given.state, **{prefix + name: given.state[main] for name, main in shared.items()}}
    ours = Case(given.config, state, main_hidden(ids[:-1]), ids[1:])
    assert (draft(module(ours), ours, [0, LENGTH]) - oracle.lm_head(rows)[0]).abs().max() < 1e-4


def main_hidden(ids: Tensor) -> Tensor:
    segments = [Segment(0, len(ids), shuffled_table(), False)]
    hidden: Tensor = small_model("v3").network().forward(Batch(ids, segments, torch.tensor([0]))).hidden
    return hidden


def load_mtp(theirs: MtpModel, given: Case) -> None:
    prefix = f"model.layers.{given.config.num_hidden_layers}."
    state = {name.removeprefix(prefix): t for name, t in given.state.items() if name.startswith(prefix)}
    layer = theirs.layers[0]
    num_experts = given.config.n_routed_experts or 0
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        source = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if source.endswith("experts.gate_up_proj"):
            parts = [
                (f"mlp.experts.{e}.gate_proj.weight", f"mlp.experts.{e}.up_proj.weight") for e in range(num_experts)
            ]
            tensor.copy_(torch.stack([torch.cat((state[gate], state[up])) for gate, up in parts]))
        elif source.endswith("experts.down_proj"):
            tensor.copy_(torch.stack([state[f"mlp.experts.{e}.down_proj.weight"] for e in range(num_experts)]))
        else:
            tensor.copy_(state[source])
