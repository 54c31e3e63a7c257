"""The native draw against its definition in numpy: the same token, or none where roundings could decide."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from braid.kernels import native
from braid.kernels.native_sample import draw
from braid.model.sampler import draw as defined
from braid.model.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="there is no native module on this CPU")

Logits = npt.NDArray[np.float32]


def drawn(logits: Logits, params: SamplingParams, position: int) -> int | None:
    best = int(logits.argmax())
    return draw(logits, best, params.temperature, params.min_p, params.top_k, params.top_p, params.seed, position)


def wanted(logits: Logits, params: SamplingParams, position: int) -> int:
    return defined(logits, int(logits.argmax()), params, position)


def some_logits(vocab: int, spread: float, seed: int, coarse: bool = False) -> Logits:
    """`coarse`: of few different values, so that many are equal."""
    logits = np.random.default_rng(seed).normal(size=vocab) * spread
    return (np.round(logits) if coarse else logits).astype(np.float32)


PARAMS = {
    "all": SamplingParams(1),
    "cold": SamplingParams(1, temperature=0.05),
    "hot": SamplingParams(1, temperature=30.0),
    "nucleus": SamplingParams(1, temperature=0.6, top_p=0.95),
    "narrow": SamplingParams(1, top_p=0.02),
    "wide": SamplingParams(1, top_p=0.9999),
    "best of 50": SamplingParams(1, temperature=0.8, top_k=50),
    "one": SamplingParams(1, top_k=1),
    "least": SamplingParams(1, min_p=0.05),
    "every filter": SamplingParams(1, temperature=1.5, top_k=40, top_p=0.85, min_p=0.01),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 7, 8, 9, 31, 1_000, 4_096, 129_280])
def test_draws_what_the_definition_draws(vocab: int, params: SamplingParams) -> None:
    spreads = (3.0,) if vocab > 100_000 else (0.01, 1.0, 3.0, 15.0)  # the definition takes milliseconds there
    for number, spread in enumerate(spreads):
        logits = some_logits(vocab, spread, number)
        for seed, position in ((0, 0), (7, 12), (-3, 4_000_000), (2**63 - 1, 2**31)):
            own = SamplingParams(**{**params.to_wire(), "seed": seed})
            assert drawn(logits, own, position) == wanted(logits, own, position)


def test_many_draws_of_one_row_are_the_definitions() -> None:
    logits = some_logits(4_096, 3.0, 5)
    for params in PARAMS.values():
        both = [(drawn(logits, params, at), wanted(logits, params, at)) for at in range(400)]
        assert all(ours == theirs for ours, theirs in both)
        assert len({ours for ours, _ in both}) > 1 or params in (PARAMS["one"], PARAMS["narrow"], PARAMS["cold"])


@given(
    st.integers(1, 200), st.sampled_from([0.0, 0.5, 4.0]), st.booleans(), st.integers(0, 2**32),
    st.floats(1e-3, 1e3), st.integers(0, 210), st.floats(0.001, 1.0), st.sampled_from([0.0, 0.001, 0.3, 1.0]),
)  # fmt: skip
def test_any_parameters_draw_the_same_or_nothing(
    vocab: int, spread: float, coarse: bool, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = some_logits(vocab, spread, seed, coarse)
    logits[1::5] = -np.inf
    params = SamplingParams(1, temperature, top_p, top_k, min_p, seed)
    assert drawn(logits, params, seed % 1000) in (None, wanted(logits, params, seed % 1000))


def test_equal_tokens_at_the_edge_of_top_k_go_by_their_ids() -> None:
    logits = np.zeros(64, dtype=np.float32)
    logits[[9, 40]] = 1.0
    tokens = [drawn(logits, SamplingParams(1, temperature=5.0, top_k=6), at) for at in range(500)]
    assert set(tokens) == {9, 40, 0, 1, 2, 3}


def test_an_edge_that_falls_between_roundings_is_left_to_the_definition() -> None:
    logits = np.zeros(8, dtype=np.float32)
    assert drawn(logits, SamplingParams(1, top_p=0.25), 0) is None, "two of eight have just the mass that is asked for"
    assert drawn(logits, SamplingParams(1, top_p=0.26), 0) in range(3)


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.full(5_000, -np.inf, dtype=np.float32)
    logits[4_321] = -80.0
    for params in PARAMS.values():
        assert drawn(logits, params, 3) == 4_321


def test_a_temperature_near_0_takes_the_best() -> None:
    assert drawn(some_logits(1_000, 3.0, 1), SamplingParams(1, temperature=5e-324), 0) == int(
        some_logits(1_000, 3.0, 1).argmax()
    )
