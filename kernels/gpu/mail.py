"""Rows to the experts' workers and back through memory that two GPU processes share, without the host in the step.

The attention side posts (rows, then a doorbell each peer), waits for the peers' flags and lands the rows; the expert
side takes a batch of posts in, delivers its rows and signals. Whom to write to stands in a table of addresses in device
memory, so that a captured graph survives every change of it. Data are written before the word that tells of them is
released at system scope, and read after it was acquired; a wait ends by answer, by death (`gone`) or by `polls`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_PEERS = 64  # workers of one host that share memory with us
X, IDS, BELL, ROWS, FLAG = range(5)  # rows of the peer table, int64 [5, MAX_PEERS]: addresses, 0 where nobody is
NUM_ADDRESSES = 5
JOB_X, JOB_IDS, JOB_ROWS, JOB_FLAG, JOB_FIRST, JOB_SEQUENCE, JOB_ABSENT = range(7)  # columns of a batch's jobs
NUM_JOB_FIELDS = 8  # the last one is unused
MAX_JOBS = 128  # of a batch
SILENT, GONE, REFUSED = 1, 2, 3  # why a peer failed; 0: it has not

ROW_BITS, LAYER_BITS, PHASE_BITS = 16, 10, 2  # of a doorbell's word; the sequence number stands above them
SEQUENCES = tl.constexpr(1 << 34)  # as many have room beside a sign
SEQUENCE_SHIFT = tl.constexpr(ROW_BITS + LAYER_BITS + PHASE_BITS)
PHASE_SHIFT = tl.constexpr(ROW_BITS + LAYER_BITS)
LAYER_SHIFT = tl.constexpr(ROW_BITS)
GONE_EVERY = tl.constexpr(32)  # polls of a flag, in our memory, between two of `gone`, in the host's
X_, IDS_, BELL_, ROWS_, FLAG_ = (tl.constexpr(field) for field in (X, IDS, BELL, ROWS, FLAG))
JOB_X_, JOB_IDS_, JOB_ROWS_, JOB_FLAG_ = (tl.constexpr(field) for field in (JOB_X, JOB_IDS, JOB_ROWS, JOB_FLAG))
JOB_FIRST_, JOB_SEQUENCE_, JOB_ABSENT_ = (tl.constexpr(field) for field in (JOB_FIRST, JOB_SEQUENCE, JOB_ABSENT))
FIELDS = tl.constexpr(NUM_JOB_FIELDS)
SILENT_, GONE_, REFUSED_ = tl.constexpr(SILENT), tl.constexpr(GONE), tl.constexpr(REFUSED)


@triton.jit
def publish(address, value, ON_GPU: tl.constexpr):
    """Stores an int64 so that whoever acquires it, on whatever processor, also sees all that was written before.

    One thread does; what others have written counts if a barrier stands in between."""
    if ON_GPU:
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
            " @first st.release.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,l", [address, value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(address.to(tl.pointer_type(tl.int64)), value)


@triton.jit
def observe(address, ON_GPU: tl.constexpr):
    """Acquires the int64 at each address; 0 where the address is 0."""
    if ON_GPU:
        value = tl.inline_asm_elementwise(
            "{ .reg .pred there; setp.ne.s64 there, $1, 0; mov.b64 $0, 0; @there ld.acquire.sys.global.b64 $0, [$1]; }",
            "=&l,l", [address], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        value = tl.load(address.to(tl.pointer_type(tl.int64)), mask=address != 0, other=0, volatile=True)
    return value


@triton.jit
def next_sequence(sequence_ptr, mail_slot):
    """1 to SEQUENCES, and then 1 again: no flag is so old."""
    return tl.load(sequence_ptr + mail_slot) % SEQUENCES + 1


@triton.jit(do_not_specialize=["first_row"])
def send_kernel(
    x_ptr, expert_ptr, owner_ptr, peers_ptr, load_ptr, first_row, columns,
    SLOTS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    """One row of x to every peer that owns an expert of it, once each; counts the experts' load."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x_ptr + row * columns + column, mask=inside)
    lane = tl.arange(0, LANES)
    used = lane < SLOTS
    expert = tl.load(expert_ptr + row * SLOTS + lane, mask=used, other=-1)
    used = expert >= 0
    owners = tl.load(owner_ptr + expert, mask=used, other=-1)
    tl.atomic_add(load_ptr + expert, 1, mask=used, sem="relaxed")  # whole numbers: their order changes nothing
    for slot in tl.static_range(SLOTS):
        owner = tl.sum(tl.where(lane == slot, owners, 0), 0)
        earlier = tl.sum(((owners == owner) & (lane < slot)).to(tl.int32), 0)
        if (owner >= 0) & (earlier == 0):
            inbox = tl.load(peers_ptr + X_ * PEERS + owner).to(tl.pointer_type(x_ptr.dtype.element_ty))
            tl.store(inbox + (first_row + row) * columns + column, values, mask=inside)


@triton.jit(do_not_specialize=["pairs", "rows", "layer", "mail_slot", "slot_pairs"])
def ring_kernel(
    expert_ptr, owner_ptr, peers_ptr, owed_ptr, sequence_ptr, phase_ptr, pairs, rows, layer, mail_slot, slot_pairs,
    PEERS: tl.constexpr, SCAN: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Tells one peer which pairs are its own, if any are, and rings; follows `send_kernel`."""
    peer = tl.program_id(0)
    bell = tl.load(peers_ptr + BELL_ * PEERS + peer)
    count = 0
    if bell != 0:
        ids = tl.load(peers_ptr + IDS_ * PEERS + peer).to(tl.pointer_type(tl.int32)) + mail_slot * slot_pairs
        for start in range(0, pairs, SCAN):
            pair = start + tl.arange(0, SCAN)
            inside = pair < pairs
            expert = tl.load(expert_ptr + pair, mask=inside, other=-1).to(tl.int32)
            mine = tl.load(owner_ptr + expert, mask=expert >= 0, other=-1) == peer
            tl.store(ids + pair, tl.where(mine, expert, -1), mask=inside)
            count += tl.sum(mine.to(tl.int32), 0)
    tl.store(owed_ptr + mail_slot * PEERS + peer, count)
    if count > 0:
        tl.debug_barrier()  # the ids of all threads before the word of the first
        sequence = next_sequence(sequence_ptr, mail_slot)
        phase = tl.load(phase_ptr).to(tl.int64)
        word = (sequence << SEQUENCE_SHIFT) | (phase << PHASE_SHIFT) | (layer << LAYER_SHIFT) | rows
        publish(bell + mail_slot * 8, word, ON_GPU)


@triton.jit(do_not_specialize=["mail_slot", "polls"])
def await_kernel(
    peers_ptr, owed_ptr, sequence_ptr, gone_ptr, failed_ptr, told_ptr, mail_slot, polls,
    PEERS: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Until every peer that owes rows has answered, refused, died or been given up. Who failed is not awaited again."""
    peer = tl.arange(0, PEERS)
    wanted = next_sequence(sequence_ptr, mail_slot)
    failed = tl.load(failed_ptr + peer)
    owes = (tl.load(owed_ptr + mail_slot * PEERS + peer) > 0) & (failed == 0)
    flag = tl.load(peers_ptr + FLAG_ * PEERS + peer) + mail_slot * 8
    answer = observe(tl.where(owes, flag, 0), ON_GPU)
    waiting = owes & (answer != wanted) & (answer != -wanted)
    gone = tl.zeros((PEERS,), tl.int32)
    polled = 0
    while (tl.sum(waiting.to(tl.int32), 0) > 0) & (polled < polls):
        looks = waiting & (polled % GONE_EVERY == GONE_EVERY - 1)
        gone = tl.where(looks, tl.load(gone_ptr + peer, mask=looks, other=0, volatile=True), gone)
        answer = tl.where(waiting, observe(tl.where(waiting, flag, 0), ON_GPU), answer)
        waiting = waiting & (answer != wanted) & (answer != -wanted) & (gone == 0)
        polled += 1
    silent = owes & (answer != wanted) & (answer != -wanted)
    why = tl.where(silent, tl.where(gone != 0, GONE_, SILENT_), tl.where(answer == -wanted, REFUSED_, 0))
    why = tl.where(owes, why, 0)
    tl.store(failed_ptr + peer, why, mask=why != 0)
    tl.store(told_ptr + peer, why, mask=why != 0)
    tl.store(sequence_ptr + mail_slot, wanted)


@triton.jit(do_not_specialize=["first_pair"])
def land_kernel(
    expert_ptr, owner_ptr, peers_ptr, failed_ptr, out_ptr, first_pair, columns,
    PEERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row of one pair, from its owner's answers to its place; zeros if the owner has failed."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    expert = tl.load(expert_ptr + pair)
    owner = tl.load(owner_ptr + expert, mask=expert >= 0, other=-1)
    here = owner >= 0
    here = here & (tl.load(failed_ptr + owner, mask=here, other=1) == 0)
    rows = tl.load(peers_ptr + ROWS_ * PEERS + owner, mask=here, other=0)
    rows = rows.to(tl.pointer_type(out_ptr.dtype.element_ty))
    values = tl.load(rows + (first_pair + pair) * columns + column, mask=inside & here, other=0.0)
    tl.store(out_ptr + pair * columns + column, values, mask=inside)


@triton.jit
def job_of(jobs_ptr, num_jobs, row, JOBS: tl.constexpr):
    """The last job of the batch that begins at or before this row; no job is empty."""
    job = tl.arange(0, JOBS)
    first = tl.load(jobs_ptr + job * FIELDS + JOB_FIRST_, mask=job < num_jobs, other=1 << 40)
    return jobs_ptr + (tl.sum((first <= row).to(tl.int32), 0) - 1) * FIELDS


@triton.jit(do_not_specialize=["num_jobs", "experts"])
def take_kernel(
    jobs_ptr, local_ptr, x_ptr, place_ptr, num_jobs, columns, experts,
    SLOTS: tl.constexpr, LANES: tl.constexpr, JOBS: tl.constexpr, BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Turns one row's experts into places in our stack, -1 for those of others; notes jobs that ask for absent ones."""
    row = tl.program_id(0).to(tl.int64)
    job = job_of(jobs_ptr, num_jobs, row, JOBS)
    within = row - tl.load(job + JOB_FIRST_)
    lane = tl.arange(0, LANES)
    used = lane < SLOTS
    ids = tl.load(job + JOB_IDS_).to(tl.pointer_type(tl.int32))
    expert = tl.load(ids + within * SLOTS + lane, mask=used, other=-1)
    asked = expert >= 0
    place = tl.load(local_ptr + expert, mask=asked & (expert < experts), other=-1)
    tl.store(place_ptr + row * SLOTS + lane, place, mask=used)
    if tl.sum((asked & (place < 0)).to(tl.int32), 0) > 0:
        tl.store(job + JOB_ABSENT_, 1)
    if COPIES:
        if tl.sum(asked.to(tl.int32), 0) > 0:
            column = tl.arange(0, BLOCK)
            inside = column < columns
            x = tl.load(job + JOB_X_).to(tl.pointer_type(x_ptr.dtype.element_ty))
            values = tl.load(x + within * columns + column, mask=inside)
            tl.store(x_ptr + row * columns + column, values, mask=inside)


@triton.jit(do_not_specialize=["num_jobs"])
def deliver_kernel(
    jobs_ptr, rows_ptr, place_ptr, num_jobs, columns,
    SLOTS: tl.constexpr, JOBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair's row to where its asker looks for it."""
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(place_ptr + pair) >= 0:
        job = job_of(jobs_ptr, num_jobs, pair // SLOTS, JOBS)
        within = pair - tl.load(job + JOB_FIRST_) * SLOTS
        column = tl.arange(0, BLOCK)
        inside = column < columns
        out = tl.load(job + JOB_ROWS_).to(tl.pointer_type(rows_ptr.dtype.element_ty))
        values = tl.load(rows_ptr + pair * columns + column, mask=inside)
        tl.store(out + within * columns + column, values, mask=inside)


@triton.jit
def signal_kernel(jobs_ptr, ON_GPU: tl.constexpr):
    """Tells one asker that its rows are there, or (minus) that it asked for an expert which is not."""
    job = jobs_ptr + tl.program_id(0) * FIELDS
    sequence = tl.load(job + JOB_SEQUENCE_)
    answer = tl.where(tl.load(job + JOB_ABSENT_) != 0, -sequence, sequence)
    publish(tl.load(job + JOB_FLAG_), answer, ON_GPU)


def bell_of(word: int) -> tuple[int, int, int, int]:
    """A doorbell's word -> sequence number, phase, layer, rows."""
    rows, word = word & ((1 << ROW_BITS) - 1), word >> ROW_BITS
    layer, word = word & ((1 << LAYER_BITS) - 1), word >> LAYER_BITS
    return word >> PHASE_BITS, word & ((1 << PHASE_BITS) - 1), layer, rows


def post(
    x: Tensor, topk_idx: Tensor, layer: int, mail_slot: int, max_rows: int, owners: Tensor, peers: Tensor,
    owed: Tensor, sequence: Tensor, phase: Tensor, loads: Tensor,
) -> None:  # fmt: skip
    """x: [M, H], topk_idx: integer [M, k], -1 for no expert, both contiguous, M <= max_rows; owners: int32 [experts] of
    this layer, the owner's column of peers int64 [5, MAX_PEERS], -1 for nobody; owed: int32 [mail slots, MAX_PEERS],
    pairs that each owes; sequence: int64 [mail slots], of the last post that was awaited; phase: int32 [1]; loads:
    int32 [experts]."""
    rows, columns = x.shape
    top_k = topk_idx.shape[1]
    send_kernel[(rows,)](
        x, topk_idx, owners, peers, loads, mail_slot * max_rows, columns,
        SLOTS=top_k, LANES=triton.next_power_of_2(top_k), BLOCK=triton.next_power_of_2(columns), PEERS=MAX_PEERS,
        num_warps=8,
    )  # fmt: skip
    ring_kernel[(MAX_PEERS,)](
        topk_idx, owners, peers, owed, sequence, phase, rows * top_k, rows, layer, mail_slot, max_rows * top_k,
        PEERS=MAX_PEERS, SCAN=1024, ON_GPU=_is_gpu(x), num_warps=4,
    )  # fmt: skip


def await_rows(
    mail_slot: int, peers: Tensor, owed: Tensor, sequence: Tensor, gone: Tensor, failed: Tensor, told: Tensor,
    polls: int,
) -> None:  # fmt: skip
    """gone, told: int32 [MAX_PEERS] in pinned host memory: whose death the host has seen; who failed and why, for the
    host. failed: the same on the device. The slot gets its next sequence number. A poll takes about a microsecond."""
    await_kernel[(1,)](
        peers, owed, sequence, gone, failed, told, mail_slot, polls,
        PEERS=MAX_PEERS, ON_GPU=_is_gpu(peers), num_warps=1,
    )  # fmt: skip


def land(
    topk_idx: Tensor, mail_slot: int, max_rows: int, owners: Tensor, peers: Tensor, failed: Tensor, out: Tensor
) -> Tensor:
    """out: [M * k, H], the rows of the pairs of topk_idx [M, k]; follows `await_rows`."""
    pairs, columns = out.shape
    land_kernel[(pairs,)](
        topk_idx, owners, peers, failed, out, mail_slot * max_rows * topk_idx.shape[1], columns,
        PEERS=MAX_PEERS, BLOCK=triton.next_power_of_2(columns), num_warps=8,
    )  # fmt: skip
    return out


def take_in(jobs: Tensor, local: Tensor, x: Tensor, places: Tensor, copies: bool) -> None:
    """jobs: int64 [n <= MAX_JOBS, 8], in the order of their first rows; local: int32 [experts], places in our stack, -1
    for absent; places: int64 [M, k], written; x: [M, H], written only if `copies`: rows nobody asks us for are left
    alone."""
    rows, top_k = places.shape
    take_kernel[(rows,)](
        jobs, local, x, places, jobs.shape[0], x.shape[1], local.shape[0],
        SLOTS=top_k, LANES=triton.next_power_of_2(top_k), JOBS=MAX_JOBS,
        BLOCK=triton.next_power_of_2(x.shape[1]), COPIES=copies, num_warps=8 if copies else 1,
    )  # fmt: skip


def deliver(jobs: Tensor, rows: Tensor, places: Tensor) -> None:
    """rows: [M * k, H]; where a place is -1 the asker's memory is left alone."""
    pairs, columns = rows.shape
    deliver_kernel[(pairs,)](
        jobs, rows, places, jobs.shape[0], columns,
        SLOTS=places.shape[1], JOBS=MAX_JOBS, BLOCK=triton.next_power_of_2(columns), num_warps=8,
    )  # fmt: skip


def signal(jobs: Tensor) -> None:
    """Follows everything that writes the jobs' rows, on the same stream."""
    signal_kernel[(jobs.shape[0],)](jobs, ON_GPU=_is_gpu(jobs), num_warps=1)


def _is_gpu(tensor: Tensor) -> bool:
    """What is not for the interpreter."""
    return tensor.device.type != "cpu"
