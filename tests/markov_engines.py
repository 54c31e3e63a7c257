"""Workers that draft over a scripted network: it and its MTP module are Markov chains, so every distribution is known.

Each hidden row says which position and token it belongs to; the module refuses rows that are not the ones it should
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from scripted_engines import CONFIG, Front, Heard, Worker, connect

from braid.actors.drafter import Drafter
from braid.actors.speculation import MAX_DEPTH, Acceptance, Speculation
from braid.model.deepseek import Batch, DeepSeekModel, ForwardOutput, Segment
from braid.model.kv_cache import BLOCK_SIZE
from braid.model.mtp import Drafted, MtpModule
from braid.model.sampling_params import SamplingParams

VOCAB = CONFIG.vocab_size


def chain(seed: int, spread: float = 1.5) -> torch.Tensor:
    """Logits of the next token by the last one: [VOCAB, VOCAB]."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def near(table: torch.Tensor, seed: int = 9, noise: float = 0.7) -> torch.Tensor:
    """A drafter that has learnt the chain, but not quite."""
    return table + chain(seed, noise)


def rows_of(segments: list[Segment]) -> list[int]:
    return [position for segment in segments for position in range(segment.start, segment.start + segment.num)]


class MarkovModel:
    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.num_rows = 0

    def forward(self, batch: Batch, on_layer: Any = None, micro_batches: int = 1) -> ForwardOutput:
        self.num_rows += len(batch.token_ids)
        hidden = torch.tensor(list(zip(rows_of(batch.segments), batch.token_ids.tolist(), strict=True))).float()
        return ForwardOutput(self.table[batch.token_ids[batch.logit_rows]], hidden)


class MarkovModule:
    """`seen[slot]`: the position whose row lies in that slot of the module's layer of the cache."""

    def __init__(self, table: torch.Tensor, num_blocks: int) -> None:
        self.table = table
        self.seen = torch.full((num_blocks * BLOCK_SIZE,), -1)
        self.has_gaps = False
        self.lose: Callable[[], None] = lambda: None

    def draft(
        self,
        hidden: torch.Tensor,
        next_ids: torch.Tensor,
        segments: list[Segment],
        logit_rows: torch.Tensor,
        on_layer: Any = None,
    ) -> Drafted:
        positions = torch.tensor(rows_of(segments))
        assert hidden[:, 0].tolist() == positions.tolist(), "hidden rows of other positions"
        for segment in segments:
            end = segment.start + segment.num
            slots = torch.tensor(segment.block_table)[torch.arange(end) // BLOCK_SIZE] * BLOCK_SIZE
            slots += torch.arange(end) % BLOCK_SIZE
            self.seen[slots[segment.start :]] = torch.arange(segment.start, end)
            self.has_gaps |= self.seen[slots].tolist() != list(range(end))
        self.lose()
        own = torch.stack((positions + 1, next_ids), dim=1).float()
        return Drafted(self.table[next_ids[logit_rows]], own[logit_rows])


class Always(Speculation):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.wanted = depth

    @property
    def is_off(self) -> bool:
        return not self.wanted

    def depth(self, own: Acceptance) -> int:
        return self.wanted


class Loop:
    """One worker, one front end."""

    def __init__(self, target: torch.Tensor, drafter: torch.Tensor | None, depth: int = MAX_DEPTH) -> None:
        self.front, self.worker = Front(), Worker("a", blocks=16, max_waiting=16)
        connect(self.worker, self.front)
        self.model = MarkovModel(target)
        engine = self.worker.engine
        engine.model = cast(DeepSeekModel, self.model)
        if drafter is not None:
            self.module = MarkovModule(drafter, 16)
            engine.drafter = Drafter(CONFIG, cast(MtpModule, self.module), self.worker.experts)
            engine.drafter.speculation = Always(depth)

    @property
    def drafter(self) -> Drafter:
        drafter: Drafter | None = self.worker.engine.drafter
        assert drafter is not None
        return drafter

    def ask(self, requests: list[tuple[int, SamplingParams]]) -> list[Heard]:
        """(length of the prompt, params) of each; the answers, all of which end."""
        self.worker.listen()
        names = [self.front.submit("a", "a", length, params) for length, params in requests]
        while not all(self.front.heard[name].finishes for name in names):
            self.worker.turn()
            self.front.listen()
        self.worker.turn()
        self.worker.assert_empty()
        return [self.front.heard[name] for name in names]


Make = Callable[..., Loop]


@contextmanager
def loops() -> Iterator[Make]:
    """Closes all that were made."""
    made: list[Loop] = []

    def one(*args: Any) -> Loop:
        made.append(Loop(*args))
        return made[-1]

    yield one
    for loop in made:
        loop.worker.close()
        loop.front.reactor.close()
