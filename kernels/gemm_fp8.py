"""Block-scaled FP8 product: activations scaled per token and 128 columns, weights per 128×128 block.

Three forms. Plain: one program a tile. Split-K: for few rows and few tiles, several programs share a tile's
inner width, and a second kernel adds their parts in order. Persistent: for many rows, as many programs as
processors walk the tiles and fetch them by tensor descriptors (the copy engine on Hopper and later).

Each group's product is accumulated by the matrix unit, scaled, and added in float32, which also bounds the
error of Hopper's 14-bit FP8 accumulator to one group (DeepSeek-V3 report, section 3.3.2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import num_processors, rows_dense
from kernels.tuned import autotune

GROUP = 128
_MIN_GROUPS_PER_SPLIT = 4
_MAX_SPLITS = 16
_PERSISTENT_ROWS = 512


@triton.jit
def tile_of(
    tile: tl.tensor, num_m: tl.tensor, num_n: tl.tensor, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tile coordinates in bands of GROUP_M rows of tiles, so that neighbours in time share operands in L2."""
    band = tile // (GROUP_M * num_n)
    height = tl.minimum(num_m - band * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * num_n)
    return band * GROUP_M + within % height, within // height


PLAIN_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in [
        (64, 128, 4, 4),
        (16, 64, 4, 6),
        (16, 128, 4, 5),
        (32, 64, 4, 6),
        (32, 128, 4, 5),
        (64, 64, 4, 5),
        (64, 64, 4, 3),
        (64, 128, 8, 3),
        (128, 64, 4, 4),
        (128, 128, 8, 3),
        (128, 128, 8, 4),
    ]
]


@autotune(PLAIN_CONFIGS, key=["m_bucket", "N", "num_groups", "groups_per_split"])
@triton.jit
def plain_gemm_kernel(
    a_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: int,
    m_bucket: int,
    N: int,
    num_groups: int,
    groups_per_split: int,
    a_stride: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Part `program_id(1)` of the inner width of one tile, to `out[part, M, N]`."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), num_m, num_n, 8)
    part = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end are read again from the start and never stored, which spares the loop its masks.
    a_row, b_row = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    inner = tl.arange(0, 128)
    first = part * groups_per_split
    last = tl.minimum(first + groups_per_split, num_groups)
    a_at = a_ptr + a_row[:, None] * a_stride + inner[None, :] + first * 128
    b_at = b_ptr + b_row[None, :] * (num_groups * 128) + inner[:, None] + first * 128
    a_scale_at = a_scale_ptr + a_row * num_groups
    b_scale_at = b_scale_ptr + (tile_n * BLOCK_N // 128) * num_groups
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(first, last):
        product = tl.dot(tl.load(a_at), tl.load(b_at))
        total += product * (tl.load(a_scale_at + group) * tl.load(b_scale_at + group))[:, None]
        a_at += 128
        b_at += 128
    out = out_ptr + (part.to(tl.int64) * M + rows[:, None]) * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_parts_kernel(
    part_ptr: tl.tensor, out_ptr: tl.tensor, size: int, num_parts: int, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part_at = part_ptr + at
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(num_parts):
        total += tl.load(part_at, mask=at < size, other=0.0)
        part_at += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


PERSISTENT_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in [
        (128, 128, 8, 4),
        (128, 128, 8, 3),
        (128, 128, 4, 4),
        (64, 128, 4, 4),
        (128, 64, 4, 4),
        (64, 128, 4, 3),
    ]
]


@autotune(PERSISTENT_CONFIGS, key=["m_bucket", "N", "num_groups"])
@triton.jit
def persistent_gemm_kernel(
    a_desc: tl.tensor_descriptor,
    a_scale_ptr: tl.tensor,
    b_desc: tl.tensor_descriptor,
    b_scale_ptr: tl.tensor,
    out_desc: tl.tensor_descriptor,
    M: int,
    m_bucket: int,
    N: int,
    num_groups: int,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
) -> None:
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS):
        tile_m, tile_n = tile_of(tile, num_m, num_n, 8)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        a_scale_at = a_scale_ptr + (rows % M).to(tl.int64) * num_groups
        b_scale_at = b_scale_ptr + (tile_n * BLOCK_N // 128) * num_groups
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for group in range(num_groups):
            a = a_desc.load([tile_m * BLOCK_M, group * 128])
            b = b_desc.load([tile_n * BLOCK_N, group * 128])
            scale = tl.load(a_scale_at + group) * tl.load(b_scale_at + group)
            total += tl.dot(a, b.T) * scale[:, None]
        out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], total.to(out_desc.dtype))


def _set_blocks(
    a_desc: TensorDescriptor,
    _a_scale: Tensor,
    b_desc: TensorDescriptor,
    _b_scale: Tensor,
    out_desc: TensorDescriptor,
    *_: int,
    BLOCK_M: int,
    BLOCK_N: int,
    **__: object,
) -> None:
    """Gives the descriptors the tile of the configuration about to run."""
    a_desc.block_shape, b_desc.block_shape = [BLOCK_M, GROUP], [BLOCK_N, GROUP]
    out_desc.block_shape = [BLOCK_M, BLOCK_N]


# The kernel's hook, not the configurations': Triton keeps no results of configurations that have one.
persistent_gemm_kernel.fn.add_pre_run_hook(_set_blocks)


def num_splits(num_rows: int, num_columns: int, num_groups: int, processors: int) -> int:
    """Parts of the inner width that give every processor two programs, none shorter than four groups."""
    tiles = triton.cdiv(num_rows, 64) * triton.cdiv(num_columns, 64)
    wanted = triton.cdiv(2 * processors, tiles) if tiles < processors else 1
    return max(min(wanted, num_groups // _MIN_GROUPS_PER_SPLIT, _MAX_SPLITS), 1)


def _check(a_MK: Tensor, a_scale_MG: Tensor, b_NK: Tensor, b_scale_NG: Tensor) -> None:
    (num_rows, inner), num_columns = a_MK.shape, b_NK.shape[0]
    assert a_MK.dtype == b_NK.dtype, f"operands are {a_MK.dtype} and {b_NK.dtype}"
    assert a_MK.element_size() == 1, f"operands are {a_MK.dtype}, not FP8"
    assert inner == b_NK.shape[1], f"inner widths {inner} and {b_NK.shape[1]}"
    assert inner % GROUP == 0, f"an inner width of {inner} does not divide into groups of {GROUP}"
    assert rows_dense(a_MK)
    assert b_NK.is_contiguous()
    groups = inner // GROUP
    assert a_scale_MG.shape == (num_rows, groups), f"a's scales are {tuple(a_scale_MG.shape)}"
    assert b_scale_NG.shape == (triton.cdiv(num_columns, GROUP), groups), f"{tuple(b_scale_NG.shape)}"
    assert a_scale_MG.is_contiguous()
    assert b_scale_NG.is_contiguous()
    assert a_scale_MG.dtype == b_scale_NG.dtype == torch.float32


def gemm_fp8(
    a_MK: Tensor,
    a_scale_MG: Tensor,
    b_NK: Tensor,
    b_scale_NG: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
) -> Tensor:
    """`a bᵀ` of FP8 [M, K] and [N, K], K a multiple of 128; [M, N] in `out_dtype`; see `reference.gemm_fp8`.

    `deterministic` keeps one tile shape and no split, so that a row's result is the same in any batch.
    """
    _check(a_MK, a_scale_MG, b_NK, b_scale_NG)
    num_rows, num_columns = a_MK.shape[0], b_NK.shape[0]
    out_MN = torch.empty(num_rows, num_columns, dtype=out_dtype, device=a_MK.device)
    if num_rows == 0:
        return out_MN
    if deterministic:
        _plain(a_MK, a_scale_MG, b_NK, b_scale_NG, out_MN, 1, PLAIN_CONFIGS[0])
    elif _persistent_pays(a_MK, num_columns):
        _persistent(a_MK, a_scale_MG, b_NK, b_scale_NG, out_MN)
    else:
        splits = num_splits(num_rows, num_columns, a_scale_MG.shape[1], num_processors(a_MK.device))
        _split(a_MK, a_scale_MG, b_NK, b_scale_NG, out_MN, splits)
    return out_MN


def _persistent_pays(a_MK: Tensor, num_columns: int) -> bool:
    """Many rows, strides that a tensor descriptor takes, and a device whose copy engine reads descriptors."""
    if a_MK.shape[0] < _PERSISTENT_ROWS or num_columns % 16 or a_MK.stride(0) % 16:
        return False
    if a_MK.device.type == "cpu":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(a_MK.device)[0] >= 9


def _split(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, splits: int) -> None:
    groups = a_scale.shape[1]
    splits = triton.cdiv(groups, triton.cdiv(groups, splits))
    if splits == 1:
        _plain(a, a_scale, b, b_scale, out, 1, None)
        return
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    _plain(a, a_scale, b, b_scale, parts, splits, None)
    grid = (triton.cdiv(out.numel(), 1024),)
    add_parts_kernel[grid](parts, out, out.numel(), splits, BLOCK=1024, num_warps=4)


def _plain(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor,
    splits: int,
    config: triton.Config | None,
) -> None:
    num_rows, num_columns, groups = a.shape[0], b.shape[0], a_scale.shape[1]

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        tiles = triton.cdiv(num_rows, meta["BLOCK_M"]) * triton.cdiv(num_columns, meta["BLOCK_N"])
        return tiles, splits

    kernel = plain_gemm_kernel if config is None else plain_gemm_kernel.fn
    fixed = {} if config is None else config.all_kwargs()
    kernel[grid](
        a,
        a_scale,
        b,
        b_scale,
        out,
        num_rows,
        triton.next_power_of_2(num_rows),
        num_columns,
        groups,
        triton.cdiv(groups, splits),
        a.stride(0),
        **fixed,
    )


def _persistent(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> None:
    programs = num_processors(a.device)
    # Blocks of the first configuration stand in until the kernel's hook sets its own.
    edge = [128, GROUP]
    persistent_gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, edge),
        a_scale,
        TensorDescriptor.from_tensor(b, edge),
        b_scale,
        TensorDescriptor.from_tensor(out, [128, 128]),
        a.shape[0],
        triton.next_power_of_2(a.shape[0]),
        b.shape[0],
        a_scale.shape[1],
        NUM_PROGRAMS=programs,
    )
