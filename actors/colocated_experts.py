"""All experts in the attention worker itself."""

from __future__ import annotations

from ..model.experts import LocalExperts


class ColocatedExperts(LocalExperts):
    """Experts in the same process: the same bits, no hops, nothing that can be lost."""

    phase = 0
    wait_s = 0.0
    has_waits = False
    may_redo = False
    is_whole = True

    def is_settled(self) -> bool:
        return True

    def take_failed(self) -> dict[int, str]:
        return {}

    def end_step(self) -> None:
        pass
