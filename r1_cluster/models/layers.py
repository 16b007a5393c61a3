"""The dense building blocks of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import BlockScaled, Ops, Weight, for_device
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

    def weight(self, *names: str) -> Weight:
        """Matrices of the same width, one below the other: in FP8 where they are stored so and the device
        multiplies FP8, else in the compute dtype."""
        if self.ops.KEEPS_FP8 and all(self.checkpoint.is_fp8(name) for name in names):
            return self._scaled(names)
        if len(names) == 1:
            return self.get(names[0])
        rows = [self.checkpoint.shape(name)[0] for name in names]
        out = torch.empty(sum(rows), self.checkpoint.shape(names[0])[1], dtype=self.dtype, device=self.device)
        for part, name in zip(torch.split(out, rows), names):
            part.copy_(self.get(name))  # each copied once
        return out

    def _scaled(self, names: Sequence[str]) -> BlockScaled:
        parts = [self.ops.block_scaled(*self.checkpoint.get_scaled(name), self.device) for name in names]
        if len(parts) == 1:
            return parts[0]
        # Scales fit the stack because all parts but the last end with a whole block: see `fitting`.
        values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(parts[0].values.dtype)
        return BlockScaled(values, torch.cat([part.scale for part in parts]))


class Mlp:
    """down(silu(gate x) · up x), gate and up in one product."""

    def __init__(self, loader: Loader, name: Callable[[str], str]) -> None:
        """`name` gives the name of the parts gate, up and down."""
        self._ops = loader.ops
        self._tiled = loader.deterministic
        self._gate_up = loader.weight(name("gate"), name("up"))
        self._down = loader.weight(name("down"))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        return self._ops.mlp(x_TD, self._gate_up, self._down, tiled=self._tiled)
