"""Stable counting sort of dispatched rows by expert, each expert's part padded to a grouped GEMM's blocks.

Up to 1,024 rows, decode's case, it is one launch: every program counts all rows for itself. Above that,
chunks are counted, the counts summed along the chunks, and each chunk placed. Within a chunk, a sort of
(expert, row) keys gives the order; there are no atomics, so the order is the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import SortedRows, max_slots

_CHUNK = 1024
_FILL_SLOTS = 2048


@triton.jit
def _load_chunk(
    id_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    chunk: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    end = num_rows
    if TOP_K > 0:
        end = tl.minimum(num_rows, tl.load(limit_ptr).to(tl.int32) * TOP_K)
    expert = tl.load(id_ptr + row, mask=row < end, other=-1).to(tl.int32)
    return expert, (expert >= 0) & (expert < num_experts)


@triton.jit
def _count_kernel(
    id_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    chunk_count_ptr: tl.tensor,
    num_rows: int,
    num_experts: int,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    chunk = tl.program_id(0)
    expert, local = _load_chunk(id_ptr, limit_ptr, chunk, num_rows, num_experts, TOP_K, CHUNK)
    counts = tl.histogram(tl.where(local, expert, 0), BLOCK_E, mask=local)
    tl.store(chunk_count_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit
def _scan_kernel(
    chunk_count_ptr: tl.tensor,
    count_ptr: tl.tensor,
    num_chunks: int,
    BLOCK_E: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
) -> None:
    """Turns each expert's counts per chunk into the number of its rows in earlier chunks."""
    expert = tl.program_id(0)
    total = tl.sum(tl.zeros([BLOCK_CHUNKS], tl.int32), 0)
    for first in range(0, num_chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        at = chunk_count_ptr + chunk * BLOCK_E + expert
        counts = tl.load(at, mask=chunk < num_chunks, other=0)
        tl.store(at, total + tl.cumsum(counts, 0) - counts, mask=chunk < num_chunks)
        total += tl.sum(counts, 0)
    tl.store(count_ptr + expert, total)


@triton.jit
def _place_kernel(
    id_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    chunk_count_ptr: tl.tensor,
    count_ptr: tl.tensor,
    row_of_slot_ptr: tl.tensor,
    slot_of_row_ptr: tl.tensor,
    expert_of_block_ptr: tl.tensor,
    num_rows: int,
    num_experts: int,
    num_chunks: int,
    num_blocks: int,
    TOP_K: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FILL_BLOCKS: tl.constexpr,
) -> None:
    """The first `num_chunks` programs place rows; the others name blocks' experts and mark padding."""
    program = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    if SINGLE:
        first, first_local = _load_chunk(id_ptr, limit_ptr, 0, num_rows, num_experts, TOP_K, CHUNK)
        count = tl.histogram(tl.where(first_local, first, 0), BLOCK_E, mask=first_local)
        if program == 0:
            tl.store(count_ptr + experts, count, mask=experts < num_experts)
    else:
        count = tl.load(count_ptr + experts, mask=experts < num_experts, other=0)
    padded = (count + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    end = tl.cumsum(padded, 0)
    start = end - padded
    if program < num_chunks:
        expert, local = _load_chunk(id_ptr, limit_ptr, program, num_rows, num_experts, TOP_K, CHUNK)
        here = tl.histogram(tl.where(local, expert, 0), BLOCK_E, mask=local)
        base = start - (tl.cumsum(here, 0) - here)
        if not SINGLE:
            base += tl.load(chunk_count_ptr + program * BLOCK_E + experts)
        lane = tl.arange(0, CHUNK)
        key = tl.sort(tl.where(local, expert, BLOCK_E) * CHUNK + lane)
        sorted_expert = key // CHUNK
        row = program * CHUNK + key % CHUNK
        placed = sorted_expert < BLOCK_E
        nearest = tl.minimum(sorted_expert, BLOCK_E - 1)
        place = tl.where(placed, tl.gather(base, nearest, 0) + lane, -1)
        tl.store(row_of_slot_ptr + place, row, mask=placed)
        tl.store(slot_of_row_ptr + row, place, mask=row < num_rows)
    else:
        block = (program - num_chunks) * FILL_BLOCKS + tl.arange(0, FILL_BLOCKS)
        before = (end[None, :] <= (block * BLOCK_ROWS)[:, None]).to(tl.int32)
        owner = tl.minimum(tl.sum(before, 1), BLOCK_E - 1)
        used = block * BLOCK_ROWS < tl.max(end, 0)
        tl.store(expert_of_block_ptr + block, tl.where(used, owner, -1), mask=block < num_blocks)
        filled = tl.where(used, tl.gather(start + count, owner, 0), 0)
        slot = (block * BLOCK_ROWS)[:, None] + tl.arange(0, BLOCK_ROWS)[None, :]
        padding = (slot >= filled[:, None]) & (block < num_blocks)[:, None]
        tl.store(row_of_slot_ptr + slot, tl.full([FILL_BLOCKS, BLOCK_ROWS], -1, tl.int32), mask=padding)


def sort_rows(
    expert_ids_TK: Tensor, num_experts: int, block: int, num_tokens: Tensor | None = None
) -> SortedRows:
    """Rows n = t · K + k of int [T, K] in expert order, stable; ids outside [0, num_experts) are left out.

    `num_tokens` (one integer on the device, so that a captured graph serves any number) leaves the rows of
    later tokens out as well: they pad a batch, and no expert is read for them. `block` is a power of two; all
    results have static shapes, so that a CUDA graph holds for any routing. See `reference.sort_rows`.
    """
    assert expert_ids_TK.is_contiguous()
    assert block & (block - 1) == 0, f"blocks of {block} rows: not a power of two"
    num_rows, device = expert_ids_TK.numel(), expert_ids_TK.device
    num_slots = max_slots(num_rows, num_experts, block)
    assert num_slots < 2**31

    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    rows = SortedRows(
        integers(num_slots), integers(num_rows), integers(num_experts), integers(num_slots // block)
    )
    if num_rows == 0:
        rows.counts.zero_()
        return rows
    chunk = min(max(triton.next_power_of_2(num_rows), 16), _CHUNK)
    num_chunks = triton.cdiv(num_rows, chunk)
    block_e = max(triton.next_power_of_2(num_experts), 16)
    chunk_count = integers(num_chunks * block_e)
    limit = expert_ids_TK if num_tokens is None else num_tokens
    top_k = 0 if num_tokens is None else expert_ids_TK.shape[1]
    if num_chunks > 1:
        _count_kernel[(num_chunks,)](
            expert_ids_TK,
            limit,
            chunk_count,
            num_rows,
            num_experts,
            TOP_K=top_k,
            CHUNK=chunk,
            BLOCK_E=block_e,
            num_warps=4,
        )
        _scan_kernel[(num_experts,)](
            chunk_count, rows.counts, num_chunks, BLOCK_E=block_e, BLOCK_CHUNKS=128, num_warps=1
        )
    fill_blocks = max(_FILL_SLOTS // block // 16, 1)
    fills = triton.cdiv(num_slots // block, fill_blocks)
    _place_kernel[(num_chunks + fills,)](
        expert_ids_TK,
        limit,
        chunk_count,
        rows.counts,
        rows.row_of_slot,
        rows.slot_of_row,
        rows.expert_of_block,
        num_rows,
        num_experts,
        num_chunks,
        num_slots // block,
        TOP_K=top_k,
        SINGLE=num_chunks == 1,
        BLOCK_ROWS=block,
        CHUNK=chunk,
        BLOCK_E=block_e,
        FILL_BLOCKS=fill_blocks,
        num_warps=8,
    )
    return rows
