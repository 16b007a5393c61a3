"""The dense building blocks of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Ops, for_device
from r1_cluster.models.config import ModelConfig
from r1_cluster.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Loader:
    """Reads a model's tensors: from which checkpoint, in which dtype, to which device, for which mode."""

    config: ModelConfig
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    deterministic: bool

    @property
    def ops(self) -> Ops:
        """The operations of the device."""
        return for_device(self.device)

    def get(self, name: str) -> Tensor:
        """One tensor in the compute dtype."""
        return self.checkpoint.get(name, self.dtype, self.device)

    def get_float32(self, name: str) -> Tensor:
        """One tensor in float32, whatever the compute dtype."""
        return self.checkpoint.get(name, torch.float32, self.device)

    def stack(self, *names: str) -> Tensor:
        """Matrices of the same width, one below the other, each copied once."""
        rows = [self.checkpoint.shape(name)[0] for name in names]
        out = torch.empty(sum(rows), self.checkpoint.shape(names[0])[1], dtype=self.dtype, device=self.device)
        for part, name in zip(torch.split(out, rows), names):
            part.copy_(self.get(name))
        return out


class Mlp:
    """down(silu(gate x) · up x), gate and up in one product."""

    def __init__(self, loader: Loader, name: Callable[[str], str]) -> None:
        """`name` gives the name of the parts gate, up and down."""
        self._ops = loader.ops
        self._tiled = loader.deterministic
        self._gate_up = loader.stack(name("gate"), name("up"))
        self._down = loader.get(name("down"))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        hidden = self._ops.silu_mul(self._ops.linear(x_TD, self._gate_up, tiled=self._tiled))
        return self._ops.linear(hidden, self._down, tiled=self._tiled)
