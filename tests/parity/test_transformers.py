"""Our network against transformers on random models of several shapes: layer by layer, then logits, then tokens."""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import pytest
import torch
from generators import SHAPES
from small_models import FAMILIES, SmallModel, run, run_in_chunks, shuffled_table, small_model
from torch import Tensor
from transformers import DynamicCache

from braid.model.deepseek import DecoderLayer, DeepSeekModel
from braid.model.micro_batch import MicroBatch

TOLERANCE = 1e-4  # fp32
LENGTH = 150  # past the original length of every shape with YaRN
STEPS = 64


@pytest.fixture(params=[(shape, family) for shape in SHAPES for family in FAMILIES], ids="-".join)
def small(request: pytest.FixtureRequest) -> SmallModel:
    shape_name, family = request.param
    return small_model(shape_name, ops=FAMILIES[family])


class Recorder:
    """Stands in for a decoder layer and keeps what the residual stream was behind the real one."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer = layer
        self.outputs: list[Tensor] = []
        self.begin = layer.begin

    def finish(self, part: MicroBatch) -> None:
        self.layer.finish(part)
        self.outputs.append(part.rows.x + part.rows.delta)


def recorded(network: DeepSeekModel) -> list[Recorder]:
    recorders = [Recorder(layer) for layer in network.layers]
    network.layers = cast(list[DecoderLayer], recorders)
    return recorders


@torch.no_grad()
def oracle_layers(small: SmallModel, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    outputs: list[Tensor] = []
    layers = small.oracle.model.layers
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0])) for layer in layers]
    logits = small.oracle(ids[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return outputs, logits


def assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert not ours.isnan().any(), f"{name} holds NaN"
    error = float((ours - theirs).abs().max())
    assert error < TOLERANCE, f"{name} is the first to differ, by {error:.2e}"


@pytest.mark.parametrize("absorbed", [False, True], ids=["prompt form", "absorbed form"])
def test_every_layer_agrees(small: SmallModel, absorbed: bool) -> None:
    ids, network = small.token_ids(LENGTH), small.network()
    recorders = recorded(network)
    logits = run(network, ids, 0, shuffled_table(), absorbed)
    expected, expected_logits = oracle_layers(small, ids)
    for i, (recorder, layer) in enumerate(zip(recorders, expected, strict=True)):
        assert_close(f"layer {i}", recorder.outputs[0], layer)
    assert_close("the head", logits, expected_logits)


def test_chunked_prompt_agrees(small: SmallModel) -> None:
    ids = small.token_ids(LENGTH)
    ours = run_in_chunks(small.network(), ids, (33, 1, 64), shuffled_table())
    assert_close("chunked logits", ours, oracle_layers(small, ids)[1])


@torch.no_grad()
def test_greedy_tokens_agree_for_64_steps(small: SmallModel) -> None:
    ids = small.token_ids(40, seed=2)
    theirs, cache = [], DynamicCache(config=small.oracle.config)
    row = ids[None]
    for _ in range(STEPS):
        out = small.oracle(row, None, None, cache, use_cache=True)  # by place: releases call this argument differently
        row = out.logits[:, -1].argmax(-1, keepdim=True)
        theirs.append((out.logits[0, -1], int(row)))
    network, table = small.network(), shuffled_table()
    logits = run_in_chunks(network, ids, (16,), table)[-1]
    for step, (expected, token) in enumerate(theirs):
        assert_close(f"step {step}", logits, expected)
        assert int(logits.argmax()) == token, f"token {step} differs"
        logits = run(network, torch.tensor([token]), len(ids) + step, table, absorbed=True)[0]
    assert len({token for _, token in theirs}) >= 16, "the oracle repeats itself: the test would prove little"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("absorbed", [False, True], ids=["prompt form", "absorbed form"])
def test_bfloat16_is_as_good_as_the_oracle_in_bfloat16(absorbed: bool, family: str) -> None:
    exact, small = small_model("v3"), small_model("v3", torch.bfloat16, FAMILIES[family])
    ids = exact.token_ids(LENGTH)
    expected = exact.oracle(ids[None]).logits[0]
    ours = run(small.network(), ids, 0, shuffled_table(), absorbed)
    theirs = deepcopy(exact.oracle).bfloat16()(ids[None]).logits[0].float()
    our_error, their_error = ((logits - expected).abs().mean(1).median() for logits in (ours, theirs))
    assert our_error < 1.2 * their_error
