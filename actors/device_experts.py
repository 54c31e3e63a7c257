"""Attention side of the expert hop where all experts' workers share device memory with us: kernel calls only.

Who owns which expert, and where its memory is, stands in tables that are rewritten between steps, so that a step
captured as one graph survives every change of membership. A worker that dies, refuses or is silent costs its rows of
this pass, which become zeros, never a hang: `is_settled` then says no, the worker is out of the tables, and the same
pass is run again with the same inputs (DESIGN law 4), which gives the same bits (law 5). While some expert has no owner
that shares memory with us, all rows go over the links.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.gpu import mail
from ..model.config import ModelConfig
from ..model.experts import ExpertBackend
from ..model.row_memory import RowMemory
from ..router.expert_map import ExpertMap
from .expert_side import ExpertSide
from .links import Link
from .mail_peers import MailPeers
from .mailbox import BoxShape
from .reactor import Event

POLLS = 1 << 25  # of about a microsecond each: a worker that is silent for so long is given up
MAX_POST_ROWS = 512  # more rows go in several posts; a peer's memory grows with it
SLOTS = 2
BIAS_INTERVAL = 16  # steps between two updates of the replica bias


class Staged(ExpertBackend, ExpertSide, Protocol):
    """The way over the links."""


@dataclass(slots=True)
class Piece:
    """As many rows of a dispatch as one post takes. `slot`: where they are on their way, None before."""

    layer: int
    x: Tensor
    topk_idx: Tensor
    out: Tensor  # [rows * k, hidden]
    slot: int | None = None
    has_landed: bool = False


@dataclass(slots=True)
class MailHandle:
    memory: Tensor
    rows: Tensor  # [M, k, hidden], its front
    pieces: list[Piece]


def box_shape(config: ModelConfig, max_batch_tokens: int) -> BoxShape:
    """What each expert worker shares with an attention worker of such batches."""
    return BoxShape(min(max_batch_tokens, MAX_POST_ROWS), config.num_experts_per_tok, config.hidden_size, SLOTS)


class DeviceExperts:
    """The ExpertBackend of an attention worker on a GPU. Used by the engine thread only, but for `bury`.

    `plain`: the rows [M, H] of what the family's norm gives. `polls`: of about a microsecond, until a silent worker is
    given up.
    """

    def __init__(
        self,
        staged: Staged,
        shape: BoxShape,
        host_id: str,
        device: torch.device,
        plain: Callable[[Any], Tensor],
        polls: int = POLLS,
    ) -> None:
        self.num_redone = 0
        self.loads: npt.NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)  # [layers, experts], of some steps ago
        self._staged = staged
        self._shape, self._host_id, self._device = shape, host_id, device
        self._plain = plain
        self._polls = polls
        self._peers: MailPeers | None = None  # before the first map
        self._memory = RowMemory()
        self._free = list(range(shape.slots))
        self._posted: deque[Piece] = deque()
        self._unread_loads: Tensor | None = None
        self._steps = self._phase = 0

    # ---- what the model asks for

    @property
    def can_be_noted(self) -> bool:
        """Whether dispatch and collect make kernel calls only, over memory that stays where it is."""
        return self._peers is not None and self._peers.way == "mail"

    def dispatch(self, layer: int, x: Any, topk_idx: Tensor, first_row: int = 0) -> Any:
        """x: [M, H] or what the family's norm gave, topk_idx: integer [M, k]. As ExpertBackend has it."""
        if not self.can_be_noted:
            return self._staged.dispatch(layer, x, topk_idx, first_row)
        rows, top_k, most = self._plain(x), topk_idx.shape[1], self._shape.max_rows
        memory = self._memory.take(len(rows) * top_k, rows)
        pieces = []
        for first in range(0, len(rows), most):
            end = min(first + most, len(rows))
            pieces.append(Piece(layer, rows[first:end], topk_idx[first:end], memory[first * top_k : end * top_k]))
        for piece in pieces[: len(self._free)]:
            self._post(piece)
        return MailHandle(memory, memory[: len(rows) * top_k].view(len(rows), top_k, -1), pieces)

    def collect(self, handle: Any) -> Tensor:
        """[M, k, H], valid until the next dispatch."""
        if not isinstance(handle, MailHandle):
            return self._staged.collect(handle)
        for piece in handle.pieces:
            while not piece.has_landed:
                if piece.slot is None and self._free:
                    self._post(piece)
                else:
                    self._land_oldest()
        self._memory.give_back(handle.memory)
        return handle.rows

    def _post(self, piece: Piece) -> None:
        peers = self._peers
        assert peers is not None
        tables, row, piece.slot = peers.tables, peers.layer_row[piece.layer], self._free.pop(0)
        mail.post(
            piece.x, piece.topk_idx, piece.layer, piece.slot, self._shape.max_rows, tables.owners[row], tables.peers,
            tables.owed, tables.sequence, tables.phase, tables.loads[row],
        )  # fmt: skip
        self._posted.append(piece)

    def _land_oldest(self) -> None:
        """In the order of posts, whoever asks: the slot becomes free for the next piece."""
        peers, piece = self._peers, self._posted.popleft()
        assert peers is not None
        assert piece.slot is not None
        tables, slot = peers.tables, piece.slot
        mail.await_rows(
            slot, tables.peers, tables.owed, tables.sequence, tables.gone, tables.failed, tables.told, self._polls
        )
        owners = tables.owners[peers.layer_row[piece.layer]]
        mail.land(piece.topk_idx, slot, self._shape.max_rows, owners, tables.peers, tables.failed, piece.out)
        piece.has_landed = True
        self._free.append(slot)

    # ---- what the engine asks for

    @property
    def may_redo(self) -> bool:
        return self.can_be_noted

    @property
    def is_whole(self) -> bool:
        """Of what the device has done so far: kernels tell of a lost worker before its rows become zeros."""
        return self._peers is None or not self._peers.tables.told.any()

    @property
    def has_waits(self) -> bool:
        return not self.can_be_noted and self._staged.has_waits

    @property
    def phase(self) -> int:
        return self._phase

    @phase.setter
    def phase(self, phase: int) -> None:
        """0 decode, 1 prefill. A pass begins."""
        self._phase = self._staged.phase = phase
        if self._peers is not None and self._peers.way == "mail":  # else nobody would tell them that the pass is over
            self._peers.tables.phase.fill_(phase)
            self._peers.wake()

    @property
    def wait_s(self) -> float:
        return self._staged.wait_s

    def is_settled(self) -> bool:
        """Whether the pass has all its rows; waits for it to end. False: workers were lost, run the same pass again.

        There are only so many workers to lose; when some expert has no owner left here, rows go over the links.
        """
        if self._peers is None:
            return True
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        is_settled = self._peers.settle()
        self.num_redone += not is_settled
        return is_settled

    def take_failed(self) -> dict[int, str]:
        """Rows of the batch without a live replica, which have gone over the links. Ends what a broken pass left."""
        while self._posted:
            self._land_oldest()
        return self._staged.take_failed()

    def end_step(self) -> None:
        """Moves the replica bias by the load of some steps ago (law 6): its copy is not waited for."""
        self._staged.end_step()
        self._steps += 1
        if self._peers is None or self._steps % BIAS_INTERVAL:
            return
        if self._unread_loads is not None:
            loads = self._unread_loads.numpy().astype(np.int64)
            self.loads += loads
            self._peers.balance(loads)
        self._unread_loads = self._peers.tables.read_loads()

    # ---- membership

    def set_map(self, expert_map: ExpertMap, links: Mapping[str, Link]) -> None:
        """Swaps to a published map, as the staged way does by itself. Between passes only."""
        if self._peers is None:
            self._peers = MailPeers(expert_map, self._shape, self._host_id, self._device)
            self.loads = np.zeros((len(expert_map.replicas), expert_map.num_experts), dtype=np.int64)
        self.is_settled()
        self._peers.set_map(expert_map, links)

    def hear(self, event: Event) -> None:
        """An event of any link, between passes."""
        if self._peers is not None:
            self._peers.hear(event)

    def bury(self, link: Link) -> None:
        """Any thread: the peer of this link has died."""
        if self._peers is not None:
            self._peers.bury(link)
