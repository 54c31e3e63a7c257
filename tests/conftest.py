"""What tests of several rooms share: the wheel, built once from a copy so that the working copy stays as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
# Triton reads it when it is imported first, which transformers does too: it comes before all test modules.
os.environ["TRITON_INTERPRET"] = "1"
# A busy machine may take any time over an example, and that says nothing about it.
settings.register_profile("unhurried", settings(), deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "__init__.py", "py.typed"):
        shutil.copy2(ROOT / file, source)
    for room in ROOT.glob("*/__init__.py"):
        shutil.copytree(room.parent, source / room.parent.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-P", "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return built
