from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from scripted_worker import ScriptedWorker, front_of, run
from waiting import LIMIT_S

from braid.actors.messages import TokenItem
from braid.cluster.metrics import Metrics
from braid.cluster.request import GenerateRequest
from braid.model.sampling_params import SamplingParams
from braid.model.tokenizer import Tokenizer

LOAD = {"free_blocks": 3, "cached_blocks": 2, "total_blocks": 8, "running": 2, "waiting": 1, "waiting_tokens": 70}


def samples(rendered: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(rendered.decode())
        for sample in family.samples
    }


def of_worker(name: str, role: str, counters: dict[str, Any]) -> dict[str, Any]:
    return {"worker": name, "role": role, "block_size": 64, "counters": counters} | LOAD


def test_shows_what_workers_report_and_forgets_who_left() -> None:
    counters = {"epoch": 4, "hops": 12, "dispatch_bytes": 4096, "expert_max_vio": {3: 0.5, 4: 0.25}, "odd name": 1}
    loads = [of_worker("d", "decode", counters), of_worker("p", "prefill", {"expert_balancedness": 0.8, "hops": 3})]
    metrics = Metrics(lambda: 5, lambda: loads)
    shown = samples(metrics.render())
    d, p = (("role", "decode"), ("worker", "d")), (("role", "prefill"), ("worker", "p"))
    assert shown["braid_queue_requests", ()] == 5
    assert shown["braid_worker_kv_blocks_used", d] == 5
    assert shown["braid_worker_kv_blocks_total", d] == 8
    assert shown["braid_worker_kv_blocks_cached", d] == 2
    assert shown["braid_worker_sequences_running", d] == 2
    assert shown["braid_worker_sequences_waiting", p] == 1
    assert shown["braid_worker_waiting_prompt_tokens", p] == 70
    assert shown["braid_expert_map_epoch", d] == 4
    assert (shown["braid_worker_hops_total", d], shown["braid_worker_hops_total", p]) == (12, 3)
    assert shown["braid_worker_dispatch_bytes_total", d] == 4096
    assert shown["braid_expert_max_vio", (("layer", "3"), ("worker", "d"))] == 0.5
    assert shown["braid_expert_balancedness", (("layer", "mean"), ("worker", "p"))] == 0.8
    assert not any("epoch_total" in name or "odd" in name or "vio_total" in name for name, _ in shown)
    del loads[0]
    assert not any(("worker", "d") in labels for _, labels in samples(metrics.render()))


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    short = re.findall(r"`(_[a-z_]+)`", text)  # the end of a name that stands beside a whole one
    metrics = Metrics(lambda: 0, lambda: [of_worker("d", "decode", {"kv_bytes_out": 1, "preemptions": 2, "steps": 3})])
    for family in metrics.registry.collect():
        is_told = family.name in text or any(family.name.endswith(end) for end in short)
        assert is_told, f"docs/metrics.md does not tell of {family.name}"


def test_counts_a_request(run_dir: Path, byte_tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        worker = ScriptedWorker(run_dir, "both-0")
        async with front_of(byte_tokenizer, worker) as front:
            request = GenerateRequest((1, 2, 3), SamplingParams(max_tokens=9))

            async def consume() -> None:
                async for _ in front.generate(request):
                    pass

            answer = asyncio.create_task(consume())
            submit = await asyncio.to_thread(worker.next_submit)
            worker.say(TokenItem(submit.id, 0, [65], timing={"kv_s": 0.25, "kv_send_s": 0.002, "kv_bytes": 4096}))
            worker.say(TokenItem(submit.id, 1, [66, 67], finish="stop"))
            await answer
            shown = samples(front.metrics.render())
            assert shown["braid_requests_total", (("finish", "stop"),)] == 1
            assert shown["braid_prompt_tokens_total", ()] == 3
            assert shown["braid_generation_tokens_total", ()] == 3
            for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
                assert shown[f"braid_{name}_seconds_count", ()] == 1
                assert 0 <= shown[f"braid_{name}_seconds_sum", ()] < LIMIT_S
            assert shown["braid_kv_transfer_seconds_sum", ()] == 0.25
            assert shown["braid_kv_send_seconds_bucket", (("le", "0.0025"),)] == 1
            assert shown["braid_kv_transfer_bytes_sum", ()] == 4096

    run(scenario())
