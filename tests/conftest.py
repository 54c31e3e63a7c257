"""What tests of several rooms share: the wheel, built once from a copy so that the working copy stays as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
# Triton reads it when it is imported first, which transformers does too: it comes before all test modules.
os.environ["TRITON_INTERPRET"] = "1"
# The same examples each time, for a commit either passes or does not; and all the time that a busy machine takes.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Others each time, and the failing one told in a form that can be kept: pytest --hypothesis-profile=explore
settings.register_profile("explore", settings.get_profile("same"), derandomize=False, database=None, print_blob=True)
settings.load_profile("same")


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
