"""Integer weights on disk: compressed-tensors' `pack-quantized` (github.com/vllm-project/compressed-tensors).

A matrix X [N, K] of `bits` is stored as three tensors:

- X_packed, int32 [N, ⌈K·bits/32⌉]: 32/bits columns in a word, the first in its lowest bits, each with
  2^(bits-1) added; what is left of a row's last word is zero;
- X_scale, BF16 (or another float) [N, 1] for a scale per row, [N, ⌈K/128⌉] for groups of 128 columns;
- X_shape, int64 [2]: N and K.

A column stands for (number - 2^(bits-1)) · scale. Where 128 does not divide K, the last group is short:
compressed-tensors itself writes no such groups, all else is as it writes and reads it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1_cluster.weights.tensors import INT_SCALE_SUFFIX, INT_SHAPE_SUFFIX, PACKED_SUFFIX, IntFormat


def stored_shapes(shape: tuple[int, ...], how: IntFormat) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a matrix [N, K] is stored as, by the suffix of its name."""
    num_rows, width = shape
    groups = 1 if how.group_size is None else -(-width // how.group_size)
    return {
        PACKED_SUFFIX: (num_rows, -(-width // (32 // how.bits))),
        INT_SCALE_SUFFIX: (num_rows, groups),
        INT_SHAPE_SUFFIX: (2,),
    }


def to_words(q_NK: Tensor, bits: int) -> Tensor:
    """int8 [N, K] with numbers of `bits` → int32 words [N, ⌈K·bits/32⌉]."""
    raised = q_NK.contiguous().view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    raised = F.pad(raised, (0, -q_NK.shape[1] % (32 // bits)))
    if bits == 4:
        raised = raised[:, 0::2] | (raised[:, 1::2] << 4)
    return raised.contiguous().view(torch.int32)


def from_words(words: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `to_words`: int8 [N, width]."""
    raised = words.contiguous().view(torch.uint8)
    if bits == 4:
        raised = torch.stack([raised & 15, raised >> 4], -1).flatten(1)
    # In arithmetic modulo 256, the same bits with and without a sign.
    return (raised[:, :width] - (1 << (bits - 1))).view(torch.int8)


def quantization_config(how: IntFormat, not_quantized: list[str]) -> dict[str, object]:
    """config.json's `quantization_config`; `not_quantized` names the modules that are left in floats."""
    weights = {
        "num_bits": how.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if how.group_size is None else "group",
        "group_size": how.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": not_quantized,
    }
