"""What a training run is told: the shape of the model, and the schedule."""

from dataclasses import dataclass
from typing import Any

FAMILY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}

SIZES: dict[str, dict[str, Any]] = {
    # Ten million parameters, three million of them active: what one CPU core can teach something in an hour and a half.
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "n_routed_experts": 24,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.0,
    },
    # For tests: every part is there and a step takes milliseconds.
    "tiny": {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
}


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Everything that decides what a run computes; a checkpoint refuses to be resumed under others."""

    size: str = "small"
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    seq_len: int = 512
    peak_lr: float = 2.5e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    balance_alpha: float = 1e-4
    # The paper's 0.001 is for a million steps; a few thousand must undo the first steps' collapse in fewer.
    bias_update_speed: float = 5e-3
    bias_frozen_share: float = 0.05
    evaluate_every: int = 100
    held_out_windows: int = 32
    dtype: str = "bfloat16"

    def learning_rate(self, step: int, progress: float) -> float:
        """Warm up, stay, then fall linearly to a hundredth over the last `decay_share` of the run."""
        fall = min(1.0, (1.0 - progress) / self.decay_share)
        return self.peak_lr * min((step + 1) / self.warmup_steps, 1.0) * max(fall, 0.01)

    def mtp_weight(self, progress: float) -> float:
        """0.3 first, 0.1 when the learning rate falls, as in the paper."""
        return 0.3 if progress < 1.0 - self.decay_share else 0.1

    def bias_speed(self, progress: float) -> float:
        """Falls with the learning rate; frozen at the end, so that the last weights learn under the bias that ships."""
        fall = min(1.0, (1.0 - progress) / self.decay_share)
        return self.bias_update_speed * fall if progress < 1.0 - self.bias_frozen_share else 0.0


def model_dict(size: str) -> dict[str, Any]:
    return dict(sorted((FAMILY | SIZES[size]).items()))
