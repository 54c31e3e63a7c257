"""Memory that an attention worker and an expert worker of one host share, and the words by which they agree on it.

MAIL_OFFER names the shape of the box and the attention side's memory (rows that come back, a flag for each slot);
MAIL_ACCEPTED names the expert side's (rows and expert ids that come in) and a page of host memory with the doorbells,
which the expert worker's processor reads without asking its GPU. A slot holds one post: as many are on their way at
once. Device memory goes from process to process as a CUDA IPC handle, host memory as a memfd: neither has a name that
could be left behind. What has been shared stays allocated until the link is closed and its box let go: a peer that was
given up may still write into it, and nobody else reads it any more.
"""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .messages import pack, unpack

ALIGNMENT = 256
PAGE_BYTES = 4096
BUSY, ASLEEP, NONCE = 8, 16, 24  # words of the bell page, each on a cache line of its own; bells stand before them
MAX_SLOTS = 8
MAX_ROWS = (1 << 16) - 1  # as many as a doorbell's word can tell
MAX_BYTES = 64 << 30
REGISTER_PORTABLE_MAPPED = 1 | 2  # flags of cudaHostRegister


@dataclass(frozen=True, slots=True)
class BoxShape:
    """Rows of a post, experts of a row, width of a row and posts at once; rows are bfloat16."""

    max_rows: int
    top_k: int
    hidden: int
    slots: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_rows <= MAX_ROWS or not 1 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"{self}: at most {MAX_ROWS} rows and {MAX_SLOTS} slots fit a mailbox, at least 1 of each")
        if self.top_k < 1 or self.hidden < 1 or self.reply_bytes > MAX_BYTES:
            raise ValueError(f"{self}: a mailbox takes at most {MAX_BYTES} bytes and has rows")

    @property
    def max_pairs(self) -> int:
        return self.max_rows * self.top_k

    @property
    def ids_offset(self) -> int:
        return _aligned(2 * self.slots * self.max_rows * self.hidden)

    @property
    def inbox_bytes(self) -> int:
        return self.ids_offset + 4 * self.slots * self.max_pairs

    @property
    def flags_offset(self) -> int:
        return _aligned(2 * self.slots * self.max_pairs * self.hidden)

    @property
    def reply_bytes(self) -> int:
        return self.flags_offset + 8 * self.slots


class HostPages:
    """Zeroed shared memory of the host behind a memfd; a GPU, where there is one, reads and writes it in place."""

    def __init__(self, fd: int, num_bytes: int, device: torch.device) -> None:
        self._fd = fd
        self._device = device
        mapped = mmap.mmap(fd, num_bytes)
        self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self.words = np.frombuffer(mapped, dtype=np.int64)
        if device.type == "cuda":
            cuda: Any = torch.cuda
            cuda.check_error(cuda.cudart().cudaHostRegister(self.address, num_bytes, REGISTER_PORTABLE_MAPPED))

    @classmethod
    def make(cls, num_bytes: int, device: torch.device) -> HostPages:
        fd = os.memfd_create("braid-mail", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        made = cls(fd, num_bytes, device)
        made.bytes[:] = 0
        return made

    @classmethod
    def open(cls, words: Any, num_bytes: int, device: torch.device) -> HostPages:
        """Raises OSError or ValueError where the peer's memory cannot be reached or is not what it said."""
        pid, number, nonce = (int(word) for word in words)
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        with ExitStack() as opened:
            opened.callback(os.close, fd)
            if os.fstat(fd).st_size < num_bytes:  # to touch pages that are not there would end us
                raise ValueError(f"{num_bytes} bytes of memory are needed, {os.fstat(fd).st_size} were offered")
            if int.from_bytes(os.pread(fd, 8, 8 * NONCE), "little") != nonce:
                raise ValueError(f"file descriptor {number} of process {pid} is not the memory that was offered")
            pages = cls(fd, num_bytes, device)
            opened.pop_all()
        return pages

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    def tell(self) -> list[int]:
        """What `open` takes in another process; a number drawn at random proves that it found the right memory."""
        nonce = secrets.randbits(62)
        self.words[NONCE] = nonce
        return [os.getpid(), self._fd, nonce]

    def close(self) -> None:
        """Nothing on a GPU may use it any more; the pages go with the last view of them."""
        if self._fd < 0:
            return
        if self._device.type == "cuda":
            cuda: Any = torch.cuda
            cuda.check_error(cuda.cudart().cudaHostUnregister(self.address))
        os.close(self._fd)
        self._fd = -1
        self.bytes, self.words = self.bytes.new_empty(0), np.empty(0, dtype=np.int64)

    def disown(self) -> None:
        """The system counts by itself who has them open."""


class DevicePages:
    """Zeroed memory of a GPU that another process may open; the process that made it keeps it in place."""

    def __init__(self, data: Tensor) -> None:
        self.bytes = data
        self._opening: list[Any] = []  # where torch looks whether another process has them open

    @classmethod
    def make(cls, num_bytes: int, device: torch.device) -> DevicePages:
        data = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()  # before anybody else writes there
        return cls(data)

    @classmethod
    def open(cls, words: Any, num_bytes: int, device: torch.device) -> DevicePages:
        """The handle is opened on our own device, whichever the maker's is: to name that one it need not be visible.

        Torch's event, which tells that the memory is written, is left alone: `make` has waited for that, and CUDA does
        not say that an event of a device which is not visible can be opened.
        """
        storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *words[1:7], False)
        if storage.nbytes() < num_bytes:
            raise ValueError(f"{storage.nbytes()} bytes of device memory were offered, {num_bytes} are needed")
        return cls(torch.empty(0, dtype=torch.uint8, device=device).set_(storage))

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    def tell(self) -> list[Any]:
        storage: Any = self.bytes.untyped_storage()
        words = list(storage._share_cuda_())
        self._opening = words[4:6]
        return words

    def close(self) -> None:
        """Lets it go; torch keeps what the other process has open."""
        self.bytes = self.bytes.new_empty(0)

    def disown(self) -> None:
        """No other process has it open, whether or not the one that was told of it has said so."""
        if self._opening:
            storage: Any = torch.UntypedStorage
            cuda: Any = torch.cuda
            storage._release_ipc_counter(*self._opening, device=self.bytes.device)
            self._opening = []
            cuda.ipc_collect()


Pages = HostPages | DevicePages


def make_pages(num_bytes: int, device: torch.device) -> Pages:
    kind = DevicePages if device.type == "cuda" else HostPages
    return kind.make(num_bytes, device)


def open_pages(words: Any, num_bytes: int, device: torch.device) -> Pages:
    kind = DevicePages if device.type == "cuda" else HostPages
    return kind.open(words, num_bytes, device)


@dataclass(slots=True)
class Box:
    """One link's share of memory, the same at both ends: `inbox` and `bells` are the expert side's, `replies` ours.

    `process`: at the other end.
    """

    shape: BoxShape
    inbox: Pages
    bells: HostPages
    replies: Pages
    process: int

    def x(self, slot: int) -> Tensor:
        """bf16 [max_rows, hidden] of a post."""
        shape = self.shape
        rows = self.inbox.bytes[: 2 * shape.slots * shape.max_rows * shape.hidden].view(torch.bfloat16)
        return rows.view(shape.slots, shape.max_rows, shape.hidden)[slot]

    def rows(self, slot: int) -> Tensor:
        """bf16 [max_rows * top_k, hidden] of the answer."""
        shape = self.shape
        rows = self.replies.bytes[: 2 * shape.slots * shape.max_pairs * shape.hidden].view(torch.bfloat16)
        return rows.view(shape.slots, shape.max_pairs, shape.hidden)[slot]

    def addresses(self) -> tuple[int, int, int, int, int]:
        """A column of the peer table: of x, ids, bells, rows and flags, each of slot 0."""
        replies = self.replies.address
        return self.inbox.address, self.ids_address(0), self.bells.address, replies, self.flag_address(0)

    def ids_address(self, slot: int) -> int:
        return self.inbox.address + self.shape.ids_offset + 4 * slot * self.shape.max_pairs

    def flag_address(self, slot: int) -> int:
        return self.replies.address + self.shape.flags_offset + 8 * slot

    def close(self) -> None:
        for pages in (self.inbox, self.bells, self.replies):
            pages.close()


def offer(shape: BoxShape, replies: Pages) -> bytes:
    return pack({"shape": asdict(shape), "replies": replies.tell(), "process": os.getpid()})


def accept(meta: bytes, device: torch.device) -> tuple[Box, bytes]:
    """The expert side's end of what was offered, and the answer. Raises where it cannot be had on this host."""
    body = unpack(meta)
    shape, process = BoxShape(**body["shape"]), int(body["process"])
    with ExitStack() as opened:
        replies = open_pages(body["replies"], shape.reply_bytes, device)
        opened.callback(replies.close)
        inbox = make_pages(shape.inbox_bytes, device)
        opened.callback(inbox.close)
        bells = HostPages.make(PAGE_BYTES, device)
        opened.callback(bells.close)
        box = Box(shape, inbox, bells, replies, process)
        answer = pack({"inbox": inbox.tell(), "bells": bells.tell()})
        opened.pop_all()
    return box, answer


def accepted(meta: bytes, shape: BoxShape, replies: Pages, device: torch.device) -> Box:
    """The attention side's end. Raises where it cannot be had."""
    body = unpack(meta)
    with ExitStack() as opened:
        inbox = open_pages(body["inbox"], shape.inbox_bytes, device)
        opened.callback(inbox.close)
        box = Box(shape, inbox, HostPages.open(body["bells"], PAGE_BYTES, device), replies, int(body["bells"][0]))
        opened.pop_all()
    return box


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
