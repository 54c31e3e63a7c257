"""What the cluster promises, on a checkpoint that it has never seen, held against transformers.

One cluster for the module: 1 prefill, 1 decode, 2 expert workers, fp32, random weights in other dimensions than the
bundled model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from generators import make_hf_model, save_hf_model
from otlp_collector import Collector
from running_cluster import RunningCluster
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from waiting import LIMIT_S

from braid.cluster import braid_v1_pb2 as pb

pytestmark = pytest.mark.cluster

VOCAB_SIZE = 300
CONTEXT = 4096
LONG = 4000  # tokens: seconds of work, so that whoever looks after a busy moment still finds it under way
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.fixture(scope="module")
def oracle() -> Any:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": CONTEXT / 64, "original_max_position_embeddings": 64}
    context = {"max_position_embeddings": CONTEXT, "rope_parameters": rope | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    return make_hf_model("v3", seed=29, vocab_size=VOCAB_SIZE, **context)[0]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, collector: Collector, oracle: Any) -> Iterator[RunningCluster]:
    path = save_hf_model(oracle, tmp_path_factory.mktemp("unseen"))
    write_tokenizer(path)
    cwd = tmp_path_factory.mktemp("cwd")
    options = ("--model", str(path), "--dtype", "float32")
    with RunningCluster("acceptance", cwd, *options, env=collector.environment) as running:
        running.wait_baseline()
        yield running
        running.wait_baseline()


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(13 * i + 7 * salt + i * i * (salt + 1)) % 250 for i in range(length)]


def oracle_logprobs(oracle: Any, ids: list[int]) -> list[float]:
    """log p(ids[i] | ids[:i]) for i >= 1, in float64."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    return [float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids))]


def oracle_greedy(oracle: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [2, 64, 200])
def test_echoed_logprobs_are_the_oracles(cluster: RunningCluster, oracle: Any, length: int) -> None:
    prompt = prompt_of(length)
    answer = cluster.client.completions.create(
        model=cluster.model,
        prompt=prompt,
        max_tokens=4,
        echo=True,
        logprobs=1,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices[0]
    generated = oracle_greedy(oracle, prompt, 4)
    assert answer.model_extra is not None
    assert answer.model_extra["token_ids"] == generated
    assert answer.logprobs is not None
    assert answer.logprobs.token_logprobs is not None
    assert answer.logprobs.token_logprobs[0] is None
    expected = oracle_logprobs(oracle, prompt + generated)
    assert answer.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)


def test_greedy_tokens_are_the_oracles_for_64_steps(cluster: RunningCluster, oracle: Any) -> None:
    prompt = prompt_of(37, salt=3)
    tokens, _ = cluster.generate(prompt, max_tokens=64, **GREEDY)
    assert tokens == oracle_greedy(oracle, prompt, 64)


def over_http(cluster: RunningCluster, prompt: list[int], is_streamed: bool) -> list[int]:
    body = {"ignore_eos": True, "return_token_ids": True}
    request: dict[str, Any] = {
        "model": cluster.model,
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0.8,
        "seed": 7,
    }
    if not is_streamed:
        choice = cluster.client.completions.create(**request, extra_body=body).choices[0]
        assert choice.model_extra is not None
        return list(choice.model_extra["token_ids"])
    tokens: list[int] = []
    for chunk in cluster.client.completions.create(**request, stream=True, extra_body=body):
        for choice in chunk.choices:
            tokens += (choice.model_extra or {}).get("token_ids") or []
    return tokens


def over_grpc(cluster: RunningCluster, prompt: list[int]) -> list[int]:
    tokens: list[int] = cluster.generate(prompt, max_tokens=24, temperature=0.8, seed=7, ignore_eos=True)[0]
    return tokens


def test_32_at_once_over_both_protocols_as_one_by_one(cluster: RunningCluster) -> None:
    """Mixed lengths, streamed and not; sampled, so that a token that depended on company would show."""
    prompts = [prompt_of(3 + 11 * (i % 8) + i, salt=i) for i in range(8)]
    alone = [over_grpc(cluster, prompt) for prompt in prompts]
    ways = [over_grpc, lambda c, p: over_http(c, p, True), lambda c, p: over_http(c, p, False), over_grpc]
    with ThreadPoolExecutor(32) as pool:
        futures = [[pool.submit(way, cluster, prompt) for way in ways] for prompt in prompts]
        together = [[future.result(LIMIT_S) for future in row] for row in futures]
    assert together == [[tokens] * 4 for tokens in alone]
    cluster.wait_baseline()


def test_a_cancelled_call_and_a_closed_connection_free_their_blocks(cluster: RunningCluster) -> None:
    def holds_blocks(status: dict[str, Any]) -> bool:
        return any(w["name"] == "decode-0" and w["free_blocks"] < w["total_blocks"] for w in status["workers"])

    sampling = pb.Sampling(max_tokens=LONG, **GREEDY)
    call = cluster.stub.Generate(pb.GenerateRequest(text="def f(", sampling=sampling), timeout=LIMIT_S)
    next(iter(call))
    cluster.wait_status(holds_blocks, "the call's blocks")
    call.cancel()
    cluster.wait_baseline()
    body = {"model": cluster.model, "prompt": "def f(", "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=LIMIT_S) as response:
        next(response.iter_lines())
    cluster.wait_baseline()


def test_a_deadline_is_kept_and_frees_its_blocks(cluster: RunningCluster) -> None:
    request = pb.GenerateRequest(text="x", sampling=pb.Sampling(max_tokens=LONG, **GREEDY))
    with pytest.raises(grpc.RpcError) as caught:
        list(cluster.stub.Generate(request, timeout=0.1))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_baseline()


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"prompt": [1] * 5000}, 400, "5000"),
        ({"max_tokens": 100_000}, 400, "100000"),
        ({"temperature": -1}, 400, "temperature"),
        ({"prompt": ""}, 400, "empty"),
        ({"model": "gpt-4"}, 404, "gpt-4"),
    ],
)
def test_bad_input_is_answered_in_openais_shape(
    cluster: RunningCluster, change: dict[str, Any], status: int, told: str
) -> None:
    body = {"model": cluster.model, "prompt": "x", "max_tokens": 4} | change
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=LIMIT_S)
    assert answer.status_code == status
    assert told in answer.json()["error"]["message"]


def test_invalid_bytes_are_refused_and_the_cluster_goes_on(cluster: RunningCluster) -> None:
    for content in (b"{not json", b'{"prompt": "\xff\xfe"}'):
        answer = httpx.post(f"{cluster.url}/v1/completions", content=content, timeout=LIMIT_S)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert cluster.generate([1, 2, 3], max_tokens=2, **GREEDY)[0]


def test_metrics_tell_what_ran(cluster: RunningCluster) -> None:
    cluster.generate([1, 2, 3], max_tokens=2, **GREEDY)
    text = httpx.get(f"{cluster.url}/metrics", timeout=LIMIT_S).text
    for name in ("braid_time_to_first_token_seconds", "braid_generation_tokens_total", "braid_expert_map_epoch"):
        assert name in text
    status = cluster.status()
    assert status["expert_map"]["epoch"] == 1
    decode = cluster.worker("decode-0")
    assert decode["counters"]["hops"] > 0


def test_one_trace_from_the_callers_traceparent_to_the_last_token(
    cluster: RunningCluster, collector: Collector
) -> None:
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
    body = {"model": cluster.model, "prompt": "trace me", "max_tokens": 5, "ignore_eos": True}
    assert httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=LIMIT_S).status_code == 200

    def mine(spans: list[Any]) -> dict[str, Any]:
        return {span.name.split()[0]: span for span in spans if span.trace_id.hex() == trace_id}

    phases = {"prefill", "kv_transfer", "decode"}
    collector.wait(lambda spans: len(mine(spans)) == 4 and phases <= set(mine(spans)))
    spans = mine(collector.spans)
    (root,) = [span for name, span in spans.items() if name not in phases]
    assert root.parent_span_id.hex() == parent
    assert {spans[phase].parent_span_id for phase in phases} == {root.span_id}
    assert spans["prefill"].start_time_unix_nano <= spans["kv_transfer"].start_time_unix_nano
    assert spans["kv_transfer"].end_time_unix_nano <= spans["decode"].end_time_unix_nano
