"""What a training run leaves on disk: a Hugging Face checkpoint to serve, and the state to go on from."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

STATE = "train-state.pt"
LOG = "training-log.jsonl"
MAY_CHANGE = ("steps", "minutes")


def export_checkpoint(
    out: Path, network: nn.Module, config: dict[str, Any], tokenizer: Tokenizer, tokenizer_config: dict[str, Any]
) -> None:
    """Writes every file in whole or not at all, so that a server may start on `out` while training goes on."""
    generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    tokenizer.save(str(out / "tokenizer.json.part"))
    os.replace(out / "tokenizer.json.part", out / "tokenizer.json")
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_json(out / "generation_config.json", generation | {"do_sample": True, "temperature": 0.7, "top_p": 0.95})
    write_json(out / "config.json", config)
    tensors = {name: shipped(name, tensor) for name, tensor in network.state_dict().items()}
    save_file(tensors, out / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")


def shipped(name: str, tensor: Tensor) -> Tensor:
    """bfloat16, but for the routing bias, whose steps of 0.001 bfloat16 cannot hold. Clones, for shared tensors."""
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    return tensor.detach().to(dtype).clone()


def write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def save_state(
    out: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    elapsed_s: float,
    settings: dict[str, Any],
) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "elapsed_s": elapsed_s,
        "settings": settings,
    }
    torch.save(state, out / f"{STATE}.part")
    os.replace(out / f"{STATE}.part", out / STATE)


def load_state(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not (out / STATE).exists():
        raise ValueError(f"{out} holds no {STATE} to resume from: start without --resume")
    state: dict[str, Any] = torch.load(out / STATE, weights_only=True)
    before = state["settings"] | {key: settings[key] for key in MAY_CHANGE}
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise ValueError(f"{out} was trained with other settings ({', '.join(changed)}): resume with the same ones")
    return state


def load_tokenizer(out: Path) -> Tokenizer:
    if not (out / "tokenizer.json").exists():
        raise ValueError(f"{out} holds no tokenizer.json to resume with: start without --resume")
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def truncate_log(out: Path, step: int) -> None:
    """Drops the records of steps that a resumed run will repeat."""
    if (out / LOG).exists():
        lines = (out / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        (out / LOG).write_text("".join(kept), encoding="utf-8")
