"""Rotary positions: plain, stretched by YaRN, or as Llama 3.1 stretches them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1_cluster.models.config import Llama3Rope, Rope, Yarn


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


def _llama3_frequencies(frequencies: Tensor, llama3: Llama3Rope) -> Tensor:
    """What turns `high_freq_factor` times or more over the original length keeps its frequency, what turns
    `low_freq_factor` times or less is divided by the factor, between them the two are mixed.

    Source: meta-llama/llama-models models/llama3/model.py, `apply_scaling`.
    """
    turns = frequencies * (llama3.original_max_position_embeddings / (2 * math.pi))
    kept = (turns - llama3.low_freq_factor) / (llama3.high_freq_factor - llama3.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies / llama3.factor * (1 - kept) + frequencies * kept


def _yarn_amplitude(yarn: Yarn) -> float:
    """What cos and sin are multiplied by: `attention_factor` where it is said, else mscale / mscale_all_dim
    (arXiv:2309.00071, section 3.4; R1's is 1), times `attn_factor`.

    R1-0528-Qwen3-8B's `attn_factor` undoes YaRN's own magnitude. Engines that serve it read it so;
    transformers 5 ignores the key.
    """
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        own = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)
    else:
        own = yarn.magnitude(1.0)
    return own * yarn.attn_factor


def rope_table(rope: Rope, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, R] float32: cos and sin of each pair of dimensions, alternating."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    amplitude = 1.0
    match rope.scaling:
        case Yarn() as yarn:
            frequencies, amplitude = _yarn_frequencies(frequencies, yarn, rope.theta), _yarn_amplitude(yarn)
        case Llama3Rope() as llama3:
            frequencies = _llama3_frequencies(frequencies, llama3)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).mul_(amplitude)
    return table.flatten(1).to(device)
