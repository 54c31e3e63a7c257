"""What is written in pieces is what the safetensors library reads; half a file never gets the name of a whole one."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from braid.model.shard_writer import Planned, ShardWriter, is_finished

PLAN = (Planned("codes", "F8_E4M3", (4, 3)), Planned("wide", "F32", (4, 3)), Planned("half", "BF16", (5,)))
METADATA = {"format": "pt", "converted_from": "abc"}


def write_all(path: Path) -> dict[str, torch.Tensor]:
    wide = torch.arange(12, dtype=torch.float32).view(4, 3)
    state = {"wide": wide, "codes": wide.to(torch.float8_e4m3fn), "half": torch.arange(5).to(torch.bfloat16)}
    with ShardWriter(path, PLAN, METADATA) as shard:
        for start in (0, 2):  # interleaved, as codes and scales are
            shard.write("codes", state["codes"][start : start + 2])
            shard.write("wide", state["wide"][start : start + 2])
        shard.write("half", state["half"])
    return state


def test_the_library_reads_it_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state, loaded = write_all(path), load_file(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in state.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_file_is_known_by_plan_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert not is_finished(path, PLAN, METADATA)
    write_all(path)
    assert is_finished(path, PLAN, METADATA)
    assert not is_finished(path, PLAN[:2], METADATA)
    assert not is_finished(path, PLAN, {**METADATA, "converted_from": "other"})
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_finished(path, PLAN, METADATA)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path / "a.safetensors", PLAN, METADATA) as shard:
            shard.write("half", torch.zeros(5, dtype=torch.bfloat16))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_tensor_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="wide was not written"), ShardWriter(tmp_path / "a", PLAN, {}) as shard:
        shard.write("codes", torch.zeros(4, 3).to(torch.float8_e4m3fn))
    assert list(tmp_path.iterdir()) == []
