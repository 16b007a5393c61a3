"""Merging the parts that split attention leaves: a softmax-weighted mean over the splits, in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def merge_kernel(
    part_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    context_len_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: int,
    num_heads: int,
    split_tokens: int,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Row `program_id(0)` (query · heads + head) of sequence `program_id(1)`; a part's weight is 2^lse."""
    sequence = tl.program_id(1)
    first = tl.load(query_start_ptr + sequence)
    row = first.to(tl.int64) * num_heads + tl.program_id(0)
    if row >= tl.load(query_start_ptr + sequence + 1).to(tl.int64) * num_heads:
        return
    num_splits = tl.cdiv(tl.load(context_len_ptr + sequence), split_tokens)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < WIDTH
    largest = float("-inf")
    lse_at = lse_ptr + row
    for _ in range(num_splits):
        largest = tl.maximum(largest, tl.load(lse_at))
        lse_at += num_rows
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    weights = 0.0
    lse_at = lse_ptr + row
    part_at = part_ptr + row * WIDTH + column
    step = tl.cast(num_rows, tl.int64) * WIDTH
    for _ in range(num_splits):
        weight = tl.exp2(tl.load(lse_at) - largest)
        total += weight * tl.load(part_at, mask=inside, other=0.0)
        weights += weight
        lse_at += num_rows
        part_at += step
    tl.store(out_ptr + row * WIDTH + column, (total / weights).to(out_ptr.dtype.element_ty), mask=inside)


def merge_splits(
    part_NRC: Tensor,
    lse_NR: Tensor,
    context_len_S: Tensor,
    query_start_S1: Tensor,
    out_THC: Tensor,
    split_tokens: int,
    max_query_len: int,
) -> None:
    """Writes [T, H, C] from float32 parts [splits, T·H, C] and their base-2 log sums [splits, T·H]."""
    num_heads, width = out_THC.shape[1:]
    assert part_NRC.is_contiguous()
    assert lse_NR.is_contiguous()
    assert out_THC.is_contiguous()
    merge_kernel[(max_query_len * num_heads, context_len_S.numel())](
        part_NRC,
        lse_NR,
        context_len_S,
        query_start_S1,
        out_THC,
        lse_NR.shape[1],
        num_heads,
        split_tokens,
        WIDTH=width,
        BLOCK_WIDTH=triton.next_power_of_2(width),
        num_warps=4,
    )


def choose_split(
    max_context_len: int, programs_per_split: int, processors: int, granule: int, least: int
) -> int:
    """Tokens of a split, a multiple of `granule`: splits for two programs a processor, none too short.

    The number of splits is a power of two: kernels are tuned for each length, and batches should share them.
    """
    splits = max(2 * processors // max(programs_per_split, 1), 1)
    splits = 1 << (splits.bit_length() - 1)
    tokens = max(triton.cdiv(max_context_len, splits), min(least, max_context_len))
    return int(triton.cdiv(tokens, granule)) * granule


def check_paging(
    page_table_SP: Tensor, context_len_S: Tensor, query_start_S1: Tensor, *caches: Tensor
) -> None:
    """Shapes, dtypes and strides that every paged attention relies on."""
    num_sequences = context_len_S.numel()
    assert page_table_SP.dtype == context_len_S.dtype == query_start_S1.dtype == torch.int32
    assert page_table_SP.shape[0] == num_sequences, "a row of pages for each sequence"
    assert page_table_SP.stride(1) == 1
    assert query_start_S1.shape == (num_sequences + 1,), "sequences + 1 query starts"
    assert context_len_S.is_contiguous()
    assert query_start_S1.is_contiguous()
    assert all(cache.is_contiguous() for cache in caches), "caches are dense"
