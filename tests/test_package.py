"""The wheel must hold every file of every room: setuptools leaves out what is not listed, in silence."""

import re
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_holds_every_file_of_every_room(wheel: Path) -> None:
    rooms = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    files = {f"braid/{path.relative_to(ROOT)}" for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()}
    files = {name for name in files if not re.search(r"/__pycache__/|/csrc/|\.so$", name)}
    built = {f"braid/{room}/_native.abi3.so" for room in ("actors", "kernels")}
    wanted = files | built | {"braid/__init__.py", "braid/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith("braid_serve-")}
    assert wanted - held == set(), "missing from the wheel: name them in pyproject.toml"
    assert held - wanted == set(), "in the wheel, but not in the tree"


def test_wheel_says_how_to_start_and_under_which_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if name.startswith("braid_serve-")}
        assert "braid = braid.cluster.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "License-Expression: MIT" in archive.read(f"{info}/METADATA").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
