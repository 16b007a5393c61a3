"""FP8 weights in blocks: the published formulas, from float to FP8 with one scale per block and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.ops import for_device
from r1_cluster.weights.inventory import blocks

BLOCK = (128, 128)
_LARGEST = 448.0  # of E4M3


def dequantize(
    weight_NK: Tensor, scale_NK: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """FP8 [N, K] times its blocks' scales [⌈N/block⌉, ⌈K/block⌉] in float32, rounded once, to `dtype`.

    Source: DeepSeek-V3 inference/kernel.py, weight_dequant.
    """
    return for_device(torch.device("cpu")).dequantize(weight_NK, scale_NK, block, dtype)


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → FP8 [N, K] and float32 scales [⌈N/128⌉, ⌈K/128⌉]: a block's largest magnitude / 448.

    A scale is at least float32's smallest normal number, so that a block of zeros, which the published code
    divides by zero, stays zeros. Raises ValueError where a value is not finite.
    Source: DeepSeek-V3 inference/kernel.py, weight_quant.
    """
    num_rows, num_columns = weight_NK.shape
    rows, columns = BLOCK
    out = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(blocks((num_rows, num_columns), BLOCK), dtype=torch.float32)
    for i, scale in enumerate(scales):
        at = slice(i * rows, (i + 1) * rows)
        x = pad(weight_NK[at].float(), (0, -num_columns % columns))
        x = x.view(len(x), -1, columns)
        largest = x.abs().amax((0, 2))
        if not bool(largest.isfinite().all()):
            raise ValueError("has values that are NaN or infinite, which FP8 cannot hold")
        scale.copy_((largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny))
        scaled = (x / scale[:, None]).clamp(-_LARGEST, _LARGEST)
        out[at] = scaled.flatten(1)[:, :num_columns].to(torch.float8_e4m3fn)
    return out, scales
