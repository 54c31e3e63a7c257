"""`braid train` on a tiny model: it learns, it resumes to the bit, and others can read what it writes."""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from braid.model.config import ModelConfig
from braid.model.corpus import TokenStream, encode_files, held_out_windows, is_held_out, read_corpus, training_batch
from braid.model.train import Trainer, add_arguments, run, save
from braid.model.train_network import Gate, TrainNetwork, padded_slots, sequence_balance_loss
from braid.model.train_settings import SIZES, TrainSettings, model_dict

SOURCE = '''"""Module {i}."""

class Stack{i}:
    def __init__(self, items=None):
        self.items = list(items or [])

    def push_{i}(self, item):
        self.items.append(item)
        return len(self.items) + {i}
'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for i in range(120):
        (root / f"module_{i}.py").write_text(SOURCE.format(i=i) * 3)
    return root


def braid_train(out: Path, corpus: Path, steps: int, *flags: str) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    command = f"--out {out} --corpus {corpus} --config tiny --steps {steps} --batch-size 4 --seq-len 32 --dtype float32"
    run(parser.parse_args([*command.split(), "--threads", "1", *flags]))
    return [json.loads(line) for line in (out / "training-log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    out = tmp_path_factory.mktemp("trained")
    braid_train(out, corpus, 40)
    return out


def test_loss_falls_and_held_out_figures_are_logged(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "training-log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["mtp_loss"] < records[0]["mtp_loss"] - 0.3
    assert 0 < records[-1]["held_out_bits_per_byte"] < 8
    assert 0 <= records[-1]["mtp_acceptance"] <= 1
    assert len(records[-1]["max_vio"]) == len(records[-1]["unbiased_held_out_max_vio"]) == 3


def test_resumed_run_equals_uninterrupted_run(trained: Path, tmp_path: Path, corpus: Path) -> None:
    tokenizer, files = Tokenizer.from_file(str(trained / "tokenizer.json")), read_corpus(corpus)
    settings = TrainSettings(size="tiny", steps=40, batch_size=4, seq_len=32, dtype="float32")
    trainer = Trainer(settings, encode_files(tokenizer, files.training), encode_files(tokenizer, files.held_out))
    lines = [json.dumps(record) + "\n" for record in islice(trainer.records(), 13)]
    save(tmp_path, trainer, tokenizer)
    # The power fails some steps after the last save, in the middle of a line.
    lines += [json.dumps(record) + "\n" for record in islice(trainer.records(), 2)]
    (tmp_path / "training-log.jsonl").write_text("".join(lines) + '{"step": 1')
    records = braid_train(tmp_path, corpus, 40, "--resume")
    assert [record["step"] for record in records] == list(range(1, 41))
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(trained / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = [torch.load(path / "train-state.pt", weights_only=True)["network"] for path in (tmp_path, trained)]
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])


def test_resume_refuses_other_settings(trained: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(bias_update_speed 0.005 -> 0.1\)"):
        braid_train(trained, corpus, 40, "--resume", "--bias-update-speed", "0.1")
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        braid_train(tmp_path, corpus, 40, "--resume")
    with pytest.raises(ValueError, match=r"--batch-size is -1"):
        braid_train(tmp_path, corpus, 40, "--batch-size", "-1")


def test_bias_update_moves_loads_together() -> None:
    torch.manual_seed(1)
    gate = Gate(ModelConfig.from_dict(model_dict("tiny")))
    x = torch.randn(4, 64, 32) + 0.5  # A common direction favours some experts.
    gate(x)
    before = gate.max_violation()
    for _ in range(200):
        gate(x)
        gate.update_bias(5e-3)
    assert before > 0.5
    assert gate.max_violation() < 0.2


def test_balance_loss_is_one_when_even_and_grows_with_the_skew() -> None:
    even = sequence_balance_loss(torch.full((2, 8, 4), 0.5), torch.full((2, 4), 4.0))
    skewed = sequence_balance_loss(
        torch.tensor([0.9, 0.1, 0.1, 0.1]).expand(2, 8, 4), torch.tensor([[16.0, 0, 0, 0]] * 2)
    )
    assert even.item() == pytest.approx(1.0)
    assert skewed.item() == pytest.approx(3.0)


def test_padded_slots_keeps_every_slot_once_under_its_expert() -> None:
    expert_of_slot = torch.tensor([2, 0, 2, 2, 3, 0])
    slots, sizes = padded_slots(expert_of_slot, torch.tensor([2, 0, 3, 1]), multiple=4)
    assert sizes == [4, 0, 4, 4]
    assert slots.tolist() == [1, 5, -1, -1, 0, 2, 3, -1, 4, -1, -1, -1]


def test_checkpoint_gives_transformers_the_same_logits(trained: Path) -> None:
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM

    oracle = DeepseekV3ForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    network = TrainNetwork(ModelConfig.from_path(trained))
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(trained / "model.safetensors").items()})
    ids = torch.randint(SIZES["tiny"]["vocab_size"], (2, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, _ = network(ids)
        torch.testing.assert_close(logits, oracle(ids[:, :-1]).logits, atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = "class Stack:\n    pass  # é\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a stack\nof ints"}], tokenize=False)
    assert prompt == "# a stack\n# of ints\n"


def test_mtp_shares_embedding_and_head(trained: Path) -> None:
    tensors = load_file(trained / "model.safetensors")
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


def test_tokenizer_adds_nothing_and_round_trips(trained: Path) -> None:
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("é\t\n x").ids) == "é\t\n x"
    assert tokenizer.token_to_id("<|eos|>") == 1


def test_batches_are_a_function_of_the_step_and_cover_an_epoch() -> None:
    stream = TokenStream(torch.arange(1000), 1000)
    assert torch.equal(training_batch(stream, 7, 4, 16), training_batch(stream, 7, 4, 16))
    epoch = torch.cat([training_batch(stream, step, 1, 16) for step in range(61)])
    assert len(set(epoch[:, :16].flatten().tolist())) >= 960
    assert held_out_windows(stream, 16, 5).shape == (5, 18)
    with pytest.raises(ValueError, match="10 tokens"):
        training_batch(TokenStream(torch.arange(10), 10), 0, 1, 16)


def test_held_out_files_are_chosen_by_path_alone(corpus: Path) -> None:
    files = read_corpus(corpus)
    assert set(files.held_out) == {f"module_{i}.py" for i in range(120) if is_held_out(f"module_{i}.py")}
    assert not set(files.held_out) & set(files.training)


def test_corpus_without_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--corpus"):
        read_corpus(tmp_path)
