"""Addresses, sizes and strides (in elements) in; checked by the wrappers only."""

def has_avx512() -> bool: ...
def has_avx512_bf16() -> bool: ...
def set_threads(count: int, /) -> None: ...
def count_chunks(counts: int, chunks: int, times: int, /) -> None: ...
def pack(is_bf16: int, weight: int, stride: int, outputs: int, inputs: int, is_gate_up: int, data: int, /) -> None: ...
def linear(
    is_bf16: int,
    is_wide: int,
    x: int,
    x_row_stride: int,
    x_head_stride: int,
    rows: int,
    heads: int,
    data: int,
    outputs: int,
    inputs: int,
    bias: int,
    out: int,
    out_row_stride: int,
    out_head_stride: int,
    /,
) -> None: ...
def mlp(
    is_bf16: int,
    x: int,
    x_stride: int,
    rows: int,
    row_of: int,
    expert_of: int,
    pairs: int,
    experts: int,
    w13: int,
    w2: int,
    hidden: int,
    width: int,
    outputs: int,
    out: int,
    out_stride: int,
    /,
) -> None: ...
