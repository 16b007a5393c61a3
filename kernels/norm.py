"""RMSNorm of rows, alone and with the residual stream. One program a row, the same for every batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    x_stride: int,
    residual_stride: int,
    eps: float,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        # The stream itself is rounded, and it is the rounded stream that is normed, as in the unfused model.
        rounded = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + columns, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=inside)


def row_warps(width: int) -> int:
    """Warps of a row kernel: about 16 elements a lane, by the width alone, so that all batches agree."""
    return int(min(max(triton.next_power_of_2(width) // 512, 1), 16))


def _launch(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_tokens, width = x_TD.shape
    assert rows_dense(x_TD), "x_TD's rows must be contiguous"
    assert weight_D.shape == (width,), f"weight is {tuple(weight_D.shape)}, rows are {width} wide"
    assert weight_D.is_contiguous()
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    residual = x_TD if residual_TD is None else residual_TD
    assert residual.shape == x_TD.shape
    assert residual.dtype == x_TD.dtype
    assert rows_dense(residual)
    sum_TD = out_TD if residual_TD is None else torch.empty_like(out_TD)
    if num_tokens:
        _rms_norm_kernel[(num_tokens,)](
            x_TD,
            residual,
            weight_D,
            out_TD,
            sum_TD,
            x_TD.stride(0),
            residual.stride(0),
            eps,
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            HAS_RESIDUAL=residual_TD is not None,
            num_warps=row_warps(width),
        )
    return out_TD, sum_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Norm of each row of [T, D] (rows may be strided), in the dtype of `x_TD`; see `reference.rms_norm`."""
    return _launch(x_TD, None, weight_D, eps)[0]


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(normed_TD, sum_TD)`, both in the dtype of `x_TD`; see `reference.add_rms_norm`."""
    return _launch(x_TD, residual_TD, weight_D, eps)
