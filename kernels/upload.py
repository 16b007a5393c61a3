"""Several small host tensors to a device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for pointers that are aligned to less


def upload(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on `device`, as views of one buffer. Shapes and dtypes are kept.

    The host does not wait: the buffer is pinned, and torch keeps it until the copy has run.
    """
    if device.type == "cpu":
        return list(parts)
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    starts, size = [], 0
    for part in flat:
        starts.append(size)
        size += -(-part.numel() // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, part in zip(starts, flat):
        host[start : start + part.numel()] = part
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + part.numel()].view(whole.dtype).view(whole.shape)
        for start, part, whole in zip(starts, flat, parts)
    ]
