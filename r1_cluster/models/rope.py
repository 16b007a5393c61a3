"""Rotary positions: plain, and stretched by YaRN as DeepSeek-R1 asks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1_cluster.models.config import ModelConfig, Yarn


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What scores are multiplied by: 1 / sqrt(qk head width), under YaRN times mscale².

    Its mscale is that of `mscale_all_dim`. Source: DeepSeek-V3 inference/model.py, class MLA.
    """
    scale = 1.0 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


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


def rope_table(config: ModelConfig, device: torch.device) -> Tensor:
    """[max_position_embeddings, R] float32: cos and sin of each pair of dimensions, alternating.

    Under YaRN both carry the factor mscale / mscale_all_dim (arXiv:2309.00071, section 3.4; R1's is 1).
    """
    dim = config.qk_rope_head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    amplitude = 1.0
    if (yarn := config.yarn) is not None:
        frequencies = _yarn_frequencies(frequencies, yarn, config.rope_theta)
        if yarn.mscale and yarn.mscale_all_dim:
            amplitude = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
        else:
            amplitude = _mscale(yarn.factor, 1.0)
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), frequencies)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).mul_(amplitude)
    return table.flatten(1).to(device)
