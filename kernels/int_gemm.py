"""Weight-only products: BF16 activations with INT8 or INT4 weights.

There is one scale per row, or one per row and group of 128 columns. A group's integers are exact in BF16,
so the scale multiplies the group's product, not the weights. INT4 is packed by half groups
(`int_weight.pack_int4`): the two halves of a byte belong to two contiguous runs of columns, so one load
serves two products and nothing is shuffled between lanes. Weights are filled with zeros to whole groups; of
activations nothing is read behind their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm_fp8 import add_parts_kernel, num_splits, tile_of
from kernels.launch import num_processors, rows_dense
from kernels.tuned import autotune

GROUP = 128


@triton.jit
def group_product(
    x_at: tl.tensor, w_at: tl.tensor, columns_left: tl.tensor, EVEN: tl.constexpr, PACKED: tl.constexpr
) -> tl.tensor:
    """Product, before its scale, of one group of 128 columns: pointers to the first 64 of rows [M, 64] and of
    weights [64, N]. The activations end `columns_left` columns from here, or with a whole group (EVEN)."""
    if EVEN:
        x_low, x_high = tl.load(x_at), tl.load(x_at + 64)
    else:
        half = tl.arange(0, 64)[None, :]
        x_low = tl.load(x_at, mask=half < columns_left, other=0.0)
        x_high = tl.load(x_at + 64, mask=half + 64 < columns_left, other=0.0)
    if PACKED:
        packed = tl.load(w_at)
        low = (packed & 15).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
    else:
        low, high = tl.load(w_at), tl.load(w_at + 64)
    product = tl.dot(x_low, low.to(tl.float32).to(x_low.dtype))
    return tl.dot(x_high, high.to(tl.float32).to(x_low.dtype), product)


CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in [
        (64, 64, 4, 3),
        (16, 64, 4, 4),
        (16, 128, 4, 4),
        (32, 64, 4, 4),
        (64, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ]
]


@autotune(CONFIGS, key=["m_bucket", "N", "K", "groups_per_split"])
@triton.jit
def int_gemm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: int,
    m_bucket: int,
    N: int,
    K: int,
    groups_per_split: int,
    x_stride: int,
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Part `program_id(1)` of the inner width of one tile, to `out[part, M, N]`."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    part = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row, w_row = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    num_groups = tl.cdiv(K, 128)
    first = part * groups_per_split
    half = tl.arange(0, 64)
    stored: tl.constexpr = 64 if PACKED else 128
    x_at = x_ptr + x_row[:, None] * x_stride + half[None, :] + first * 128
    w_at = weight_ptr + w_row[None, :] * (num_groups * stored) + half[:, None] + first * stored
    scale_at = scale_ptr + (w_row if PER_ROW else w_row * num_groups)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(first, tl.minimum(first + groups_per_split, num_groups)):
        scale = tl.load(scale_at if PER_ROW else scale_at + group)
        total += group_product(x_at, w_at, K - group * 128, EVEN, PACKED) * scale[None, :]
        x_at += 128
        w_at += stored
    out_at = out_ptr + (part.to(tl.int64) * M + rows[:, None]) * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside)


def check_weight(values: Tensor, scale: Tensor, inner: int) -> dict[str, bool]:
    """Asserts that weights [..., N, P] fit rows of `inner` columns; the kernels' compile-time arguments."""
    packed = values.dtype == torch.uint8
    groups = triton.cdiv(inner, GROUP)
    assert values.dtype in (torch.int8, torch.uint8), f"weights are {values.dtype}"
    assert values.shape[-1] == groups * (GROUP // 2 if packed else GROUP), (
        f"{tuple(values.shape)} for {inner}"
    )
    assert scale.dtype == torch.float32
    assert scale.shape[:-1] == values.shape[:-1], f"scales are {tuple(scale.shape)}"
    assert scale.shape[-1] in (1, groups), f"{scale.shape[-1]} scales a row, for {groups} groups"
    assert values.is_contiguous()
    assert scale.is_contiguous()
    return {"EVEN": inner % GROUP == 0, "PACKED": packed, "PER_ROW": scale.shape[-1] == 1}


def gemm_int(x_MK: Tensor, values_NP: Tensor, scale_NG: Tensor, *, deterministic: bool = False) -> Tensor:
    """`x wᵀ`, [M, N] in the dtype of `x`; a weight as in `ops.GroupScaled`, int8 [N, P] or uint8 [N, P/2].

    `deterministic` keeps one tile shape and no split. See `reference.gemm_int` and `int_weight`.
    """
    (num_rows, inner), num_columns = x_MK.shape, values_NP.shape[0]
    kind = check_weight(values_NP, scale_NG, inner)
    assert rows_dense(x_MK)
    groups = triton.cdiv(inner, GROUP)
    out_MN = torch.empty(num_rows, num_columns, dtype=x_MK.dtype, device=x_MK.device)
    if num_rows == 0:
        return out_MN
    wanted = num_splits(num_rows, num_columns, groups, num_processors(x_MK.device))
    per_split = triton.cdiv(groups, 1 if deterministic else wanted)
    splits = triton.cdiv(groups, per_split)
    target = out_MN
    if splits > 1:
        target = torch.empty(splits, *out_MN.shape, dtype=torch.float32, device=x_MK.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        tiles = triton.cdiv(num_rows, meta["BLOCK_M"]) * triton.cdiv(num_columns, meta["BLOCK_N"])
        return tiles, splits

    kernel, fixed = int_gemm_kernel, {}
    if deterministic:
        kernel, fixed = int_gemm_kernel.fn, CONFIGS[0].all_kwargs()
    kernel[grid](
        x_MK,
        values_NP,
        scale_NG,
        target,
        num_rows,
        triton.next_power_of_2(num_rows),
        num_columns,
        inner,
        per_split,
        x_MK.stride(0),
        **kind,
        **fixed,
    )
    if splits > 1:
        size = out_MN.numel()
        add_parts_kernel[(triton.cdiv(size, 1024),)](target, out_MN, size, splits, BLOCK=1024, num_warps=4)
    return out_MN
