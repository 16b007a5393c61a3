"""Paged caches in plain torch: writing to their slots and reading them, in the compute dtype or in FP8.

Every step of the rounding (largest magnitude, quotient, cast) is exact or rounds each number by itself, so
that a row's bits depend on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.int_weight import fp8_to_float
from kernels.ops import Cache, Fp8Cache


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(q [..., W] in the FP8 dtype, scale float32 [...])`: a row's scale is its largest magnitude over the
    format's largest number. NaN stays NaN, and a row with an infinite number becomes NaN."""
    x, largest = x.float(), torch.finfo(dtype).max
    scale = x.abs().amax(-1).clamp_min(1e-12) / largest
    return (x / scale[..., None]).clamp(-largest, largest).to(dtype), scale


def write_slots(cache: Cache, slots_T: Tensor, rows_T: Tensor, widths: Sequence[int]) -> None:
    """Writes rows [T, ..., W] to their slots (page · page_size + offset); in FP8 parts of these widths, side
    by side in W, have scales of their own."""
    if isinstance(cache, Tensor):
        cache.flatten(0, 1).index_copy_(0, slots_T, rows_T)
        return
    rounded = [quantize_rows(part, cache.values.dtype) for part in torch.split(rows_T, list(widths), -1)]
    bits = torch.cat([q.view(torch.uint8) for q, _ in rounded], -1)
    cache.values.view(torch.uint8).flatten(0, 1).index_copy_(0, slots_T, bits)
    scale = torch.stack([scale for _, scale in rounded], -1)
    cache.scale.flatten(0, 1).index_copy_(0, slots_T, scale.view(len(slots_T), *cache.scale.shape[2:]))


def read_slots(cache: Cache, slots_N: Tensor, widths: Sequence[int]) -> Tensor:
    """What slots stand for, float32 [N, ...]; `widths` as in `write_slots`."""
    if isinstance(cache, Tensor):
        return cache.flatten(0, 1).index_select(0, slots_N).float()
    bits = cache.values.view(torch.uint8).flatten(0, 1).index_select(0, slots_N)
    rows = fp8_to_float(bits.view(cache.values.dtype))
    scale = cache.scale.flatten(0, 1).index_select(0, slots_N).view(*rows.shape[:-1], len(widths))
    for i, part in enumerate(torch.split(rows, list(widths), -1)):
        part.mul_(scale[..., i : i + 1])
    return rows


def entry_of(cache: Cache) -> torch.Size:
    """The shape of what one slot holds."""
    return (cache.values if isinstance(cache, Fp8Cache) else cache).shape[2:]
