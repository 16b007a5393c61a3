"""FP8 quantization, one scale per token and 128 columns (DeepSeek-V3 report, section 3.3.2), alone and fused.

The scale is the group's largest magnitude over the format's largest value, in float32, so that nothing
overflows and a group of zeros stays zeros. One launch shape for every batch: no row depends on another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import native_fp8, rows_dense
from kernels.norm import row_warps

GROUP = 128
_GROUPS_PER_PROGRAM = 16


@triton.jit
def scaled_groups(x: tl.tensor, FP8_MAX: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """`(values to be cast to FP8, scales)` of groups [G, 128] in float32."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / FP8_MAX
    return tl.clamp(x / scale[:, None], -FP8_MAX, FP8_MAX), scale


@triton.jit
def _quantize_kernel(
    x_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: int,
    num_groups: int,
    row_groups: int,
    FP8_MAX: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SILU_MUL: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = (group < num_groups)[:, None]
    lane = tl.arange(0, 128)[None, :]
    source = (group // row_groups * x_stride + group % row_groups * 128)[:, None] + lane
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if SILU_MUL:
        up = tl.load(x_ptr + source + row_groups * 128, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.sigmoid(x) * up
    scaled, scale = scaled_groups(x, FP8_MAX)
    tl.store(q_ptr + group[:, None] * 128 + lane, scaled.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + group, scale, mask=group < num_groups)


def _launch_quantize(
    x: Tensor, width: int, silu: bool, fp8_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    assert rows_dense(x), "rows must be contiguous"
    assert width % GROUP == 0, f"rows of {width} do not divide into groups of {GROUP}"
    dtype = fp8_dtype or native_fp8(x.device)
    row_groups = width // GROUP
    q = torch.empty(x.shape[0], width, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[0], row_groups, dtype=torch.float32, device=x.device)
    num_groups = scale.numel()
    if num_groups:
        _quantize_kernel[(triton.cdiv(num_groups, _GROUPS_PER_PROGRAM),)](
            x,
            q,
            scale,
            x.stride(0),
            num_groups,
            row_groups,
            FP8_MAX=torch.finfo(dtype).max,
            BLOCK_G=_GROUPS_PER_PROGRAM,
            SILU_MUL=silu,
            num_warps=4,
        )
    return q, scale


def quantize(x_TD: Tensor, fp8_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`(q_TD, scale_TG)` of [T, D], D a multiple of 128, rows strided or not; see `reference.quantize`."""
    return _launch_quantize(x_TD, x_TD.shape[1], False, fp8_dtype)


def silu_mul_quantize(gate_up_T2F: Tensor, fp8_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`(q_TF, scale_TG)` of SiLU(first F columns) times the last F; see `reference.silu_mul`."""
    return _launch_quantize(gate_up_T2F, gate_up_T2F.shape[1] // 2, True, fp8_dtype)


class NormedQuantized(NamedTuple):
    """A normed row in FP8 and, where asked for, what else its readers need."""

    q: Tensor
    """FP8 [T, D]."""
    scale: Tensor
    """float32 [T, D/128]."""
    normed: Tensor | None
    """[T, D] in the input's dtype, for the gate, which does not read FP8."""
    sum: Tensor | None
    """[T, D], the residual stream after adding `x`."""


@triton.jit
def _rms_norm_quantize_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    x_stride: int,
    residual_stride: int,
    eps: float,
    G: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEP_NORMED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    inside = (group < G)[:, None]
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        rounded = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * (G * 128) + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / (G * 128) + eps)
    normed = x * inverse * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if KEEP_NORMED:
        tl.store(normed_ptr + row * (G * 128) + column, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    scaled, scale = scaled_groups(normed, FP8_MAX)
    tl.store(q_ptr + row * (G * 128) + column, scaled.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row * G + group, scale, mask=group < G)


def rms_norm_quantize(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    residual_TD: Tensor | None = None,
    keep_normed: bool = False,
    fp8_dtype: torch.dtype | None = None,
) -> NormedQuantized:
    """RMSNorm (after adding the residual) and quantization in one pass; D is a multiple of 128.

    The norm is quantized before it is rounded to the input's dtype. See `reference.rms_norm` and `quantize`.
    """
    num_tokens, width = x_TD.shape
    assert width % GROUP == 0, f"rows of {width} do not divide into groups of {GROUP}"
    assert rows_dense(x_TD), "rows must be contiguous"
    assert weight_D.shape == (width,)
    assert weight_D.is_contiguous()
    residual = x_TD if residual_TD is None else residual_TD
    assert residual.shape == x_TD.shape
    assert residual.dtype == x_TD.dtype
    assert rows_dense(residual)
    dtype = fp8_dtype or native_fp8(x_TD.device)
    q = torch.empty(num_tokens, width, dtype=dtype, device=x_TD.device)
    scale = torch.empty(num_tokens, width // GROUP, dtype=torch.float32, device=x_TD.device)
    normed = torch.empty_like(q, dtype=x_TD.dtype) if keep_normed else None
    summed = torch.empty_like(q, dtype=x_TD.dtype) if residual_TD is not None else None
    if num_tokens:
        _rms_norm_quantize_kernel[(num_tokens,)](
            x_TD,
            residual,
            weight_D,
            q,
            scale,
            x_TD if normed is None else normed,
            x_TD if summed is None else summed,
            x_TD.stride(0),
            residual.stride(0),
            eps,
            G=width // GROUP,
            FP8_MAX=torch.finfo(dtype).max,
            BLOCK_G=triton.next_power_of_2(width // GROUP),
            HAS_RESIDUAL=summed is not None,
            KEEP_NORMED=keep_normed,
            num_warps=row_warps(width),
        )
    return NormedQuantized(q, scale, normed, summed)


@triton.jit
def _dequantize_weight_kernel(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: int,
    num_columns: int,
    scale_columns: int,
    BLOCK_N: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows[:, None] * num_columns + columns[None, :]
    # BLOCK_N divides 128, so one program reads one scale.
    scale = tl.load(scale_ptr + tl.program_id(0) * BLOCK_N // 128 * scale_columns + tl.program_id(1))
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (weight * scale).to(out_ptr.dtype.element_ty), mask=inside)


def dequantize_weight(weight_NK: Tensor, scale_NK: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weight [N, K] times its blocks' scales [⌈N/128⌉, ⌈K/128⌉]; see `reference.dequantize_weight`."""
    num_rows, num_columns = weight_NK.shape
    blocks = (triton.cdiv(num_rows, GROUP), triton.cdiv(num_columns, GROUP))
    assert weight_NK.is_contiguous()
    assert scale_NK.is_contiguous()
    assert scale_NK.shape == blocks, f"{tuple(scale_NK.shape)} scales for {blocks} blocks"
    out_NK = torch.empty(weight_NK.shape, dtype=dtype, device=weight_NK.device)
    _dequantize_weight_kernel[(triton.cdiv(num_rows, 64), blocks[1])](
        weight_NK, scale_NK, out_NK, num_rows, num_columns, blocks[1], BLOCK_N=64, num_warps=4
    )
    return out_NK
