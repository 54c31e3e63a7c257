"""What the engine asks of dispatch besides the model's ExpertBackend; colocated experts never fail."""

from __future__ import annotations

from typing import Protocol


class ExpertSide(Protocol):
    """Used by the engine's thread only."""

    phase: int  # of the pass that begins: 0 decode, 1 prefill

    @property
    def has_waits(self) -> bool:
        """Whether it calls `while_waiting` in every pass, while rows are away."""
        ...

    @property
    def may_redo(self) -> bool:
        """Whether a pass that loses rows must be run again: no token of it may leave before `is_settled`."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether the pass under way has lost no rows that must come by running it again, as far as it has got."""
        ...

    def is_settled(self) -> bool:
        """Waits for the pass to end. False: it has lost rows, and is to be run again with the same inputs."""
        ...

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for rows so far."""
        ...

    def take_failed(self) -> dict[int, str]:
        """Batch rows that lost an expert since the last call, each with the reason. Ends a pass, broken off or not."""
        ...

    def end_step(self) -> None: ...
