"""Weights of few bits in plain torch: how they are rounded, how they lie in memory, what they stand for.

In memory, rows of integers are filled with zeros to whole groups of 128 columns, so that kernels read whole
groups: int8 [..., N, P], or uint8 [..., N, P/2] with two numbers in each byte. Scales are float32, one per
row [..., N, 1] or one per row and group [..., N, P/128]. On disk they lie otherwise:
`r1_cluster.weights.integers`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import GroupScaled

GROUP = 128

_BELOW_BF16 = 0xFFFF  # the bits of a float32 that BF16 has not


def quantize_int(weight_NK: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """`(q int8 [N, K], scale float32 [N, ⌈K/group⌉])`: symmetric, one scale per row and `group` columns
    (None: the whole row), the last group as short as it is.

    A scale is the least BF16 number that is not below the group's largest magnitude over 2^(bits-1) - 1/2, so
    that every error is at most half a scale; q is in [-2^(bits-1), 2^(bits-1) - 1]. These are
    compressed-tensors' ranges (`calculate_qparams` of its quantization/utils), but for BF16's direction.
    """
    num_rows, width = weight_NK.shape
    group = group or width
    most = 2 ** (bits - 1)
    grouped = F.pad(weight_NK.float(), (0, -width % group)).view(num_rows, -1, group)
    scale_NG = grouped.abs().amax(-1) / (most - 0.5)
    # The smallest normal number keeps a group of zeros, or of denormals, from being divided by zero.
    scale_NG = _round_up_to_bf16(scale_NG.clamp_min(torch.finfo(torch.float32).tiny))
    q = (grouped / scale_NG[..., None]).round_().clamp_(-most, most - 1)
    return q.to(torch.int8).flatten(1)[:, :width], scale_NG


def _round_up_to_bf16(x: Tensor) -> Tensor:
    """The least BF16 number that is not below each positive float32, in float32."""
    return (((x.view(torch.int32) + _BELOW_BF16) >> 16) << 16).view(torch.float32)


def pack_int4(q_NP: Tensor) -> Tensor:
    """[N, P/2] uint8: byte j of a group of 128 holds column j (low half) and column 64 + j (high half).

    Each half, 8 added, is a contiguous half group, so that unpacking needs no shuffle between lanes.
    """
    low, high = (q_NP.contiguous().view(torch.uint8) + 8).reshape(len(q_NP), -1, GROUP).chunk(2, -1)
    return (low | (high << 4)).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`, int8 [..., P]."""
    groups = packed.reshape(*packed.shape[:-1], -1, GROUP // 2)
    return torch.cat([groups & 15, groups >> 4], -1).flatten(-2).view(torch.int8) - 8


def group_scaled(q_NK: Tensor, scale_NG: Tensor, bits: int, device: torch.device) -> GroupScaled:
    """int8 numbers of 8 or 4 bits, and their scales, as they lie in memory."""
    width = q_NK.shape[1]
    values = F.pad(q_NK.to(device), (0, -width % GROUP))
    if bits == 4:
        values = pack_int4(values)
    return GroupScaled(values.contiguous(), scale_NG.to(device, torch.float32).contiguous(), width)


def fp8_to_float(values: Tensor) -> Tensor:
    """E4M3FN numbers in float32. They are looked up but on GPUs: on the CPU that is five times as fast as
    torch's cast, and a device without FP8 may have no cast."""
    if values.device.type == "cuda":
        return values.float()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(values.device)
    return every.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def dequantize_groups(values: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """What a `GroupScaled` weight stands for, [..., N, width] in `dtype`; multiplied in float32, or in
    `dtype` where that is wider."""
    if values.dtype == torch.uint8:
        values = unpack_int4(values)
    elif values.dtype == torch.float8_e4m3fn:
        values = fp8_to_float(values)
    wide = torch.promote_types(dtype, torch.float32)
    grouped = values.to(wide).view(*scale.shape, -1).mul_(scale.to(wide)[..., None])
    return grouped.flatten(-2)[..., :width].to(dtype).contiguous()
