"""Grouped block-scaled FP8 products of a mixture of experts, for prefill and for decode.

Contiguous: rows sorted by expert, each expert's part padded to whole blocks (`moe_sort.sort_rows`); one
int32 per block names its expert. Masked: a fixed number of row slots per expert and a count, so that a
captured graph holds for any routing. In both, an expert without tokens costs nothing but an early exit. The
gate and up products of a tile are taken together, and leave as SiLU(gate)·up in FP8 with one scale per row
and 128 columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import scaled_groups
from kernels.gemm_fp8 import tile_of
from kernels.tuned import autotune

GROUP = 128


@triton.jit
def _expert_rows(
    tile_m: tl.tensor,
    index_ptr: tl.tensor,
    slots_per_index: tl.tensor,
    rows_per_block: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """`(expert or -1, first row)` of a block of rows: by its count if masked, else by the block's name."""
    if MASKED:
        blocks = tl.cdiv(slots_per_index, rows_per_block)
        expert = tile_m // blocks
        within = tile_m % blocks * rows_per_block
        first = expert.to(tl.int64) * slots_per_index + within
        expert = tl.where(within < tl.load(index_ptr + expert), expert, -1)
    else:
        first = tile_m.to(tl.int64) * rows_per_block
        expert = tl.load(index_ptr + first // slots_per_index)
    return expert, first


GROUPED_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "GROUP_M": g}, num_warps=warps, num_stages=stages)
    for m, n, g, warps, stages in [
        (16, 128, 1, 4, 5),
        (16, 64, 1, 4, 6),
        (16, 128, 1, 8, 4),
        (32, 128, 1, 4, 4),
        (64, 64, 8, 4, 4),
        (64, 128, 8, 4, 4),
        (128, 64, 8, 4, 4),
        (128, 128, 8, 8, 3),
        (128, 128, 8, 8, 4),
    ]
]


def _fitting(configs: list[triton.Config], arguments: dict[str, object], **_: object) -> list[triton.Config]:
    """Blocks of rows no longer than those that name one expert."""
    most = arguments["block_limit"]
    assert isinstance(most, int)
    return [c for c in configs if c.kwargs["BLOCK_M"] <= most] or configs[:1]


@autotune(
    GROUPED_CONFIGS,
    key=["m_bucket", "N", "num_groups", "block_limit"],
    fitting=_fitting,
)
@triton.jit
def grouped_gemm_kernel(
    a_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    index_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: int,
    m_bucket: int,
    block_limit: int,
    slots_per_index: int,
    N: int,
    num_groups: int,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    num_m = tl.cdiv(slots_per_index, BLOCK_M) * (num_rows // slots_per_index)
    num_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    expert, first = _expert_rows(tile_m, index_ptr, slots_per_index, BLOCK_M, MASKED)
    if expert < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, 128)
    width = num_groups * 128
    a_row = tl.minimum(rows, num_rows - 1)
    b_row = expert.to(tl.int64) * N + columns % N
    a_at = a_ptr + a_row[:, None] * width + inner[None, :]
    b_at = b_ptr + b_row[None, :] * width + inner[:, None]
    a_scale_at = a_scale_ptr + a_row * num_groups
    b_scale_at = b_scale_ptr + (expert.to(tl.int64) * tl.cdiv(N, 128) + tile_n * BLOCK_N // 128) * num_groups
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(num_groups):
        product = tl.dot(tl.load(a_at), tl.load(b_at))
        total += product * (tl.load(a_scale_at + group) * tl.load(b_scale_at + group))[:, None]
        a_at += 128
        b_at += 128
    # In the masked form a block may reach past its expert's slots, into the next expert's.
    end = (first // slots_per_index + 1) * slots_per_index if MASKED else num_rows
    inside = (rows < end)[:, None] & (columns < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


GATE_UP_CONFIGS = [
    triton.Config({"BLOCK_M": m, "GROUP_M": g}, num_warps=warps, num_stages=stages)
    for m, g, warps, stages in [
        (16, 1, 4, 4),
        (16, 1, 4, 3),
        (16, 1, 8, 4),
        (32, 1, 4, 4),
        (64, 8, 8, 4),
        (64, 8, 8, 3),
    ]
]


@autotune(
    GATE_UP_CONFIGS,
    key=["m_bucket", "F", "num_groups", "block_limit"],
    fitting=_fitting,
)
@triton.jit
def gate_up_kernel(
    a_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    index_ptr: tl.tensor,
    q_ptr: tl.tensor,
    q_scale_ptr: tl.tensor,
    num_rows: int,
    m_bucket: int,
    block_limit: int,
    slots_per_index: int,
    F: int,
    num_groups: int,
    MASKED: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    num_m = tl.cdiv(slots_per_index, BLOCK_M) * (num_rows // slots_per_index)
    num_n = F // 128
    tile_m, tile_n = tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    expert, first = _expert_rows(tile_m, index_ptr, slots_per_index, BLOCK_M, MASKED)
    if expert < 0:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * 128 + tl.arange(0, 128)
    inner = tl.arange(0, 128)
    width = num_groups * 128
    a_row = tl.minimum(rows, num_rows - 1)
    gate_row = expert.to(tl.int64) * (2 * F) + columns
    a_at = a_ptr + a_row[:, None] * width + inner[None, :]
    gate_at = b_ptr + gate_row[None, :] * width + inner[:, None]
    up_at = gate_at + tl.cast(F, tl.int64) * width
    a_scale_at = a_scale_ptr + a_row * num_groups
    gate_scale_at = b_scale_ptr + (expert.to(tl.int64) * (2 * num_n) + tile_n) * num_groups
    up_scale_at = gate_scale_at + num_n * num_groups
    gate = tl.zeros([BLOCK_M, 128], tl.float32)
    up = tl.zeros([BLOCK_M, 128], tl.float32)
    for group in range(num_groups):
        a = tl.load(a_at)
        a_scale = tl.load(a_scale_at + group)
        gate += tl.dot(a, tl.load(gate_at)) * (a_scale * tl.load(gate_scale_at + group))[:, None]
        up += tl.dot(a, tl.load(up_at)) * (a_scale * tl.load(up_scale_at + group))[:, None]
        a_at += 128
        gate_at += 128
        up_at += 128
    scaled, scale = scaled_groups(gate * tl.sigmoid(gate) * up, FP8_MAX)
    end = (first // slots_per_index + 1) * slots_per_index if MASKED else num_rows
    inside = rows < end
    q_at = q_ptr + rows[:, None] * F + columns[None, :]
    tl.store(q_at, scaled.to(q_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(q_scale_ptr + rows * num_n + tile_n, scale, mask=inside)


def _check(a: Tensor, a_scale: Tensor, b_ENK: Tensor, b_scale: Tensor, index: Tensor) -> bool:
    """Whether the form is masked; `a` is flat or [E, slots, K]."""
    num_experts, num_columns, inner = b_ENK.shape
    groups = inner // GROUP
    assert inner % GROUP == 0, f"an inner width of {inner} does not divide into groups of {GROUP}"
    assert a.shape[-1] == inner, f"inner widths {a.shape[-1]} and {inner}"
    assert a.dtype == b_ENK.dtype
    assert a.element_size() == 1, f"operands are {a.dtype}, not FP8"
    assert a_scale.shape == (*a.shape[:-1], groups), f"a's scales are {tuple(a_scale.shape)}"
    assert b_scale.shape == (num_experts, triton.cdiv(num_columns, GROUP), groups), f"{tuple(b_scale.shape)}"
    assert a_scale.dtype == b_scale.dtype == torch.float32
    assert all(x.is_contiguous() for x in (a, a_scale, b_ENK, b_scale, index))
    assert index.dtype == torch.int32
    masked = a.dim() == 3
    if masked:
        assert a.shape[0] == index.numel() == num_experts, "slots and a count for each expert"
    else:
        block, rest = divmod(a.shape[0], index.numel())
        assert rest == 0, f"{a.shape[0]} rows in {index.numel()} blocks"
        assert block >= 16, f"blocks of {block} rows: matrix units take 16 or more"
    return masked


def _slots(a: Tensor, index: Tensor) -> tuple[int, int, int]:
    """`(rows, rows per entry of index, the longest block a configuration may use)`."""
    num_rows = a.numel() // a.shape[-1]
    slots = num_rows // index.numel()
    return num_rows, slots, triton.next_power_of_2(slots) if a.dim() == 3 else slots


def grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b_ENK: Tensor,
    b_scale_ENG: Tensor,
    index: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
) -> Tensor:
    """Each row's product with its expert's [N, K] weight.

    Contiguous: `a` FP8 [M, K] and `index` = `SortedRows.expert_of_block`. Masked: `a` [E, slots, K] and
    `index` = rows used of each expert. Blocks (or experts) without rows are not written. See
    `reference.grouped_gemm`.
    """
    masked = _check(a, a_scale, b_ENK, b_scale_ENG, index)
    num_rows, slots, limit = _slots(a, index)
    num_columns = b_ENK.shape[1]
    out = torch.empty(*a.shape[:-1], num_columns, dtype=out_dtype, device=a.device)
    kernel, fixed = _choose(grouped_gemm_kernel, GROUPED_CONFIGS[0], deterministic)

    def grid(meta: dict[str, int]) -> tuple[int]:
        blocks = triton.cdiv(slots, meta["BLOCK_M"]) * index.numel()
        return (blocks * triton.cdiv(num_columns, meta["BLOCK_N"]),)

    kernel[grid](
        a,
        a_scale,
        b_ENK,
        b_scale_ENG,
        index,
        out,
        num_rows,
        triton.next_power_of_2(num_rows),
        limit,
        slots,
        num_columns,
        a_scale.shape[-1],
        MASKED=masked,
        **fixed,
    )
    return out


def grouped_gate_up(
    a: Tensor,
    a_scale: Tensor,
    b_ENK: Tensor,
    b_scale_ENG: Tensor,
    index: Tensor,
    *,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(q [..., F], scale [..., F/128])`: SiLU of the product with a weight's first F rows, times the rest's.

    Operands as for `grouped_gemm`, the weight [E, 2F, K] with gate before up and F a multiple of 128.
    """
    masked = _check(a, a_scale, b_ENK, b_scale_ENG, index)
    num_rows, slots, limit = _slots(a, index)
    width = b_ENK.shape[1] // 2
    assert width % GROUP == 0, f"an expert width of {width} does not divide into groups of {GROUP}"
    q = torch.empty(*a.shape[:-1], width, dtype=a.dtype, device=a.device)
    q_scale = torch.empty(*a.shape[:-1], width // GROUP, dtype=torch.float32, device=a.device)
    kernel, fixed = _choose(gate_up_kernel, GATE_UP_CONFIGS[0], deterministic)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(slots, meta["BLOCK_M"]) * index.numel() * (width // GROUP),)

    kernel[grid](
        a,
        a_scale,
        b_ENK,
        b_scale_ENG,
        index,
        q,
        q_scale,
        num_rows,
        triton.next_power_of_2(num_rows),
        limit,
        slots,
        width,
        a_scale.shape[-1],
        MASKED=masked,
        FP8_MAX=torch.finfo(a.dtype).max,
        **fixed,
    )
    return q, q_scale


def _choose(
    kernel: triton.runtime.Autotuner, config: triton.Config, deterministic: bool
) -> tuple[triton.KernelInterface, dict[str, object]]:
    """The tuned kernel, or the one with a fixed configuration, whose rows agree in any batch."""
    return (kernel.fn, config.all_kwargs()) if deterministic else (kernel, {})
