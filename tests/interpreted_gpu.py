"""Workers that take themselves for GPU workers: their kernels run in Triton's interpreter, their memory is the host's.

To be put in the place of `processes._answer_calls`. What waits for interpreted kernels may take its time.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import processes
import torch
import triton_interpreter

from braid.actors import attention_worker, dispatch, expert_worker
from braid.actors.devices import WorkerDevice
from braid.actors.settings import WorkerSettings
from braid.model.config import Quantization
from braid.model.triton_ops import TritonOps

answer_calls_before = processes._answer_calls


class InterpretedGpu(WorkerDevice):
    @property
    def is_gpu(self) -> bool:
        return True

    def available_memory(self) -> int:
        return 1 << 30

    def report(self) -> dict[str, Any]:
        return {"device": self.name}


def device_for(gpus: float) -> WorkerDevice:
    return InterpretedGpu(torch.device("cpu"), "Triton's interpreter", gpus)


def ops_for(dtype: torch.dtype, device: torch.device, quantization: Quantization | None) -> TritonOps:
    return TritonOps(device, quantization)


def self_test(*_: object) -> None:
    """tests/model/test_triton_ops.py has it, and it takes minutes here."""


def answer_calls(conn: Connection, settings: WorkerSettings) -> None:
    triton_interpreter.repair()
    dispatch.DISPATCH_DEADLINE_S = processes.LIMIT_S
    for worker in (attention_worker, expert_worker):
        for replaced in (device_for, ops_for, self_test):
            setattr(worker, replaced.__name__, replaced)
    answer_calls_before(conn, settings)
