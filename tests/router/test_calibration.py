"""The table of measured layers: read, and refused with a remedy."""

import json
from pathlib import Path

import pytest

from braid.router.calibration import AttentionLayer, Calibration, ExpertLayer

TABLE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "date": "2026-11-23 12:00 UTC",
    "model": "v3",
    "experts": [{"held": 8, "tokens": 128, "us": 55.5, "tokens_per_s": 2306306.3}],
    "attention": [{"batch": 32, "context": 4096, "us": 250.0, "tokens_per_s": 128000.0}],
}


def test_a_calibration_is_read(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(TABLE))
    read = Calibration.from_path(file)
    assert read.experts == (ExpertLayer(8, 128, 55.5, 2306306.3),)
    assert read.attention == (AttentionLayer(32, 4096, 250.0, 128000.0),)
    assert (read.gpu, read.model) == ("NVIDIA H100 80GB HBM3", "v3")


@pytest.mark.parametrize(
    "change",
    [
        {"experts": [{"held": 8}]},
        {"experts": [{"held": 8, "tokens": 1, "us": 0.0, "tokens_per_s": 0.0}]},
        {"attention": 3},
        {"model": None, "experts": [{"unknown": 1}]},
    ],
)
def test_what_is_no_calibration_names_the_remedy(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(TABLE | change))
    with pytest.raises(ValueError, match=r"calibration\.json: .*python -m braid\.benchmarks\.gpu"):
        Calibration.from_path(file)


def test_a_table_without_a_field_is_no_calibration() -> None:
    with pytest.raises(ValueError, match="'gpu'"):
        Calibration.from_dict({name: value for name, value in TABLE.items() if name != "gpu"})
