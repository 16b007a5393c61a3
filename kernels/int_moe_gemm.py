"""Grouped weight-only products of a mixture of experts: INT8 or INT4 weights, activations as they are.

Rows are sorted by expert in whole blocks (`moe_sort.sort_rows`), and one int32 per block names its expert, as
for weights that are not quantized (`moe_gemm_plain`). The first product fetches each slot's token itself.
Groups and scales are those of the dense product (`int_gemm`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm_fp8 import tile_of
from kernels.int_gemm import check_weight, group_product
from kernels.launch import rows_dense
from kernels.tuned import autotune

CONFIGS = [
    triton.Config({"BLOCK_N": n, "GROUP_M": g}, num_warps=warps, num_stages=stages)
    for n, g, warps, stages in [
        (64, 1, 4, 3),
        (64, 1, 4, 5),
        (128, 1, 4, 4),
        (64, 8, 8, 3),
        (128, 8, 8, 2),
    ]
]


@autotune(CONFIGS, key=["m_bucket", "N", "K", "BLOCK_M"])
@triton.jit
def grouped_int_kernel(
    a_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_of_slot_ptr: tl.tensor,
    expert_of_block_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_slots: int,
    m_bucket: int,
    N: int,
    K: int,
    a_stride: int,
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    ROWS_PER_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    half = tl.arange(0, 64)
    num_groups = tl.cdiv(K, 128)
    stored: tl.constexpr = 64 if PACKED else 128
    w_row = expert.to(tl.int64) * N + column % N
    a_at = a_ptr + row.to(tl.int64)[:, None] * a_stride + half[None, :]
    w_at = weight_ptr + w_row[None, :] * (num_groups * stored) + half[:, None]
    scale_at = scale_ptr + (w_row if PER_ROW else w_row * num_groups)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(num_groups):
        scale = tl.load(scale_at if PER_ROW else scale_at + group)
        total += group_product(a_at, w_at, K - group * 128, EVEN, PACKED) * scale[None, :]
        a_at += 128
        w_at += stored
    out_at = out_ptr + slot.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(column < N)[None, :])


def grouped_int(
    a: Tensor,
    values_ENP: Tensor,
    scale_ENG: Tensor,
    expert_of_block_B: Tensor,
    row_of_slot_M: Tensor | None = None,
    *,
    rows_per_source: int = 1,
    num_slots: int,
    deterministic: bool = False,
) -> Tensor:
    """Each slot's product with its expert's weight, [num_slots, N] in the dtype of `a`.

    Weights are stacks as in `ops.GroupScaled`; all else is as for `moe_gemm_plain.grouped_plain`. See
    `reference.grouped_int`.
    """
    inner, num_columns = a.shape[1], values_ENP.shape[1]
    block, rest = divmod(num_slots, expert_of_block_B.numel())
    assert rest == 0, f"{num_slots} slots in {expert_of_block_B.numel()} blocks"
    assert block >= 16, f"blocks of {block} rows: matrix units take 16 or more"
    kind = check_weight(values_ENP, scale_ENG, inner)
    assert rows_dense(a)
    assert expert_of_block_B.dtype == torch.int32
    assert (row_of_slot_M is None and a.shape[0] == num_slots) or (
        row_of_slot_M is not None and row_of_slot_M.numel() == num_slots
    )
    out = torch.empty(num_slots, num_columns, dtype=a.dtype, device=a.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (num_slots // meta["BLOCK_M"] * triton.cdiv(num_columns, meta["BLOCK_N"]),)

    kernel, fixed = grouped_int_kernel, {}
    if deterministic:
        kernel, fixed = grouped_int_kernel.fn, CONFIGS[0].all_kwargs()
    kernel[grid](
        a,
        values_ENP,
        scale_ENG,
        expert_of_block_B if row_of_slot_M is None else row_of_slot_M,
        expert_of_block_B,
        out,
        num_slots,
        triton.next_power_of_2(num_slots),
        num_columns,
        inner,
        a.stride(0),
        **kind,
        ROWS_PER_SOURCE=0 if row_of_slot_M is None else rows_per_source,
        BLOCK_M=block,
        **fixed,
    )
    return out
