"""Memory of ours that a process of this host had open when its link closed.

Torch keeps device memory until whoever has it open says that he is done. One who is killed never does: each death would
cost a mailbox. It is freed when the process has ended, not when the link has: until then its kernels may write there.
"""

from __future__ import annotations

import os
import select

from .mailbox import Pages


class Remains:
    """Used by one thread."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, list[Pages]]] = {}  # by process: a descriptor that tells of its end, the memory

    def keep(self, process: int, pages: Pages) -> None:
        """`pages`: closed by us; `process` may have them open."""
        self.free()
        if process not in self._of:
            try:
                self._of[process] = os.pidfd_open(process), []
            except ProcessLookupError:
                pages.disown()
                return
            except OSError:  # a kernel that cannot tell of its end: torch keeps the memory
                return
        self._of[process][1].append(pages)

    def free(self) -> None:
        """What processes that have ended since had open."""
        for process, (end, memory) in list(self._of.items()):
            if _has_come(end):
                self._forget(process, end)
                for pages in memory:
                    pages.disown()

    def close(self) -> None:
        """Ends with us: so does the memory."""
        for process, (end, _) in list(self._of.items()):
            self._forget(process, end)

    def _forget(self, process: int, end: int) -> None:
        os.close(end)
        del self._of[process]


def _has_come(end: int) -> bool:
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(0))
