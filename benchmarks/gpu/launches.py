"""Notes what a launcher would launch on a Hopper GPU, without one: the very kernels, constants, warps and stages."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Hopper:
    """Stands in for Triton's CUDA driver, which needs a GPU, in a process that compiles only."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


@dataclass(frozen=True, slots=True)
class Launch:
    """`specialization`: Triton's own JSON of types, constants, alignments and options, from which it compiles."""

    module: str
    kernel: str
    specialization: str

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time constants by name."""
        data = json.loads(self.specialization)
        names = list(data["signature"])
        places = [names[place[0]] for place in data["constant_keys"]]
        return dict(zip(places, data["constant_vals"], strict=True))

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = json.loads(self.specialization)["options"]
        return options

    def compiled(self) -> Any:
        """Triton's CompiledKernel for sm_90a; nothing is loaded, so no GPU is asked for."""
        driver.set_active(Hopper())
        return getattr(importlib.import_module(self.module), self.kernel).preload(self.specialization)


def recorded(work: Callable[[], object]) -> list[Launch]:
    """The launches of `work`, each once. Its tensors may be on "meta"; none of its kernels runs."""
    seen: dict[Launch, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        seen[Launch(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # tells Triton that somebody else compiles it

    driver.set_active(Hopper())
    knobs.runtime.jit_cache_hook = note
    try:
        work()
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(seen)


def launched_kernels(package: ModuleType) -> Iterator[tuple[str, str]]:
    """Module and name of every kernel of a package: those of its Triton functions whose name ends in `_kernel`."""
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, function in inspect.getmembers(module, lambda member: isinstance(member, JITFunction)):
            if name.endswith("_kernel") and function.module == info.name:
                yield info.name, name
