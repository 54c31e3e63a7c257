"""Sampling where the logits are: one launch for all rows of a step, and one wait for what comes of it.

The tokens are those that the CPU's Sampler picks from the same logits. Rows with banned tokens or log-probabilities
come to the host, in the same wait, and are looked at there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.gpu.sample import SamplingRows, greedy, sample
from .from_device import fetch
from .sampler import Ask, NothingToSample, SampledToken, Sampler, with_logprobs
from .sampling_params import SamplingParams
from .to_device import on_device


class DeviceSampler:
    """See RowSampler. Launches when made; the first question waits."""

    def __init__(self, logits: Tensor, asks: Iterable[Ask]) -> None:
        """logits: [R, vocab] fp32."""
        asks = list(asks)
        chosen = [ask for ask in asks if not ask.banned]
        looked_at = [ask.row for ask in asks if ask.banned or ask.params.logprobs is not None]
        self._place = {ask.row: place for place, ask in enumerate(chosen)}
        self._host_row = {row: place for place, row in enumerate(looked_at)}
        tokens = _launch(_rows_of(logits, [ask.row for ask in chosen]), chosen)
        self._fetched = fetch(tokens, _rows_of(logits, looked_at))
        self._tokens: list[int] | None = None

    def token(self, row: int, params: SamplingParams, position: int, banned: Sequence[int] = ()) -> SampledToken:
        token_id = self.choose(row, params, position, banned)
        if params.logprobs is None:
            return SampledToken(token_id)
        return with_logprobs(self._logits[self._host_row[row]], token_id, params.logprobs)

    def choose(self, row: int, params: SamplingParams, position: int, banned: Sequence[int] = ()) -> int:
        tokens = self._wait()
        if banned:
            return self._host.choose(self._host_row[row], params, position, banned)
        token_id = tokens[self._place[row]]
        if token_id < 0:
            raise NothingToSample([position])
        return token_id

    def is_finite(self, row: int) -> bool:
        self._wait()
        return row in self._host_row and self._host.is_finite(self._host_row[row])

    def _wait(self) -> list[int]:
        if self._tokens is None:
            tokens, self._logits = self._fetched.wait()
            self._tokens = tokens.tolist()
            self._host = Sampler(self._logits)
        return self._tokens


def _rows_of(logits: Tensor, rows: list[int]) -> Tensor:
    if rows == list(range(len(rows))):
        return logits[: len(rows)]
    return logits.index_select(0, on_device(torch.tensor(rows, dtype=torch.int64), logits.device))


def _launch(logits: Tensor, asks: list[Ask]) -> Tensor:
    """logits: [R, vocab] -> int64 [R], -1 where nothing can be sampled."""
    params = [ask.params for ask in asks]
    if all(each.temperature == 0 for each in params):
        return greedy(logits)
    even = len(asks) + len(asks) % 2  # 16 bytes begin each row: else kernels for these would be compiled in service
    table = np.empty((6, even), dtype=np.int64)
    floats = table[:3].view(np.float64)
    for row, each in enumerate(params):
        floats[:, row] = each.temperature, each.min_p, each.top_p
        table[3:, row] = each.top_k, each.seed, asks[row].position
    on = on_device(torch.from_numpy(table), logits.device)[:, : len(asks)]
    real = on[:3].view(torch.float64)
    return sample(
        logits,
        SamplingRows(real[0], real[1], real[2], on[3], on[4], on[5]),
        has_top_k=any(each.top_k > 0 for each in params),
        has_top_p=any(each.top_p < 1 for each in params),
    )
