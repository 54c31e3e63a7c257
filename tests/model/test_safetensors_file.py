"""One file: what the library writes is read back bit for bit, and what is damaged is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from braid.model.safetensors_file import CheckpointError, map_rows, read_header

TENSORS = {
    "matrix": torch.arange(21, dtype=torch.float32).view(7, 3),
    "half": torch.arange(5).to(torch.float16),
    "brain": torch.arange(6).to(torch.bfloat16).view(3, 2),
    "codes": torch.arange(16).view(4, 4).to(torch.float8_e4m3fn),
    "powers": torch.tensor([1.0, 2.0]).to(torch.float8_e8m0fnu),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
}


def damaged(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: Any, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(TENSORS)
    for name, spec in header.tensors.items():
        got = map_rows(spec, 0, spec.num_rows)
        assert got.dtype == TENSORS[name].dtype
        assert got.shape == TENSORS[name].shape
        assert torch.equal(got.to(torch.float32), TENSORS[name].to(torch.float32))


def test_a_window_of_rows_is_read_alone(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    spec = read_header(tmp_path / "a.safetensors").tensors["matrix"]
    assert torch.equal(map_rows(spec, 2, 5), TENSORS["matrix"][2:5])


def test_writing_to_a_window_does_not_reach_the_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    map_rows(read_header(tmp_path / "a.safetensors").tensors["matrix"], 0, 7).zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.safetensors is (truncated|not a whole safetensors file)"):
            read_header(path)


def test_a_file_cut_after_its_header_was_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"big": torch.zeros(4096, 4)}, path)
    spec = read_header(path).tensors["big"]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot read 'big'"):
        map_rows(spec, 0, 4096)


def test_an_absurd_header_length_names_both_sizes(tmp_path: Path) -> None:
    path = damaged(tmp_path / "a.safetensors", b"{}", length=2**60)
    with pytest.raises(CheckpointError, match="has 10 bytes and claims a header of 1,152,921,504,606,846,976"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        ([1, 2], "is not a JSON object"),
        ({"w": 3}, "entry for 'w' is malformed"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "entry for 'w' is malformed"),
        ({"w": entry("F32", [2], 8, 0)}, "entry for 'w' is malformed"),
        ({"w": entry("F32", [-2], 0, 8)}, "entry for 'w' is malformed"),
        ({"w": entry("F32", "ab", 0, 8)}, "entry for 'w' is malformed"),
        ({"w": entry("F32", [3], 0, 8)}, r"'w' \(F32 \[3\]\) needs 12 bytes, its header gives it 8"),
        ({"w": entry("F32", [4], 0, 16)}, "truncated: 'w' ends at byte"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: Any, message: str) -> None:
    path = damaged(tmp_path / "a.safetensors", header, data=bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "a.safetensors" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open .*gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")
