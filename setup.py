"""The native CPU kernels; everything else about the build stands in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kernels/csrc")

# Optional: where no C++ compiler is at hand the package installs without them, and torch computes instead.
NATIVE = Extension(
    "braid.kernels._native",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, SOURCES.glob("*.hpp"))),
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)

setup(
    script_name="setup.py",  # else it would be taken for a module of the package, whose folder this is
    ext_modules=[NATIVE] if platform.machine() == "x86_64" else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
