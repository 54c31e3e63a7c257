"""fp8 to BF16 and back: every bit accounted for, one file at a time, and an interruption costs one file."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from braid.model.checkpoint import INDEX_NAME, Checkpoint
from braid.model.convert import convert
from braid.model.safetensors_file import CheckpointError
from braid.model.tensor_names import expected_tensors

WriteCheckpoint = Callable[..., Path]

# Prints what converting cost above the interpreter's own memory.
MEASURE = """
import sys, torch
from pathlib import Path
from braid.model.convert import convert
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
before = status("VmRSS")
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(status("VmHWM") - before)
"""


def stored(path: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def check(path: Path) -> None:
    checkpoint = Checkpoint(path)
    checkpoint.check(checkpoint.config)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def dequantise_float64(codes: Tensor, scale: Tensor) -> np.ndarray:
    rows, columns = np.indices(codes.shape)
    return np.asarray(codes.double().numpy() * scale.double().numpy()[rows // 128, columns // 128])


@pytest.mark.parametrize("dtype", ["fp8", "ue8m0"])
def test_fp8_to_bfloat16_is_the_float64_product_rounded(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, dtype: str
) -> None:
    source = write_checkpoint(dtype=dtype)
    convert(source, tmp_path / "out", "bfloat16")
    before, after = stored(source), stored(tmp_path / "out")
    assert after.keys() == expected_tensors(Checkpoint(source).config).keys()
    for name, tensor in after.items():
        if before[name].dtype == torch.float8_e4m3fn:
            exact = dequantise_float64(before[name], before[name + "_scale_inv"])
            assert torch.equal(tensor, torch.from_numpy(exact.astype(np.float32)).to(torch.bfloat16)), name
        else:
            assert torch.equal(tensor, before[name])


def test_what_is_quantised_is_what_deepseek_quantises(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    convert(write_checkpoint(dtype="float32"), tmp_path / "out", "fp8")
    state = stored(tmp_path / "out")
    layer = "model.layers.3."
    fp8 = {name.removeprefix(layer) for name, tensor in state.items() if tensor.dtype == torch.float8_e4m3fn}
    for name in (
        "self_attn.q_a_proj.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.experts.7.down_proj.weight",
        "mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        assert name in fp8
        full = name if name.startswith("model.") else layer + name
        assert state[full + "_scale_inv"].dtype == torch.float32
    for name in ("embed_tokens.weight", "eh_proj.weight", "shared_head.head.weight", "mlp.gate.weight", "enorm.weight"):
        assert state[layer + name].dtype == torch.bfloat16
    assert state["lm_head.weight"].dtype == state["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert state[layer + "mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_fp8_survives_the_way_to_bfloat16_and_back(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    source = write_checkpoint(dtype="fp8")
    convert(source, tmp_path / "wide", "bfloat16")
    convert(tmp_path / "wide", tmp_path / "back", "fp8")
    before, after = stored(source), stored(tmp_path / "back")
    scales = [name for name in before if name.endswith("_scale_inv")]
    for name in scales:  # bfloat16 kept 8 bits of the largest value, from which the scale is made anew
        torch.testing.assert_close(after.pop(name), before.pop(name), rtol=2.0**-8, atol=0)
    assert_same_bits(before, after)
    convert(tmp_path / "back", tmp_path / "wide again", "bfloat16")
    convert(tmp_path / "wide again", tmp_path / "back again", "fp8")
    assert_same_bits(stored(tmp_path / "back"), stored(tmp_path / "back again"))


def test_ue8m0_loses_nothing_at_all(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    source = write_checkpoint(dtype="ue8m0")
    convert(source, tmp_path / "wide", "bfloat16")
    convert(tmp_path / "wide", tmp_path / "back", "fp8", scale_format="ue8m0")
    assert Checkpoint(tmp_path / "back").config.quantization is not None
    for name in Checkpoint(source).names():
        if not name.endswith("_scale_inv"):
            one, other = (Checkpoint(path).read(name, torch.float32) for path in (source, tmp_path / "back"))
            assert torch.equal(one, other), name


def test_config_index_and_other_files(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    source = write_checkpoint(dtype="fp8")
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE-MODEL").write_text("use restrictions")
    (source / "figures").mkdir()
    (source / "figures" / "a.svg").write_text("<svg/>")
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_text("")
    (source / "pytorch_model.bin").write_text("stale")
    convert(source, tmp_path / "wide", "bfloat16")
    convert(tmp_path / "wide", tmp_path / "back", "fp8")
    for folder in ("wide", "back"):
        out = tmp_path / folder
        assert (out / "LICENSE-MODEL").read_text() == "use restrictions"
        assert (out / "tokenizer.json").exists()
        assert (out / "figures" / "a.svg").exists()
        assert not (out / ".cache").exists()
        assert not (out / "pytorch_model.bin").exists()
        index = json.loads((out / INDEX_NAME).read_text())
        state = stored(out)
        assert index["weight_map"].keys() == state.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
        check(out)
    wide, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("wide", "back"))
    assert "quantization_config" not in wide
    original = json.loads((source / "config.json").read_text())
    assert back == original
    assert {**wide, "quantization_config": original["quantization_config"]} == original


def test_one_file_stays_one_file(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    source = write_checkpoint(num_shards=1)
    (source / INDEX_NAME).unlink()
    next(source.glob("*.safetensors")).rename(source / "model.safetensors")
    convert(source, tmp_path / "out", "fp8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    check(tmp_path / "out")


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_file_it_was_at(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    source, out = write_checkpoint(dtype="fp8", num_shards=4), tmp_path / "out"

    def interrupt(done: int, total: int, file: str) -> None:
        if file.startswith("model-00003"):
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(source, out, "bfloat16", interrupt)
    finished = {path.name: path.stat() for path in out.glob("*.safetensors")}
    assert sorted(finished) == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.partial"))
    seen: list[tuple[int, int, str]] = []
    convert(source, out, "bfloat16", lambda *step: seen.append(step))
    for name, before in finished.items():
        after = (out / name).stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(Checkpoint(source).spec(name).num_bytes for name in Checkpoint(source).names())
    )
    convert(source, tmp_path / "in one go", "bfloat16")
    for path in (tmp_path / "in one go").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_file_of_another_source_is_not_taken_for_finished(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(write_checkpoint("one", dtype="fp8"), out, "bfloat16")
    other = write_checkpoint(
        "two", dtype="fp8", edit=lambda state: state.update({"model.norm.weight": torch.zeros(144)})
    )
    convert(other, out, "bfloat16")
    assert torch.equal(stored(out)["model.norm.weight"], torch.zeros(144, dtype=torch.bfloat16))


def test_what_cannot_be_done_is_said_first(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    source, out = write_checkpoint(dtype="fp8"), tmp_path / "out"
    with pytest.raises(ValueError, match="target 'int4' is unknown: give one of bfloat16, fp8"):
        convert(source, out, "int4")
    with pytest.raises(ValueError, match="is fp8 already"):
        convert(source, out, "fp8")
    for inside in (source, source / "inside"):
        with pytest.raises(ValueError, match="the checkpoint's own folder or lies in it"):
            convert(source, inside, "bfloat16")
    shutil.copytree(write_checkpoint("other", num_shards=2), out)
    with pytest.raises(ValueError, match="which is not of this conversion: choose an empty folder"):
        convert(source, out, "bfloat16")
    precious = shutil.copytree(source, tmp_path / "precious")
    before = {path.name: path.read_bytes() for path in precious.iterdir()}
    with pytest.raises(ValueError, match="which is not of this conversion: choose an empty folder"):
        convert(source, precious, "bfloat16")  # same file names, but nobody's conversion
    assert {path.name: path.read_bytes() for path in precious.iterdir()} == before
    with pytest.raises(ValueError, match=r"config\.json is a file: choose a folder"):
        convert(source, precious / "config.json", "bfloat16")
    wide = write_checkpoint("wide")
    with pytest.raises(ValueError, match="is bfloat16 already"):
        convert(wide, tmp_path / "new", "bfloat16")


def test_damaged_sources_leave_no_checkpoint_behind(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    broken = write_checkpoint("broken", dtype="fp8", edit=lambda state: state.__delitem__(name + "_scale_inv"))
    with pytest.raises(CheckpointError, match="lacks its scales"):
        convert(broken, tmp_path / "out", "bfloat16")
    assert not (tmp_path / "out").exists()
    infinite = write_checkpoint("infinite", edit=lambda state: state[name].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=rf"'{name}': the weight holds infinite"):
        convert(infinite, tmp_path / "out", "fp8")
    assert not (tmp_path / "out" / "config.json").exists()


def test_memory_does_not_grow_with_the_file(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    changes = {"hidden_size": 1024, "moe_intermediate_size": 2048, "num_nextn_predict_layers": 0}
    source = write_checkpoint(dtype="bfloat16", changes=changes, num_shards=1)
    folders = [source, tmp_path / "fp8", tmp_path / "wide"]
    for src, dst, target in zip(folders, folders[1:], ("fp8", "bfloat16"), strict=False):
        command = [sys.executable, "-P", "-c", MEASURE, str(src), str(dst), target]
        peak = int(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout)
        assert peak < 64e6 < sum(path.stat().st_size for path in dst.glob("*.safetensors"))
