"""A pass that lost rows on the way is run again, and nothing that the loss has spoilt leaves (DESIGN law 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripted_engines import CONFIG, Front, ScriptedModel, Worker, answer_to, connect

from braid.model.sampling_params import SamplingParams

TEN = SamplingParams(max_tokens=10, temperature=0.0)


NUM_LAYERS = CONFIG.num_hidden_layers


@pytest.mark.parametrize("first_spoilt", range(NUM_LAYERS + 1))
@pytest.mark.parametrize("num_losses", [0, 1, 3])
def test_lost_passes_leave_no_trace(num_losses: int, first_spoilt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    front, a, b = Front(), Worker("a"), Worker("b")
    for worker in (a, b):
        connect(worker, front)
    connect(a, b)
    passes = []
    forward = ScriptedModel.forward

    def lossy(model: ScriptedModel, batch: Any, on_layer: Any = None, micro_batches: int = 1) -> Any:
        worker = a if model is a.model else b
        is_lost = worker.experts.num_losses > 0

        def tell(layer: int) -> None:
            if is_lost and layer >= first_spoilt:
                worker.experts.is_whole = False
                for segment in batch.segments:
                    rows = model._rows(layer, segment.block_table, segment.start + segment.num)
                    rows[segment.start :] = torch.nan
                    model._put(layer, segment.block_table, rows)
            on_layer(layer)

        output = forward(model, batch, tell, micro_batches)
        if is_lost:
            output.logits.fill_(torch.nan)
        passes.append(worker)
        return output

    monkeypatch.setattr(ScriptedModel, "forward", lossy)
    for worker in (a, b):
        worker.experts.may_redo, worker.experts.num_losses = True, num_losses
    name = front.submit("a", "b", 100, TEN)
    while "length" not in front.heard[name].finishes and "stop" not in front.heard[name].finishes:
        assert not front.heard[name].errors
        for worker in (a, b):
            worker.turn()
        front.listen()
    tokens = front.heard[name].tokens
    assert [tokens[index] for index in range(len(tokens))] == answer_to(100, TEN)
    assert a.requests.counters["steps"] + num_losses == passes.count(a)
    assert b.requests.counters["steps"] + num_losses == passes.count(b)
    assert a.requests.counters["kv_bytes_out"] == 100 * len(a.model.layers) * CONFIG.latent_dim * 4
    for side in (a, b, front):
        side.reactor.close()
