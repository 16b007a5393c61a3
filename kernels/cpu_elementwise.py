"""Elementwise functions whose bits do not depend on what else is computed: see `kernels.cpu`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GRAIN = 32768
"""Torch's own grain: fewer elements are never split over threads."""

_VECTOR = 32  # elements that the vector body takes at a time


def elementwise_(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies an in-place function to a contiguous tensor, in whole vectors and below the grain."""
    flat = x.view(-1)
    if whole := flat.numel() % _VECTOR:
        padded = F.pad(flat, (0, _VECTOR - whole))
        x.copy_(elementwise_(function, padded)[: flat.numel()].view_as(x))
    elif flat.numel() <= GRAIN:
        function(flat)
    else:
        for part in torch.split(flat, GRAIN):
            function(part)
    return x
