"""Measures and draws what `braid train` left behind: the figures and the picture of docs/tiny-model.md.

python benchmarks/tiny_model.py model/bundled [--control docs/tiny-model-control.jsonl --picture docs/tiny-model.png]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import load_file
from torch import Tensor

from braid.model.corpus import encode_files, held_out_windows, read_corpus
from braid.model.train import Trainer
from braid.model.train_checkpoint import LOG, load_tokenizer
from braid.model.train_network import MtpLayer, TrainNetwork
from braid.model.train_settings import TrainSettings

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# No prompt ends in a newline: the tokenizer joins a newline with the indentation after it.
PROMPTS = ("def fibonacci(n):", "class Stack:", "import os\n\ndef read_file(path):")
LAYERS = ("layer 1", "layer 2", "layer 3", "layer 4", "MTP layer")


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shipped_trainer(path: Path) -> Trainer:
    """A trainer around the exported bfloat16 weights, with every held-out window, for its `evaluate`."""
    tokenizer, corpus = load_tokenizer(path), read_corpus()
    held_out = encode_files(tokenizer, corpus.held_out)
    settings = TrainSettings(steps=1, held_out_windows=10**6, dtype="float32")
    trainer = Trainer(settings, encode_files(tokenizer, corpus.training), held_out)
    tensors = load_file(path / "model.safetensors")
    trainer.network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    trainer.network.eval()
    return trainer


def with_mtp_logits(network: TrainNetwork, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """ids: [B, T]. Returns the last row of logits, and the MTP logits once the token sampled from them is known."""
    cos, sin = network.rope(ids.shape[1])
    x = network.model.embed_tokens(ids)
    for layer in network.model.layers[: network.config.num_hidden_layers]:
        x = layer(x, cos, sin)
    hidden = network.model.norm(x)
    mtp = network.model.layers[-1]
    assert isinstance(mtp, MtpLayer)

    def draft(token: Tensor) -> Tensor:
        logits: Tensor = mtp.predict(hidden, torch.cat((ids[:, 1:], token), dim=1), cos, sin)[:, -1]
        return logits

    logits: Tensor = network.lm_head(hidden[:, -1])
    return logits, draft


@torch.no_grad()
def greedy_acceptance(trainer: Trainer, num_prompts: int = 24, prompt_tokens: int = 128, new_tokens: int = 64) -> float:
    """Share of drafts that equal the token the main model then emits, while it continues held-out text greedily."""
    ids = held_out_windows(trainer.held_out, prompt_tokens, num_prompts)[:, :prompt_tokens]
    accepted, draft_ids = 0, None
    for _ in range(new_tokens):
        logits, draft = with_mtp_logits(trainer.network, ids)
        token = logits.argmax(-1, keepdim=True)
        if draft_ids is not None:
            accepted += int((draft_ids == token).sum())
        draft_ids = draft(token).argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
    return accepted / (len(ids) * (new_tokens - 1))


@torch.no_grad()
def continue_text(trainer: Trainer, path: Path, prompt: str, temperature: float, new_tokens: int = 120) -> str:
    tokenizer, generator = load_tokenizer(path), torch.Generator().manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    for _ in range(new_tokens):
        logits, _ = with_mtp_logits(trainer.network, ids)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if token.item() == 1:
            break
        ids = torch.cat((ids, token), dim=1)
    return str(tokenizer.decode(ids[0].tolist()))


def smooth(values: list[float], window: int = 20) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def evaluated(log: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [record for record in log if key in record]
    return [record["tokens"] / 1e6 for record in rows], [record[key] for record in rows]


def mean_violation(log: list[dict[str, Any]]) -> list[float]:
    return smooth([sum(record["max_vio"]) / len(record["max_vio"]) for record in log])


def draw_loss(axes: Axes, log: list[dict[str, Any]]) -> None:
    tokens = [record["tokens"] / 1e6 for record in log]
    axes.plot(tokens, smooth([record["loss"] for record in log]), label="next token")
    axes.plot(tokens, smooth([record["mtp_loss"] for record in log]), label="token after next (MTP)")
    axes.plot(*evaluated(log, "held_out_loss"), "o", markersize=3, label="next token, held out")
    axes.set(title="Loss, nats per token", ylim=(None, 7))
    axes.legend()


def draw_balance(axes: Axes, log: list[dict[str, Any]], control: list[dict[str, Any]]) -> None:
    tokens = [record["tokens"] / 1e6 for record in log]
    for index, name in enumerate(LAYERS):
        axes.plot(tokens, smooth([record["max_vio"][index] for record in log]), linewidth=0.7, alpha=0.6, label=name)
    axes.plot(tokens, mean_violation(log), color="black", label="mean, with the bias update")
    if control:
        tokens = [record["tokens"] / 1e6 for record in control]
        axes.plot(tokens, mean_violation(control), color="red", label="mean, without (control run)")
    axes.set(title="MaxVio of a training batch", yscale="log")
    axes.legend(fontsize=7)


def draw(log: list[dict[str, Any]], control: list[dict[str, Any]], out: Path) -> None:
    figure, ((top_left, top_right), (bottom_left, bottom_right)) = plt.subplots(2, 2, figsize=(11, 7.5))
    draw_loss(top_left, log)
    top_right.plot(*evaluated(log, "held_out_bits_per_byte"), "o-", markersize=3)
    top_right.set(title="Held-out bits per byte")
    draw_balance(bottom_left, log, control)
    bottom_right.plot(*evaluated(log, "mtp_acceptance"), "o-", markersize=3)
    bottom_right.set(title="MTP acceptance on held-out text", ylim=(0, 1))
    for axes in figure.axes:
        axes.set_xlabel("million tokens")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def report(path: Path) -> Iterator[str]:
    trainer = shipped_trainer(path)
    yield json.dumps(trainer.evaluate() | trainer.evaluate_without_bias(), indent=1)
    yield f"greedy acceptance {greedy_acceptance(trainer):.3f}"
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            yield f"--- temperature {temperature}\n{continue_text(trainer, path, prompt, temperature)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that braid train wrote")
    parser.add_argument("--control", type=Path, help="log of a run with --bias-update-speed 0")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.picture:
        draw(read_log(args.run / LOG), read_log(args.control) if args.control else [], args.picture)
    for text in report(args.run):
        print(text, flush=True)


if __name__ == "__main__":
    main()
