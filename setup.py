"""The native modules; everything else about the build stands in pyproject.toml."""

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
    # What is rounded once stands there as one instruction; the compiler makes none out of two.
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)

# Optional too: without it links within a host are Unix sockets, and nobody waits awake.
DATA_PLANE = Extension(
    "braid.actors._native",
    sources=sorted(map(str, Path("actors/csrc").glob("*.cpp"))),
    depends=sorted(map(str, Path("actors/csrc").glob("*.hpp"))),
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall"],
    py_limited_api=True,
    optional=True,
)

setup(
    script_name="setup.py",  # else it would be taken for a module of the package, whose folder this is
    ext_modules=[DATA_PLANE, NATIVE] if platform.machine() == "x86_64" else [DATA_PLANE],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
