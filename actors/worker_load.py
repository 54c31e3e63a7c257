"""What an attention worker tells of itself: its room and queues to front ends, its counters to /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..model.kv_cache import BLOCK_SIZE
from .dispatch import RemoteExperts
from .drafter import Drafter
from .scheduler import Scheduler
from .settings import WorkerSettings

if TYPE_CHECKING:
    from .device_experts import DeviceExperts


def room_of(settings: WorkerSettings, scheduler: Scheduler) -> dict[str, Any]:
    """What front ends place requests by."""
    return {
        "worker": settings.name,
        "role": settings.role,
        "free_blocks": scheduler.allocator.num_free,
        "cached_blocks": scheduler.allocator.num_idle,
        "total_blocks": scheduler.allocator.num_total,
        "block_size": BLOCK_SIZE,
        "running": len(scheduler.decoding),
        "sequences": len(scheduler.all()),
        "max_sequences": scheduler.max_sequences,
        "waiting": len(scheduler.waiting),
        "waiting_tokens": scheduler.num_waiting_tokens,
    }


def cache_counters(scheduler: Scheduler) -> dict[str, float]:
    return {**scheduler.counters, "evictions": scheduler.allocator.num_evicted}


def draft_counters(drafter: Drafter | None) -> dict[str, float]:
    if drafter is None:
        return {}
    return {"drafted_tokens": drafter.num_drafted, "accepted_tokens": drafter.num_accepted}


def hop_counters(remote: RemoteExperts | None, mail: DeviceExperts | None) -> dict[str, float]:
    """Of rows that went to expert workers, over links and through device memory."""
    if remote is None:
        return {}
    counters, loads = remote.counters, remote.loads
    mailed = num_redone = 0
    if mail is not None and mail.loads.shape == loads.shape:
        mailed, num_redone = int(mail.loads.sum()), mail.num_redone
        loads = loads + mail.loads
    return {
        "epoch": remote.epoch,
        "hops": counters.hops,
        "dispatch_rows": counters.rows + mailed,
        "dispatch_bytes": counters.bytes_out,
        "combine_bytes": counters.bytes_in,
        "dispatch_resent": counters.resent + num_redone,
        "hops_timed": counters.timed,
        "hop_serialise_s": round(counters.serialise_s, 6),
        "hop_wire_s": round(counters.wire_s, 6),
        "hop_queue_s": round(counters.queue_s, 6),
        "expert_wait_s": round(counters.wait_s, 6),
        "expert_compute_s": round(counters.compute_s, 6),
        **_balance(loads),
    }


def _balance(loads: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float]:
    """Balancedness = mean load / max load, MaxVio = max load / mean load - 1; means over the MoE layers."""
    seen = loads[loads.sum(1) > 0]
    if not len(seen):
        return {}
    ratio = seen.max(1) / seen.mean(1)
    return {"expert_balancedness": float((1 / ratio).mean()), "expert_max_vio": float((ratio - 1).mean())}
