"""What the kernels of the device-side dispatch read of their surroundings: memory that stays where it is for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.gpu import mail


@dataclass(frozen=True, slots=True)
class MailTables:
    """On the device, but for `gone` and `told`, which are host memory that the device reaches."""

    peers: Tensor  # int64 [5, MAX_PEERS]: addresses
    owners: Tensor  # int32 [layers, experts]: who computes which, as a column of peers
    loads: Tensor  # int32 [layers, experts]: pairs sent since they were last read
    owed: Tensor  # int32 [slots, MAX_PEERS]
    sequence: Tensor  # int64 [slots]
    phase: Tensor  # int32 [1]
    failed: Tensor  # int32 [MAX_PEERS]: why, since the tables were last filled; such a peer is not awaited again
    gone: Tensor  # int32 [MAX_PEERS]: the host has seen it die
    told: Tensor  # int32 [MAX_PEERS]: `failed` for the host

    @classmethod
    def make(cls, num_layers: int, num_experts: int, slots: int, device: torch.device) -> MailTables:
        is_gpu = device.type == "cuda"
        per_expert = torch.full((2, num_layers, num_experts), -1, dtype=torch.int32, device=device)
        per_expert[1] = 0
        on_host = torch.zeros(2, mail.MAX_PEERS, dtype=torch.int32, pin_memory=is_gpu)
        return cls(
            peers=torch.zeros(mail.NUM_ADDRESSES, mail.MAX_PEERS, dtype=torch.int64, device=device),
            owners=per_expert[0],
            loads=per_expert[1],
            owed=torch.zeros(slots, mail.MAX_PEERS, dtype=torch.int32, device=device),
            sequence=torch.zeros(slots, dtype=torch.int64, device=device),
            phase=torch.zeros(1, dtype=torch.int32, device=device),
            failed=torch.zeros(mail.MAX_PEERS, dtype=torch.int32, device=device),
            gone=on_host[0],
            told=on_host[1],
        )

    def mark_gone(self, index: int) -> None:
        """Any thread: so not by torch, which lets tensors that were made in inference mode be written there only."""
        self.gone.numpy()[index] = 1

    def fill_peers(self, addresses: Sequence[Sequence[int] | None]) -> None:
        """Of each peer that there is. In the order of the stream, as `fill_owners`; what failed is forgotten."""
        table = np.zeros((mail.NUM_ADDRESSES, mail.MAX_PEERS), dtype=np.int64)
        for index, column in enumerate(addresses):
            if column is not None:
                table[:, index] = column
        _copy(self.peers, table)
        self.failed.zero_()
        self.told.zero_()

    def fill_owners(self, owner_of: npt.NDArray[np.int64]) -> None:
        _copy(self.owners, owner_of.astype(np.int32))

    def read_loads(self) -> Tensor:
        """Starts them anew; the copy, in host memory, is there when the stream has been waited for."""
        copy = torch.empty(self.loads.shape, dtype=torch.int32, pin_memory=self.loads.is_cuda)
        copy.copy_(self.loads, non_blocking=True)
        self.loads.zero_()
        return copy


def _copy(to: Tensor, values: npt.NDArray[Any]) -> None:
    source = torch.from_numpy(values)
    to.copy_(source.pin_memory() if to.is_cuda else source, non_blocking=True)
