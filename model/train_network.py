"""The DeepSeek-V3 network in differentiable form: whole sequences, no cache, and the checkpoint's own tensor names.

Serving runs deepseek.py; this file exists to be trained, and its weights are what deepseek.py loads.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale * inputs**-0.5)
    return layer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs; the result is stored as halves, which no dot product can see. x: [..., T, d_rope]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


class Attention(nn.Module):
    """MLA in the MHA form. x: [B, T, H], cos and sin: fp32 [T, d_rope / 2] -> [B, T, H]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        assert config.q_lora_rank is not None, "braid train expects q_lora_rank"
        self.num_heads = heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_rank = config.kv_lora_rank
        self.q_a_proj = linear(hidden, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = linear(config.q_lora_rank, heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(hidden, self.kv_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, eps)
        self.kv_b_proj = linear(self.kv_rank, heads * (self.nope + self.value))
        self.o_proj = linear(heads * self.value, hidden, (2 * config.num_hidden_layers) ** -0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, self.num_heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, self.num_heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).to(q.dtype).expand(-1, self.num_heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin).to(q.dtype)), dim=-1) * (self.nope + self.rope) ** -0.5
        k = torch.cat((k_nope, k_rope), dim=-1)
        # Plain products beat scaled_dot_product_attention twofold on a CPU in bfloat16 at these sizes.
        mask = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
        out = (q @ k.transpose(-1, -2) + mask).softmax(-1).to(v.dtype) @ v
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int, num_layers: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden, (2 * num_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    """Sigmoid gate with group-limited top-k; keeps the load and balance loss of its last batch for the trainer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) * config.hidden_size**-0.5)
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts))
        self.load = torch.zeros(config.n_routed_experts)
        self.balance_loss = torch.zeros(())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, H]. Returns topk_idx and topk_weights, both [B * T, k]."""
        config, batch, num_experts = self.config, x.shape[0], len(self.weight)
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.flatten(0, 1).float(), self.weight).sigmoid()
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias
            grouped = choice.view(-1, config.n_group, num_experts // config.n_group)
            kept = grouped.topk(2, dim=-1)[0].sum(-1).topk(config.topk_group, dim=-1)[1]
            mask = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, kept, False)
            choice = grouped.masked_fill(mask.unsqueeze(-1), -torch.inf).flatten(1)
            topk_idx = choice.topk(config.num_experts_per_tok)[1]
            per_sequence = F.one_hot(topk_idx.view(batch, -1), num_experts).sum(1).float()
            self.load = per_sequence.sum(0)
        self.balance_loss = sequence_balance_loss(scores.view(batch, -1, num_experts), per_sequence)
        weights = scores.gather(1, topk_idx)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return topk_idx, weights * config.routed_scaling_factor

    def update_bias(self, speed: float) -> None:
        self.e_score_correction_bias.add_(speed * torch.sign(self.load.mean() - self.load))

    def max_violation(self) -> float:
        return float(self.load.max() / self.load.mean() - 1)


def sequence_balance_loss(scores: Tensor, counts: Tensor) -> Tensor:
    """The paper's complementary loss. scores: [B, T, E], counts: [B, E] selections. 1 when perfectly even."""
    frequency = counts * counts.shape[1] / counts.sum(1, keepdim=True)
    probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (frequency * probability).sum(1).mean()


def padded_slots(expert_of_slot: Tensor, load: Tensor, multiple: int) -> tuple[Tensor, list[int]]:
    """Returns the slots sorted by expert, each expert's run padded with -1, and the padded run lengths.

    oneDNN compiles a kernel per shape and would otherwise meet a new shape for every expert and step.
    """
    sizes = (load + multiple - 1) // multiple * multiple
    starts = sizes.cumsum(0) - sizes
    order = expert_of_slot.argsort(stable=True)
    shift = (starts - (load.cumsum(0) - load)).repeat_interleave(load)
    slots = torch.full((int(sizes.sum()),), -1)
    slots[torch.arange(len(order)) + shift] = order
    return slots, sizes.tolist()


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        inner, layers = config.moe_intermediate_size, config.num_hidden_layers
        self.gate = Gate(config)
        self.experts = nn.ModuleList(MLP(config.hidden_size, inner, layers) for _ in range(config.n_routed_experts))
        self.shared_experts = MLP(config.hidden_size, inner * config.n_shared_experts, layers)

    def forward(self, x: Tensor) -> Tensor:
        topk_idx, topk_weights = self.gate(x)
        rows = x.flatten(0, 1)
        slots, sizes = padded_slots(topk_idx.flatten(), self.gate.load.long(), 128 if self.training else 1)
        token, is_real = slots.clamp(min=0) // topk_idx.shape[1], slots >= 0
        parts = torch.split(rows.index_select(0, token), sizes)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        weights = topk_weights.flatten().index_select(0, slots.clamp(min=0)) * is_real
        routed = torch.zeros_like(rows, dtype=torch.float32).index_add(0, token, out * weights.unsqueeze(1))
        shared: Tensor = self.shared_experts(x)
        return shared + routed.view_as(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        dense = MLP(hidden, config.intermediate_size, config.num_hidden_layers)
        self.mlp: nn.Module = MoE(config) if config.is_moe_layer(index) else dense

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        mixed: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return mixed


class SharedHead(nn.Module):
    def __init__(self, config: ModelConfig, head: nn.Linear) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = head


class MtpLayer(DecoderLayer):
    """Predicts the token after next; embedding and head are the main model's own."""

    def __init__(self, config: ModelConfig, embed: nn.Embedding, head: nn.Linear) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.embed_tokens = embed
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config, head)

    def predict(self, hidden: Tensor, next_ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden: [B, T, H], next_ids: int64 [B, T], the token after each row -> logits [B, T, V]."""
        x = torch.cat((self.enorm(self.embed_tokens(next_ids)), self.hnorm(hidden)), dim=-1)
        x = self.forward(self.eh_proj(x).float(), cos, sin)
        logits: Tensor = self.shared_head.head(self.shared_head.norm(x))
        return logits


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, head: nn.Linear) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.1)
        layers: list[nn.Module] = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        layers += [MtpLayer(config, self.embed_tokens, head)] * config.num_nextn_predict_layers
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TrainNetwork(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_nextn_predict_layers <= 1, "braid train knows one MTP layer"
        assert config.rope_scaling is None, "braid train uses plain rope"
        self.config = config
        self.lm_head = linear(config.hidden_size, config.vocab_size, 0.3)
        self.model = Decoder(config, self.lm_head)

    def gates(self) -> Iterator[Gate]:
        return (module for module in self.modules() if isinstance(module, Gate))

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [T, d_rope / 2] each."""
        dim = self.config.qk_rope_head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * frequencies
        return angles.cos(), angles.sin()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids: [B, T + 1]. Returns logits [B, T, V] of the next token and MTP logits of the token after it."""
        cos, sin = self.rope(ids.shape[1] - 1)
        x = self.model.embed_tokens(ids[:, :-1])
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            x = layer(x, cos, sin)
        hidden = self.model.norm(x)  # MTP reads the normed rows too: the convention of model/network_weights.py
        logits = self.lm_head(hidden)
        if not self.config.num_nextn_predict_layers:
            return logits, None
        mtp = self.model.layers[-1]
        assert isinstance(mtp, MtpLayer)
        return logits, mtp.predict(hidden, ids[:, 1:], cos, sin)
