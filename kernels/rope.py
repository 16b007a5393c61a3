"""Rotary embedding of query or key heads, interleaved (DeepSeek) or by halves (Llama, Qwen)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense


@triton.jit
def rotate(
    first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The two halves of each pair after turning, in float32."""
    return first * cos - second * sin, first * sin + second * cos


@triton.jit
def _rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    position_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride_t: int,
    x_stride_h: int,
    out_stride_t: int,
    out_stride_h: int,
    num_heads: int,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_R)
    position = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    if INTERLEAVED:
        low, high = pair * 2, pair * 2 + 1
    else:
        low, high = pair, pair + HALF
    inside = (heads < num_heads)[:, None] & (pair < HALF)[None, :]
    rows = x_ptr + token * x_stride_t + heads[:, None] * x_stride_h
    first = tl.load(rows + low[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(rows + high[None, :], mask=inside, other=0.0).to(tl.float32)
    turned_first, turned_second = rotate(first, second, cos[None, :], sin[None, :])
    out = out_ptr + token * out_stride_t + heads[:, None] * out_stride_h
    tl.store(out + low[None, :], turned_first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + high[None, :], turned_second.to(out_ptr.dtype.element_ty), mask=inside)


def rope(
    x_THR: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor,
    *,
    interleaved: bool,
    in_place: bool = False,
) -> Tensor:
    """Rotates [T, H, R] (heads may be strided) by tables [positions, R/2]; returns it contiguous, or writes
    it back where it was: a program reads its heads before it writes them.

    See `reference.rope`, which takes the tables' rows at `positions_T`.
    """
    num_tokens, num_heads, width = x_THR.shape
    assert rows_dense(x_THR), "heads must be contiguous"
    assert cos_PR.shape == sin_PR.shape, "cos and sin differ in shape"
    assert cos_PR.shape[1] * 2 == width, f"tables of {cos_PR.shape[1]} angles for heads of {width}"
    assert cos_PR.is_contiguous()
    assert sin_PR.is_contiguous()
    assert positions_T.shape == (num_tokens,)
    assert positions_T.is_contiguous()
    out_THR = x_THR if in_place else torch.empty_like(x_THR, memory_format=torch.contiguous_format)
    block_h = min(triton.next_power_of_2(num_heads), 32)
    if num_tokens:
        _rope_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
            x_THR,
            cos_PR,
            sin_PR,
            positions_T,
            out_THR,
            x_THR.stride(0),
            x_THR.stride(1),
            out_THR.stride(0),
            out_THR.stride(1),
            num_heads,
            HALF=width // 2,
            INTERLEAVED=interleaved,
            BLOCK_H=block_h,
            BLOCK_R=triton.next_power_of_2(width // 2),
            num_warps=4,
        )
    return out_THR
