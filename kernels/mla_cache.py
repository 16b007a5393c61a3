"""Writing latents to their pages, with the norm and the rotation fused, and reading a prefix back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import rows_dense
from kernels.rope import rotate


@triton.jit
def within_fp8(x: tl.tensor, FP8_MAX: tl.constexpr) -> tl.tensor:
    """What may be cast to FP8. NaN stays NaN: a cache that hid it would hide why a model fails."""
    return tl.clamp(x, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def write_latent_kernel(
    kv_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    position_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    cache_scale_ptr: tl.tensor,
    kv_stride: int,
    eps: float,
    C: tl.constexpr,
    R: tl.constexpr,
    SCALED: tl.constexpr,
    FP8_MAX: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot < 0:
        return
    column, pair = tl.arange(0, C), tl.arange(0, R // 2)
    kv_at = kv_ptr + token * kv_stride
    latent = tl.load(kv_at + column).to(tl.float32)
    latent *= tl.rsqrt(tl.sum(latent * latent, 0) / C + eps)
    latent *= tl.load(weight_ptr + column).to(tl.float32)
    angle = tl.load(position_ptr + token).to(tl.int64) * (R // 2) + pair
    cos, sin = tl.load(cos_ptr + angle).to(tl.float32), tl.load(sin_ptr + angle).to(tl.float32)
    first = tl.load(kv_at + C + 2 * pair).to(tl.float32)
    second = tl.load(kv_at + C + 2 * pair + 1).to(tl.float32)
    turned_first, turned_second = rotate(first, second, cos, sin)
    if SCALED:
        latent_scale = tl.maximum(tl.max(tl.abs(latent), 0), 1e-12) / FP8_MAX
        largest = tl.maximum(tl.max(tl.abs(turned_first), 0), tl.max(tl.abs(turned_second), 0))
        rope_scale = tl.maximum(largest, 1e-12) / FP8_MAX
        tl.store(cache_scale_ptr + slot * 2, latent_scale)
        tl.store(cache_scale_ptr + slot * 2 + 1, rope_scale)
        latent = within_fp8(latent / latent_scale, FP8_MAX)
        turned_first = within_fp8(turned_first / rope_scale, FP8_MAX)
        turned_second = within_fp8(turned_second / rope_scale, FP8_MAX)
    cache_at = cache_ptr + slot * (C + R)
    tl.store(cache_at + column, latent.to(cache_ptr.dtype.element_ty))
    tl.store(cache_at + C + 2 * pair, turned_first.to(cache_ptr.dtype.element_ty))
    tl.store(cache_at + C + 2 * pair + 1, turned_second.to(cache_ptr.dtype.element_ty))


def write_latent(
    kv_TC: Tensor,
    norm_weight_C: Tensor,
    eps: float,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    latent_cache_PSC: Tensor,
    latent_scale_PS2: Tensor | None = None,
) -> None:
    """Norms the first C columns of [T, C + R], rotates the rest, and writes each row to its slot.

    A slot is page · page_size + offset; -1 writes nothing. Tables are [positions, R/2]. Into an FP8 cache,
    the latent and the rotated key are scaled apart, by `latent_scale_PS2` [pages, page_size, 2] float32:
    rotated keys are several times as large. See `reference.latent_entry`.
    """
    num_tokens, width = kv_TC.shape
    num_latent = norm_weight_C.numel()
    num_rotated = width - num_latent
    assert rows_dense(kv_TC)
    assert latent_cache_PSC.is_contiguous()
    assert latent_cache_PSC.shape[2] == width, (
        f"entries of {width} into a cache of {latent_cache_PSC.shape[2]}"
    )
    assert num_latent & (num_latent - 1) == 0, f"a latent of {num_latent}: not a power of two"
    assert num_rotated & (num_rotated - 1) == 0, f"{num_rotated} rotated dims: not a power of two"
    assert cos_PR.shape == sin_PR.shape
    assert cos_PR.shape[1] == num_rotated // 2, f"tables of {cos_PR.shape[1]} angles"
    assert all(x.is_contiguous() for x in (norm_weight_C, cos_PR, sin_PR, positions_T, slots_T))
    assert positions_T.shape == slots_T.shape == (num_tokens,)
    scaled = latent_scale_PS2 is not None
    assert scaled == (latent_cache_PSC.element_size() == 1), "an FP8 cache, and no other, has scales"
    if latent_scale_PS2 is not None:
        assert latent_scale_PS2.shape == (*latent_cache_PSC.shape[:2], 2)
        assert latent_scale_PS2.dtype == torch.float32
        assert latent_scale_PS2.is_contiguous()
    if num_tokens:
        write_latent_kernel[(num_tokens,)](
            kv_TC,
            norm_weight_C,
            cos_PR,
            sin_PR,
            positions_T,
            slots_T,
            latent_cache_PSC,
            latent_cache_PSC if latent_scale_PS2 is None else latent_scale_PS2,
            kv_TC.stride(0),
            eps,
            C=num_latent,
            R=num_rotated,
            SCALED=scaled,
            FP8_MAX=torch.finfo(latent_cache_PSC.dtype).max if scaled else 1.0,
            num_warps=2,
        )


@triton.jit
def gather_latent_kernel(
    cache_ptr: tl.tensor,
    cache_scale_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    key_start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    table_stride: int,
    C: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    sequence = tl.program_id(1)
    begin = tl.load(key_start_ptr + sequence).to(tl.int64)
    length = tl.load(key_start_ptr + sequence + 1) - begin
    first = tl.program_id(0) * BLOCK_N
    if first >= length:
        return
    page = tl.load(page_table_ptr + sequence * table_stride + first // PAGE).to(tl.int64)
    within = tl.arange(0, BLOCK_N)
    used = first + within < length
    slot = page * PAGE + first % PAGE
    latent, rotated = tl.arange(0, C)[None, :], tl.arange(0, R)[None, :]
    at = cache_ptr + slot * (C + R) + within[:, None] * (C + R)
    k_latent = tl.load(at + latent, mask=used[:, None], other=0.0)
    k_rope = tl.load(at + C + rotated, mask=used[:, None], other=0.0)
    if SCALED:
        scale_at = cache_scale_ptr + slot * 2
        k_latent = k_latent.to(tl.float32) * tl.load(scale_at + within * 2, mask=used, other=0.0)[:, None]
        k_rope = k_rope.to(tl.float32) * tl.load(scale_at + within * 2 + 1, mask=used, other=0.0)[:, None]
    out_at = out_ptr + (begin + first) * (C + R) + within[:, None] * (C + R)
    tl.store(out_at + latent, k_latent.to(out_ptr.dtype.element_ty), mask=used[:, None])
    tl.store(out_at + C + rotated, k_rope.to(out_ptr.dtype.element_ty), mask=used[:, None])


def gather_latent(
    latent_cache_PSC: Tensor,
    page_table_SP: Tensor,
    key_start_S1: Tensor,
    num_latent: int,
    latent_scale_PS2: Tensor | None = None,
    *,
    num_keys: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """[num_keys, C + R]: the first `key_start[s+1] - key_start[s]` latents of each sequence, end to end.

    What expanded prefill projects to keys and values, cached prefix included. See `reference.gather_latent`.
    """
    page_size, width = latent_cache_PSC.shape[1:]
    assert latent_cache_PSC.is_contiguous()
    assert page_table_SP.stride(1) == 1
    assert page_table_SP.dtype == key_start_S1.dtype == torch.int32
    assert key_start_S1.shape == (page_table_SP.shape[0] + 1,)
    assert page_size % 16 == 0, f"pages of {page_size} tokens: not a multiple of 16"
    out_LC = torch.empty(num_keys, width, dtype=dtype, device=latent_cache_PSC.device)
    grid = (page_table_SP.shape[1] * page_size // 16, page_table_SP.shape[0])
    if num_keys:
        gather_latent_kernel[grid](
            latent_cache_PSC,
            latent_cache_PSC if latent_scale_PS2 is None else latent_scale_PS2,
            page_table_SP,
            key_start_S1,
            out_LC,
            page_table_SP.stride(0),
            C=num_latent,
            R=width - num_latent,
            PAGE=page_size,
            SCALED=latent_scale_PS2 is not None,
            BLOCK_N=16,
            num_warps=4,
        )
    return out_LC
