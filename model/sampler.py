"""Picks the next token of every sequence from its logits: greedy, or Gumbel-max over the filtered distribution.

A token depends on its own logits, parameters and position only; never on its neighbours in the batch (DESIGN law 5).
Filters apply in vLLM's order: temperature, min_p, top_k, top_p. Ties rank the lower token id first, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import native, native_sample
from .noise import gumbel_of, random_bits
from .sampling_params import SamplingParams

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
SLACK = 1e-6  # far above a rounding error of scores and noise
HAS_NATIVE = native.available(torch.float32)


class NothingToSample(FloatingPointError):
    """The logits of these rows are NaN, infinite or all banned; other rows can be sampled without them."""

    def __init__(self, positions: Sequence[int]) -> None:
        super().__init__(f"logits are NaN, infinite or all banned at positions {positions}: nothing can be sampled")


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob` and `top` (most likely first) are of the raw distribution: no temperature, no filter."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """A row that may be sampled, `position` the absolute one that its token takes, `banned` what it must not be."""

    row: int
    params: SamplingParams
    position: int
    banned: Sequence[int] = ()


class Sampler:
    """The tokens that the rows of one pass give: the greedy choice of all rows at once, the rest as it is asked for."""

    def __init__(self, logits: Tensor) -> None:
        """logits: [R, vocab] fp32."""
        self._logits = logits
        self._raw: Logits = logits.cpu().numpy()
        # the first of equal maxima; NaN wins, so poisoned logits show here
        self._greedy: list[int] = self._raw.argmax(axis=-1).tolist()

    def token(self, row: int, params: SamplingParams, position: int, banned: Sequence[int] = ()) -> SampledToken:
        """What `choose` chooses, with the log-probabilities that the request asks for."""
        token_id = self.choose(row, params, position, banned)
        if params.logprobs is None:
            return SampledToken(token_id)
        return with_logprobs(self._logits[row], token_id, params.logprobs)

    def choose(self, row: int, params: SamplingParams, position: int, banned: Sequence[int] = ()) -> int:
        """`position` is the absolute one that the new token takes; `banned` tokens must not be sampled (end tokens
        before min_tokens). Raises NothingToSample."""
        raw, token_id = self._raw[row], self._greedy[row]
        if banned:
            raw = raw.copy()
            # an end token may be one that this vocabulary does not have
            raw[[token for token in banned if token < len(raw)]] = -np.inf
            token_id = int(raw.argmax())
        if not math.isfinite(raw[token_id]):
            raise NothingToSample([position])
        return _sample_row(raw, token_id, params, position) if params.temperature > 0 else token_id

    def is_finite(self, row: int) -> bool:
        return math.isfinite(self._raw[row, self._greedy[row]])


def prompt_logprobs(logits: Tensor, targets: Tensor, top: int) -> list[SampledToken]:
    """logits: [N, vocab] fp32 at N prompt positions; targets: [N] int64, the token that follows each one.

    Raises NothingToSample, with places among the N.
    """
    assert logits.shape[0] == targets.shape[0], (logits.shape, targets.shape)
    logits = logits.cpu()
    if bad := torch.isfinite(logits.amax(dim=-1)).logical_not().nonzero().flatten().tolist():
        raise NothingToSample(bad)
    return [with_logprobs(row, int(target), top) for row, target in zip(logits, targets.tolist(), strict=True)]


def _sample_row(logits: Logits, best: int, params: SamplingParams, position: int) -> int:
    """By the native module where there is one, which draws the same token or leaves it to the definition."""
    if HAS_NATIVE:
        token_id = native_sample.draw(
            logits, best, params.temperature, params.min_p, params.top_k, params.top_p, params.seed, position
        )
        if token_id is not None:
            return token_id
    return draw(logits, best, params, position)


def draw(logits: Logits, best: int, params: SamplingParams, position: int) -> int:
    """The definition: Gumbel-max in float64, as argmax(score + noise) has the softmax distribution of the scores left.

    logits: [vocab], finite or -inf, `best` the first of the largest; temperature above 0.
    """
    raw = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # under a tiny temperature all but the best go to -inf, the right limit
        scores = (raw - raw[best]) / params.temperature
    bits = random_bits(params.seed, position, len(scores))
    if params.min_p > 0 or params.top_k > 0 or params.top_p < 1:
        kept = _filter(scores, params)
    else:  # only these can win: all others lose to the best token even with the largest noise there is
        own, largest = gumbel_of(np.array([bits[best], bits.max()]))
        kept = np.flatnonzero(scores >= own - largest - SLACK)
    return int(kept[np.argmax(scores[kept] + gumbel_of(bits[kept]))])


def _filter(scores: Scores, params: SamplingParams) -> Ids:
    """The token ids, ascending, that min_p, top_k and top_p leave. scores: [vocab], largest 0."""
    kept: Ids = np.flatnonzero(scores > -np.inf)
    if params.min_p > 0:
        kept = kept[scores[kept] >= np.log(params.min_p)]
    if 0 < params.top_k < len(kept):
        kept = np.sort(_largest(scores, kept, params.top_k))
    if params.top_p < 1:
        kept = np.sort(_nucleus(scores, kept, params.top_p))
    return kept


def _largest(scores: Scores, kept: Ids, count: int) -> Ids:
    """The `count` best tokens, best first, without sorting the whole vocabulary."""
    if count >= len(kept):
        return kept[np.argsort(-scores[kept], kind="stable")]
    threshold = np.partition(scores[kept], -count)[-count]
    contenders = kept[scores[kept] >= threshold]
    best: Ids = contenders[np.argsort(-scores[contenders], kind="stable")][:count]
    return best


def _nucleus(scores: Scores, kept: Ids, top_p: float) -> Ids:
    """The smallest set of best tokens whose probability reaches top_p, best first; at least one."""
    total = np.exp(scores[kept]).sum()
    count = 256
    while True:
        best = _largest(scores, kept, count)
        reached = np.cumsum(np.exp(scores[best])) >= top_p * total
        if reached.any():
            return best[: int(reached.argmax()) + 1]
        if len(best) == len(kept):  # rounding kept the sum a hair below top_p
            return best
        count *= 8


def with_logprobs(logits: Tensor, token_id: int, num_top: int) -> SampledToken:
    """logits: [vocab]. One row at a time, so that the bits do not depend on the batch."""
    row = torch.log_softmax(logits.float(), dim=-1)
    logprob = float(row[token_id])
    if num_top == 0:
        return SampledToken(token_id, logprob)
    scores = row.double().cpu().numpy()
    best = _largest(scores, np.arange(len(scores)), num_top)
    return SampledToken(token_id, logprob, tuple((int(token), float(scores[token])) for token in best))
