"""Several small host tensors to a device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for pointers that are aligned to less


def upload(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on `device`, as views of one buffer. Shapes and dtypes are kept, strides are not.

    The host does not wait: the buffer is pinned, and torch keeps it until the copy has run. The CPU goes the
    same way, so that the tests there run what a device runs.
    """
    host = pack(parts, pinned=device.type == "cuda")
    return unpack(host.to(device, non_blocking=True), parts)


def pack(parts: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """uint8 buffer on the host with the elements of each part, in order of its indices, each part aligned."""
    host = torch.empty(_starts(parts)[-1], dtype=torch.uint8, pin_memory=pinned)
    # The buffer is seen as elements, never a part as bytes: torch refuses that for strides other than one,
    # which a tensor of one element may have though it counts as contiguous.
    for place, part in zip(unpack(host, parts), parts, strict=True):
        place.copy_(part)
    return host


def unpack(buffer: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Views of a packed buffer with the dtypes and shapes of `parts`."""
    return [
        buffer[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for start, part in zip(_starts(parts), parts)
    ]


def _starts(parts: Sequence[Tensor]) -> list[int]:
    """Where each part begins in the buffer, in bytes, and the buffer's size as the last entry."""
    return list(accumulate((-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts), initial=0))
