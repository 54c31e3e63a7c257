"""`braid train`: trains a small DeepSeek-V3 model on the Python standard library, from nothing, on the machine at hand.

A run is a function of its settings and step count: batches depend on the step alone, so a resumed run repeats the
uninterrupted one bit for bit. With --minutes the schedule follows the clock instead, and ends on time.
"""

import argparse
import ctypes
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor

from .config import ModelConfig
from .corpus import (
    TokenStream,
    encode_files,
    held_out_windows,
    read_corpus,
    tokenizer_settings,
    train_tokenizer,
    training_batch,
)
from .train_checkpoint import export_checkpoint, load_state, load_tokenizer, save_state, truncate_log
from .train_network import TrainNetwork
from .train_settings import SIZES, TrainSettings, model_dict


def keep_freed_memory() -> None:
    """Tells glibc to reuse large buffers: giving each back to the kernel costs half of a CPU step in page faults."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 2**28)


def make_optimizer(network: TrainNetwork) -> torch.optim.AdamW:
    named = list(network.named_parameters())
    decayed = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed_tokens" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [B, T, V], targets: int64 [B, T] -> the mean in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Trainer:
    def __init__(self, settings: TrainSettings, training: TokenStream, held_out: TokenStream) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.training, self.held_out = training, held_out
        self.network = TrainNetwork(ModelConfig.from_dict(model_dict(settings.size)))
        self.optimizer = make_optimizer(self.network)
        self.step = 0
        self.elapsed_s = 0.0

    @property
    def progress(self) -> float:
        settings = self.settings
        if settings.steps is not None:
            return min(1.0, self.step / settings.steps)
        assert settings.minutes is not None
        return min(1.0, self.elapsed_s / (settings.minutes * 60))

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    def train_step(self) -> dict[str, Any]:
        """Runs one step and returns its log record."""
        started, settings, progress = time.perf_counter(), self.settings, self.progress
        ids = training_batch(self.training, self.step, settings.batch_size, settings.seq_len)
        with self.autocast():
            logits, mtp_logits = self.network(ids[:, :-1])
            loss = cross_entropy(logits, ids[:, 1:-1])
            mtp_loss = cross_entropy(mtp_logits, ids[:, 2:])
        gates = list(self.network.gates())
        balance = torch.stack([gate.balance_loss for gate in gates]).sum()
        total = loss + settings.mtp_weight(progress) * mtp_loss + settings.balance_alpha * balance
        torch.autograd.backward(total)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        learning_rate = settings.learning_rate(self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for gate in gates:
            gate.update_bias(settings.bias_speed(progress))
        self.step += 1
        seconds = time.perf_counter() - started
        self.elapsed_s += seconds
        return {
            "step": self.step,
            "tokens": self.step * settings.batch_size * settings.seq_len,
            "loss": round(loss.item(), 4),
            "mtp_loss": round(mtp_loss.item(), 4),
            "grad_norm": round(norm.item(), 3),
            "max_vio": [round(gate.max_violation(), 3) for gate in gates],
            "lr": learning_rate,
            "tokens_per_s": round(settings.batch_size * settings.seq_len / seconds),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out bits per byte, MTP acceptance (its first choice is the main model's), MaxVio by layer."""
        started, gates = time.perf_counter(), list(self.network.gates())
        windows = held_out_windows(self.held_out, self.settings.seq_len, self.settings.held_out_windows)
        nats, accepted, loads = 0.0, 0, [torch.zeros_like(gate.load) for gate in gates]
        for ids in torch.split(windows, self.settings.batch_size):
            with self.autocast():
                logits, mtp_logits = self.network(ids[:, :-1])
            nats += cross_entropy(logits, ids[:, 1:-1]).item() * ids.shape[0]
            accepted += int((mtp_logits[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)).sum())
            loads = [load + gate.load for load, gate in zip(loads, gates, strict=True)]
        self.elapsed_s += time.perf_counter() - started
        bits_per_token = nats / len(windows) / math.log(2)
        return {
            "held_out_bits_per_byte": round(bits_per_token / self.held_out.bytes_per_token, 4),
            "held_out_loss": round(nats / len(windows), 4),
            "mtp_acceptance": round(accepted / (len(windows) * (self.settings.seq_len - 1)), 4),
            "held_out_max_vio": [round(float(load.max() / load.mean() - 1), 3) for load in loads],
        }

    def evaluate_without_bias(self) -> dict[str, Any]:
        """The same weights with the trained bias taken away: what the bias alone does for the balance."""
        biases = [gate.e_score_correction_bias.clone() for gate in self.network.gates()]
        for gate in self.network.gates():
            gate.e_score_correction_bias.zero_()
        result = self.evaluate()
        for gate, bias in zip(self.network.gates(), biases, strict=True):
            gate.e_score_correction_bias.copy_(bias)
        return {f"unbiased_{key}": value for key, value in result.items() if key.startswith("held_out")}

    def records(self) -> Iterator[dict[str, Any]]:
        """Trains to the end; every record is complete before it is handed out."""
        while self.progress < 1.0:
            record = self.train_step()
            is_last = self.progress >= 1.0
            if is_last or self.step % self.settings.evaluate_every == 0:
                record |= self.evaluate()
            if is_last:
                record |= self.evaluate_without_bias()
            yield record | {"elapsed_s": round(self.elapsed_s, 1)}


def save(out: Path, trainer: Trainer, tokenizer: Tokenizer) -> None:
    config = model_dict(trainer.settings.size)
    tokenizer_config = tokenizer_settings(config["max_position_embeddings"])
    export_checkpoint(out, trainer.network, config, tokenizer, tokenizer_config)
    save_state(out, trainer.network, trainer.optimizer, trainer.step, trainer.elapsed_s, asdict(trainer.settings))


def train(settings: TrainSettings, out: Path, corpus_root: Path | None, resume: bool, save_every_s: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(corpus_root)
    tokenizer = load_tokenizer(out) if resume else train_tokenizer(corpus, SIZES[settings.size]["vocab_size"])
    trainer = Trainer(settings, encode_files(tokenizer, corpus.training), encode_files(tokenizer, corpus.held_out))
    if resume:
        state = load_state(out, asdict(settings))
        trainer.network.load_state_dict(state["network"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.elapsed_s = state["step"], state["elapsed_s"]

    truncate_log(out, trainer.step)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with open(out / "training-log.jsonl", "a", encoding="utf-8") as log, Progress(*columns) as bar:
        task = bar.add_task("training", total=1.0)
        bar.update(task, completed=trainer.progress)
        saved_at = trainer.elapsed_s
        try:
            for record in trainer.records():
                log.write(json.dumps(record) + "\n")
                log.flush()
                text = f"step {record['step']}  loss {record['loss']:.3f}  {record['tokens_per_s']} tokens/s"
                bar.update(task, completed=trainer.progress, description=text)
                if trainer.elapsed_s - saved_at > save_every_s:
                    save(out, trainer, tokenizer)
                    saved_at = trainer.elapsed_s
        finally:
            save(out, trainer, tokenizer)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and the state")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="train this many steps (exactly repeatable)")
    length.add_argument("--minutes", type=float, help="train for this long; the schedule follows the clock")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--config", choices=sorted(SIZES), default="small", help="size of the model")
    parser.add_argument("--corpus", type=Path, help="folder of Python source (default: this Python's standard library)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the matrix products")
    parser.add_argument("--bias-update-speed", type=float, default=5e-3, help="gamma; 0 turns the balancing off")
    parser.add_argument("--save-every", type=float, default=300, metavar="SECONDS", help="checkpoint interval")


def run(args: argparse.Namespace) -> None:
    for name in ("steps", "minutes", "batch_size", "seq_len", "threads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be positive")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    settings = TrainSettings(
        size=args.config,
        steps=args.steps if args.minutes is None else None,
        minutes=args.minutes if args.steps or args.minutes else 60.0,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        bias_update_speed=args.bias_update_speed,
        dtype=args.dtype,
    )
    train(settings, args.out, args.corpus, args.resume, args.save_every)
