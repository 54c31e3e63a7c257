"""A checkpoint folder: dtypes converted on the way, and each kind of damage named before a weight is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from braid.model.checkpoint import INDEX_NAME, Checkpoint
from braid.model.safetensors_file import CheckpointError
from braid.model.tensor_names import ALL_ROLES, Role

WriteCheckpoint = Callable[..., Path]
EMBED = "model.embed_tokens.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def stored(path: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def check(checkpoint: Checkpoint, *roles: Role) -> None:
    checkpoint.check(checkpoint.config, roles or ALL_ROLES)


def edit_index(path: Path, name: str, file: str) -> None:
    index = json.loads((path / INDEX_NAME).read_text())
    index["weight_map"][name] = file
    (path / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_as_the_dtype_asked_for(write_checkpoint: WriteCheckpoint, dtype: str, wanted: torch.dtype) -> None:
    path = write_checkpoint(dtype=dtype)
    checkpoint, tensors = Checkpoint(path), stored(path)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name, wanted), tensor.to(wanted)), name


@pytest.mark.parametrize("dtype", ["fp8", "ue8m0"])
def test_fp8_is_dequantised_by_its_scales(write_checkpoint: WriteCheckpoint, dtype: str) -> None:
    path = write_checkpoint(dtype=dtype)
    checkpoint, tensors = Checkpoint(path), stored(path)
    rows, columns = torch.arange(144) // 128, torch.arange(64) // 128
    scale = tensors[O_PROJ + "_scale_inv"].double()[rows[:, None], columns]
    expected = tensors[O_PROJ].double() * scale
    assert torch.equal(checkpoint.read(O_PROJ, torch.float32), expected.float())
    check(checkpoint)


def test_a_tensor_of_many_windows_is_whole(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(dtype="fp8", changes={"hidden_size": 4128, "intermediate_size": 2500, "vocab_size": 1100})
    checkpoint, tensors = Checkpoint(path), stored(path)
    name = "model.layers.0.mlp.gate_proj.weight"
    windows = list(checkpoint.windows(name))
    assert [window.start % 128 for window in windows] == [0, 0]
    assert windows[-1].stop == 2500
    scale = tensors[name + "_scale_inv"].repeat_interleave(128, 0)[:2500].repeat_interleave(128, 1)[:, :4128]
    assert torch.equal(checkpoint.read(name, torch.float32), tensors[name].float() * scale)
    assert len(list(checkpoint.windows(EMBED))) == 2
    assert torch.equal(checkpoint.read(EMBED, torch.bfloat16), tensors[EMBED])


def test_one_file_needs_no_index(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(num_shards=1)
    (path / INDEX_NAME).unlink()
    check(Checkpoint(path))
    next(path.glob("*.safetensors")).rename(path / "model.safetensors")
    check(Checkpoint(path))


def test_names_read_is_the_record_of_what_was_read(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = Checkpoint(write_checkpoint(dtype="fp8"))
    assert checkpoint.names_read == frozenset()
    checkpoint.read(O_PROJ, torch.float32)
    assert checkpoint.names_read == {O_PROJ, O_PROJ + "_scale_inv"}


def test_mtp_may_be_absent_as_a_whole_or_without_its_copies(write_checkpoint: WriteCheckpoint) -> None:
    def drop_copies(state: dict[str, Tensor]) -> None:
        del state["model.layers.3.embed_tokens.weight"], state["model.layers.3.shared_head.head.weight"]

    def drop_module(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("model.layers.3.")]:
            del state[name]

    def drop_norm(state: dict[str, Tensor]) -> None:
        del state["model.layers.3.enorm.weight"]

    check(Checkpoint(write_checkpoint("copies", edit=drop_copies)))
    check(Checkpoint(write_checkpoint("module", edit=drop_module)))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.3\.enorm\.weight'"):
        check(Checkpoint(write_checkpoint("norm", edit=drop_norm)))


def remove(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(name)


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: change(state[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove(O_PROJ), rf"no tensor '{O_PROJ}' in its 3 safetensors files: the checkpoint is incomplete"),
        (remove(O_PROJ + "_scale_inv"), rf"'{O_PROJ}' is fp8 but the checkpoint lacks its scales '{O_PROJ}_scale_inv'"),
        (
            replace(O_PROJ + "_scale_inv", lambda scale: scale[:1]),
            r"_scale_inv' has shape \[1, 1\], a weight of \[144, 64\] in blocks of 128x128 needs \[2, 1\]",
        ),
        (
            replace(O_PROJ + "_scale_inv", lambda scale: scale.to(torch.int8)),
            "is I8, expected one of F32, BF16, F8_E8M0",
        ),
        (replace(EMBED, lambda embed: embed[:, :100]), r"has shape \[160, 100\], config.json asks for \[160, 144\]"),
        (replace(EMBED, lambda embed: embed.to(torch.int8)), f"'{EMBED}' is I8, expected one of F32, BF16, F16"),
        (
            replace("model.norm.weight", lambda norm: norm.to(torch.float8_e4m3fn)),
            r"lacks its scales 'model\.norm\.weight_scale_inv'",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_file_and_remedy(
    write_checkpoint: WriteCheckpoint, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    checkpoint = Checkpoint(write_checkpoint(dtype="fp8", edit=edit))
    with pytest.raises(CheckpointError, match=message):
        check(checkpoint)
    assert checkpoint.names_read == frozenset()


def test_several_wrong_tensors_are_counted(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(changes={"hidden_size": 144})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 160}))
    with pytest.raises(CheckpointError, match=r"\(and \d+ more tensors are wrong\)"):
        check(Checkpoint(path))


def test_a_check_by_role_ignores_what_others_need(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = Checkpoint(write_checkpoint(edit=remove(O_PROJ)))
    check(checkpoint, "experts")
    with pytest.raises(CheckpointError, match="o_proj"):
        check(checkpoint, "attention")


def test_an_index_that_names_a_missing_file(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint()
    (path / "model-00002-of-00003.safetensors").unlink()
    message = r"names model-00002-of-00003\.safetensors \(for '.*'\), which is not there; 1 of 3 files are missing"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path)


def test_an_index_that_disagrees_with_the_files(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint()
    edit_index(path, "model.norm.weight", "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"but it is in model-00003-of-00003\.safetensors"):
        Checkpoint(path)


def test_an_index_may_not_leave_the_folder(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint()
    edit_index(path, "model.norm.weight", "../elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="file names in the same folder"):
        Checkpoint(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(write_checkpoint: WriteCheckpoint, text: str) -> None:
    path = write_checkpoint()
    (path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a safetensors index"):
        Checkpoint(path)


def test_a_folder_without_weights_or_config(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint(tmp_path / "nowhere")
    path = write_checkpoint()
    for shard in (*path.glob("*.safetensors"), path / INDEX_NAME):
        shard.unlink()
    with pytest.raises(CheckpointError, match="holds 0 safetensors files"):
        Checkpoint(path)
    (path / "config.json").write_text("{oops")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        Checkpoint(path)
    (path / "config.json").write_text('{"model_type": "gpt5"}')
    with pytest.raises(
        CheckpointError, match=r"config\.json: model_type 'gpt5' is not supported; supported: deepseek_v3"
    ):
        Checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Checkpoint(path)
