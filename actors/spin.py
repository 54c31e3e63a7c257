"""A bounded wait without sleeping: what comes within milliseconds costs no wake-up.

To wake a sleeping core costs tens of microseconds, more than a message takes to arrive. Whoever waits here yields its
core again and again; where somebody else ran in the meantime the core is wanted, and the next waits are spent asleep.
"""

from enum import IntEnum

from .shm_pipe import HAS_NATIVE

if HAS_NATIVE:
    from . import _native

SPIN_S = 0.005  # a decode step's experts of one layer take a few milliseconds on a CPU
SPIN_NS = int(SPIN_S * 1e9)
MAX_PAUSE = 63  # waits spent asleep before the next try


class Outcome(IntEnum):
    """As csrc/ring.cpp has them."""

    QUIET = 0
    NEWS = 1
    CROWDED = 2


class Patience:
    """Decides whether a wait spins, from how the last ones ended."""

    def __init__(self) -> None:
        self._pause = self._asleep = 0

    def is_worth_it(self) -> bool:
        """Asked once for each wait."""
        self._asleep -= 1
        return self._asleep < 0

    def learn(self, outcome: Outcome) -> None:
        if outcome == Outcome.CROWDED:
            self._asleep = self._pause = min(2 * self._pause + 1, MAX_PAUSE)
        elif outcome == Outcome.NEWS:
            self._pause //= 2


def spin(rings: tuple[int, ...], epoll_fd: int) -> Outcome:
    """Until a ring (the address of its words) or the epoll has news, SPIN_S are over, or the core is wanted."""
    return Outcome(_native.spin(rings, epoll_fd, SPIN_NS)) if HAS_NATIVE else Outcome.QUIET
