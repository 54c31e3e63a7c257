"""Rows between processes through memory that they share by CUDA IPC: the bits of local experts, and a death.

All of them are on one GPU, which lets one process at a time compute: the time of a pass says that nothing hangs, and
not how long a hop takes where each worker has its own.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .setting import Row, Setting, each

ROWS = 1, 33, 1000
ROUNDS = 30


def check(setting: Setting) -> Iterator[Row]:
    """Rows with `passed`."""
    if setting.device.type != "cuda":
        yield {"name": "mailboxes", "failed": "no GPU memory to share; tests/actors/gpu has the same over the host's"}
        return
    with TemporaryDirectory() as folder:
        yield from exchanged(setting, Path(folder))


def exchanged(setting: Setting, folder: Path) -> Iterator[Row]:
    from braid.actors.mailbox import BoxShape  # with all it needs: the other sections need less

    from .mail_processes import Attention, ExpertProcess, Experts

    experts = Experts(setting.config.hidden_size, 256, 4, 8, (0,))
    kind, local = setting.device.type, experts.local(setting.device)
    processes = [ExpertProcess(name, experts, folder, kind) for name in ("expert-0", "expert-1")]
    attention = Attention(processes, experts, BoxShape(512, experts.top_k, experts.hidden, 2), kind)
    attention.share(experts.map([process.name for process in processes], 2))

    def same_bits(rows: int) -> Row:
        x, ids = experts.batch(rows, setting.device)
        expected = local.collect(local.dispatch(0, x, ids)).clone()
        return {"passed": torch.equal(attention.run(0, x, ids), expected) and attention.experts.can_be_noted}

    def timed() -> Row:
        x, ids = experts.batch(8, setting.device)
        seconds = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            attention.run(0, x, ids)
            seconds.append(time.perf_counter() - begun)
        return {"us": 1e6 * statistics.median(seconds), "repeats": ROUNDS}

    def death() -> Row:
        processes[0].signal(signal.SIGSTOP)
        killer = threading.Timer(0.2, processes[0].signal, (signal.SIGKILL,))
        killer.start()
        passed = same_bits(33)["passed"]
        killer.join()
        return {"passed": passed and attention.experts.num_redone == 1}

    exchanges = ((f"mailboxes, {rows} rows", partial(same_bits, rows)) for rows in ROWS)
    others = [("a pass of 8 rows", timed), ("a worker dies in a pass", death)]
    try:
        with torch.inference_mode():
            yield from each(setting, chain(exchanges, others))
    finally:
        for process in processes:
            process.process.kill()
        attention.close()
