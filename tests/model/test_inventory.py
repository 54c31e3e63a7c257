"""What `inspect` says, and the memory check that comes before loading."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from braid.model.checkpoint import Checkpoint
from braid.model.inventory import Inventory, bytes_for_role, check_memory, describe, render
from braid.model.safetensors_file import CheckpointError
from braid.model.weights import load_attention, load_experts

DATA = Path(__file__).parent.parent / "data"
WriteCheckpoint = Callable[..., Path]


def shown(inventory: Inventory) -> str:
    console = Console(width=110)
    with console.capture() as capture:
        console.print(render(inventory))
    return capture.get()


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)


def test_deepseek_v3_from_its_config_alone() -> None:
    inventory = describe(DATA / "deepseek_v3_config.json")
    assert inventory.latent_bytes == 70_272
    assert inventory.on_disk is None
    text = shown(inventory)
    for said in (
        "671B parameters, 36.6B activated a token (37.6B counting the whole embedding table)",
        "11.6B unique in the MTP module, 11.5B in its decoder layer",
        "70,272 bytes of bfloat16 latent cache a token (61 layers x 576 x 2)",
        "licence files: none found",
        "2.55 GB",
    ):
        assert said in text


def test_a_checkpoint_says_what_lies_on_disk_and_its_licences(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(dtype="fp8")
    (path / "LICENSE-MODEL").write_text("DEEPSEEK LICENSE AGREEMENT")
    inventory = describe(path)
    checkpoint = Checkpoint(path)
    assert inventory.on_disk is not None
    sizes = dict(inventory.on_disk.num_bytes)
    assert sum(sizes.values()) == sum(checkpoint.spec(name).num_bytes for name in checkpoint.names())
    assert sizes.keys() == {"F8_E4M3", "BF16", "F32"}
    text = shown(inventory)
    assert "licence files: LICENSE-MODEL" in text
    assert "This model carries use restrictions: read LICENSE-MODEL" in text
    assert "every tensor has the right shape" in text
    assert "without the MTP module" not in text


def test_a_checkpoint_without_its_mtp_module_is_said_to_be_so(write_checkpoint: WriteCheckpoint) -> None:
    def drop_module(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("model.layers.3.")]:
            del state[name]

    assert "BF16, 64 B F32, without the MTP module" in shown(describe(write_checkpoint(edit=drop_module)))


def test_a_damaged_checkpoint_is_not_described_as_whole(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint()
    (path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3 files are missing"):
        describe(path)
    assert describe(path / "config.json").on_disk is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["noaux_tc", "greedy"])
def test_bytes_for_role_are_what_loading_leaves_resident(
    write_checkpoint: WriteCheckpoint, dtype: torch.dtype, method: str
) -> None:
    checkpoint = Checkpoint(write_checkpoint(changes={"topk_method": method}))
    config = checkpoint.config
    attention = sum(tensor.nbytes for tensor in tensors_of(load_attention(checkpoint, config, dtype)))
    stacks = load_experts(checkpoint, config, range(config.num_hidden_layers), [1, 4, 5], dtype)
    experts = sum(tensor.nbytes for tensor in tensors_of(tuple(stacks.values())))
    assert bytes_for_role(config, dtype, "attention") == attention
    assert bytes_for_role(config, dtype, "expert", [1, 4, 5]) == experts
    assert bytes_for_role(config, dtype, "attention", [1, 4, 5]) == attention + experts


def test_bytes_of_the_mtp_module_are_counted_where_it_is_loaded(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = Checkpoint(write_checkpoint())
    config, dtype = checkpoint.config, torch.bfloat16
    assert checkpoint.has_mtp(config)
    weights = load_attention(checkpoint, config, dtype, has_mtp=True)
    shared = 2 * weights.embed_tokens.nbytes  # held once, met twice
    attention = sum(tensor.nbytes for tensor in tensors_of(weights)) - shared
    stacks = load_experts(checkpoint, config, range(config.num_hidden_layers + 1), [2, 3], dtype)
    experts = sum(tensor.nbytes for tensor in tensors_of(tuple(stacks.values())))
    assert bytes_for_role(config, dtype, "attention", has_mtp=True) == attention
    assert bytes_for_role(config, dtype, "expert", [2, 3], has_mtp=True) == experts


def test_too_little_memory_is_said_with_both_figures() -> None:
    check_memory(10**9, 10**9)
    message = r"needs 12\.3 GB for the weights, 8\.00 GB of memory available: load as bfloat16"
    with pytest.raises(ValueError, match=message):
        check_memory(12_300_000_000, 8_000_000_000)
