"""The floor against weights counted one by one from the table of a checkpoint's tensors."""

import math

import pytest

from braid.benchmarks.checkpoints import SHAPES, config_of, num_parameters
from braid.benchmarks.roofline import Machine, Work, decode_work, prefill_work, typical
from braid.model.config import ModelConfig
from braid.model.tensor_names import expected_tensors

CONFIG = ModelConfig.from_dict(config_of(SHAPES["small"], "bfloat16"))


def matrices(*marks: str) -> int:
    """Numbers of all matrices whose names hold one of `marks`."""
    shapes = expected_tensors(CONFIG)
    return sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and any(mark in name for mark in marks))


def test_a_step_reads_every_weight_but_the_experts_nobody_asked_for() -> None:
    always = matrices("self_attn", "shared_experts", "mlp.gate.", "layers.0.mlp", "lm_head")
    experts = matrices(".experts.")
    work = decode_work(CONFIG, 1, 0)
    assert work.numbers == pytest.approx(always + experts * 6 / 64)
    assert work.products == pytest.approx(work.numbers)
    assert decode_work(CONFIG, 10_000, 0).numbers == pytest.approx(always + experts)


def test_context_adds_latents_to_read_and_heads_to_multiply() -> None:
    short, long = decode_work(CONFIG, 1, 0), decode_work(CONFIG, 1, 1000)
    assert long.numbers - short.numbers == 1000 * 12 * (512 + 64)
    assert long.products - short.products == 12 * 8 * 1000 * (512 + 64 + 512)


def test_a_prompt_multiplies_every_token_and_half_a_square_of_attention() -> None:
    once, twice = prefill_work(CONFIG, 1000), prefill_work(CONFIG, 2000)
    assert once.numbers == twice.numbers == matrices("") - matrices("embed_tokens")
    square = 12 * 8 * (128 + 64 + 128) / 2
    assert (twice.products - 2 * once.products) + matrices("lm_head") == pytest.approx(square * (2000**2 - 2 * 1000**2))


def test_seconds_are_those_of_the_slower_of_reading_and_multiplying() -> None:
    machine = Machine("here", 2, read_gb_s=10.0, matmul_gflop_s=100.0)
    assert Work(numbers=5e9, products=1.0).seconds(machine, 2) == pytest.approx(1.0)
    assert Work(numbers=1.0, products=1e11).seconds(machine, 2) == pytest.approx(2.0)


def test_a_floor_is_that_of_the_machines_usual_moments() -> None:
    seen = [Machine("here", 2, 30.0, 100.0), Machine("here", 2, 60.0, 90.0), Machine("here", 2, 20.0, 95.0)]
    assert typical(seen) == Machine("here", 2, 30.0, 95.0)


def test_the_compared_checkpoint_is_of_the_size_it_is_said_to_be() -> None:
    assert num_parameters("small") == pytest.approx(0.477e9, rel=0.01)
