"""The engine's steps with sampling on the device: what it asks for beforehand is what it then samples."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from scripted_engines import CONFIG, EOS, Front, Worker, connect, token_at

from braid.actors.engine import Engine
from braid.actors.kv_sender import LayerSender
from braid.actors.scheduler import Plan
from braid.model.deepseek import Batch, DeepSeekModel, ForwardOutput
from braid.model.device_sampler import DeviceSampler
from braid.model.row_sampler import RowSampler
from braid.model.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=5, temperature=0.0)
DRAWN = replace(GREEDY, temperature=0.9, seed=5)
ASKED = [
    (40, GREEDY),
    (5, DRAWN),
    (9, replace(DRAWN, seed=-3, logprobs=2)),
    (11, replace(DRAWN, min_tokens=3, stop_token_ids=(3, 10), temperature=2.0)),  # some of what it would sample
    (13, replace(GREEDY, prompt_logprobs=0, logprobs=1)),
    (6, replace(GREEDY, max_tokens=0, prompt_logprobs=1)),
    (8, replace(GREEDY, min_tokens=5, ignore_eos=True, stop_token_ids=tuple(range(EOS + 1)))),  # leaves nothing
]


Told = tuple[dict[int, int], list[str], list[dict[str, str]], int]  # tokens, finishes, errors, scored prompt tokens


class DeviceEngine(Engine):
    """As on a GPU."""

    def _forward(self, plan: Plan, batch: Batch, on_layer: LayerSender, count: int) -> tuple[ForwardOutput, RowSampler]:
        output, _ = super()._forward(plan, batch, on_layer, count)
        return output, DeviceSampler(output.logits, self._asks(plan))


def answers(on_device: bool) -> list[Told]:
    front, worker = Front(), Worker("a", blocks=16)
    if on_device:
        worker.engine = DeviceEngine(CONFIG, cast(DeepSeekModel, worker.model), worker.experts, worker.requests)
    connect(front, worker)
    front.listen()
    for num_prompt, params in ASKED:
        front.submit("a", "a", num_prompt, params)
    for _ in range(20):
        worker.turn()
        for sequence in worker.scheduler.decoding:
            known = len(sequence.tokens)
            sequence.drafts = [token_at(known), token_at(known + 1) + known % 2]  # the second is wrong at times
        front.listen()
    worker.assert_empty()
    worker.close()
    front.reactor.close()
    return [(heard.tokens, heard.finishes, heard.errors, heard.prompt_logprobs) for heard in front.heard.values()]


def test_answers_are_those_of_the_cpus_sampler() -> None:
    expected = answers(on_device=False)
    assert answers(on_device=True) == expected
    ends = [finishes for _, finishes, _, _ in expected]
    assert ends.count(["error"]) == 1
    assert sum(map(len, ends)) == len(ASKED)
