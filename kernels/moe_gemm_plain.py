"""Grouped products of a mixture of experts whose weights are not quantized (BF16 checkpoints).

Rows are sorted by expert in whole blocks (`moe_sort.sort_rows`), and one int32 per block names its expert, so
that nothing about the routing is known to the host. The first product fetches each slot's token itself, and
no sorted copy of the hidden states is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm_fp8 import tile_of
from kernels.launch import rows_dense
from kernels.tuned import autotune

CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k, "GROUP_M": g}, num_warps=warps, num_stages=stages)
    for n, k, g, warps, stages in [
        (64, 64, 1, 4, 3),
        (64, 128, 1, 4, 3),
        (128, 64, 1, 4, 4),
        (128, 64, 8, 8, 3),
        (128, 128, 1, 8, 2),
    ]
]


@autotune(CONFIGS, key=["m_bucket", "N", "K", "BLOCK_M"])
@triton.jit
def grouped_plain_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    row_of_slot_ptr: tl.tensor,
    expert_of_block_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_slots: int,
    m_bucket: int,
    N: int,
    K: int,
    a_stride: int,
    ROWS_PER_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    num_m, num_n = num_slots // BLOCK_M, tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    expert = tl.load(expert_of_block_ptr + tile_m)
    if expert < 0:
        return
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = slot
    if ROWS_PER_SOURCE > 0:
        # Padding repeats row 0: what comes of it is stored, and nobody reads it.
        row = tl.maximum(tl.load(row_of_slot_ptr + slot), 0) // ROWS_PER_SOURCE
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    b_row = expert.to(tl.int64) * N + column % N
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_stride + inner[None, :]
    b_at = b_ptr + b_row[None, :] * K + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + inner < K
        a = tl.load(a_at, mask=inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
        a_at += BLOCK_K
        b_at += BLOCK_K
    out_at = out_ptr + slot.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(column < N)[None, :])


def grouped_plain(
    a: Tensor,
    b_ENK: Tensor,
    expert_of_block_B: Tensor,
    row_of_slot_M: Tensor | None = None,
    *,
    rows_per_source: int = 1,
    num_slots: int,
    deterministic: bool = False,
) -> Tensor:
    """Each slot's product with its expert's [N, K] weight, [num_slots, N] in the dtype of `a`.

    With `row_of_slot` (`SortedRows`), slot m reads row `row_of_slot[m] // rows_per_source` of `a`, else row
    m. Slots of blocks without an expert (-1) are not written. See `reference.grouped_plain`.
    """
    num_columns, inner = b_ENK.shape[1:]
    block, rest = divmod(num_slots, expert_of_block_B.numel())
    assert rest == 0, f"{num_slots} slots in {expert_of_block_B.numel()} blocks"
    assert block >= 16, f"blocks of {block} rows: matrix units take 16 or more"
    assert a.shape[1] == inner, f"inner widths {a.shape[1]} and {inner}"
    assert a.dtype == b_ENK.dtype, f"operands are {a.dtype} and {b_ENK.dtype}"
    assert rows_dense(a)
    assert b_ENK.is_contiguous()
    assert expert_of_block_B.dtype == torch.int32
    assert (row_of_slot_M is None and a.shape[0] == num_slots) or (
        row_of_slot_M is not None and row_of_slot_M.numel() == num_slots
    )
    out = torch.empty(num_slots, num_columns, dtype=a.dtype, device=a.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (num_slots // meta["BLOCK_M"] * triton.cdiv(num_columns, meta["BLOCK_N"]),)

    kernel, fixed = grouped_plain_kernel, {}
    if deterministic:
        kernel, fixed = grouped_plain_kernel.fn, CONFIGS[0].all_kwargs()
    kernel[grid](
        a,
        b_ENK,
        expert_of_block_B if row_of_slot_M is None else row_of_slot_M,
        expert_of_block_B,
        out,
        num_slots,
        triton.next_power_of_2(num_slots),
        num_columns,
        inner,
        a.stride(0),
        ROWS_PER_SOURCE=0 if row_of_slot_M is None else rows_per_source,
        BLOCK_M=block,
        **fixed,
    )
    return out
