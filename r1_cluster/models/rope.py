"""Rotary positions: plain, and stretched by YaRN as DeepSeek-R1 asks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1_cluster.models.config import Rope, Yarn


def _correction_dim(rotations: float, dim: int, theta: float, length: int) -> float:
    """The (fractional) pair that turns `rotations` times over `length` positions."""
    return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_frequencies(frequencies: Tensor, yarn: Yarn, theta: float) -> Tensor:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a linear ramp lies between."""
    dim = 2 * frequencies.shape[0]
    low = _correction_dim(yarn.beta_fast, dim, theta, yarn.original_max_position_embeddings)
    high = _correction_dim(yarn.beta_slow, dim, theta, yarn.original_max_position_embeddings)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def rope_table(rope: Rope, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, R] float32: cos and sin of each pair of dimensions, alternating.

    Under YaRN both carry the factor mscale / mscale_all_dim (arXiv:2309.00071, section 3.4; R1's is 1).
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    amplitude = 1.0
    if (yarn := rope.scaling) is not None:
        frequencies = _yarn_frequencies(frequencies, yarn, rope.theta)
        if yarn.mscale and yarn.mscale_all_dim:
            amplitude = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)
        else:
            amplitude = yarn.magnitude(1.0)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).mul_(amplitude)
    return table.flatten(1).to(device)
