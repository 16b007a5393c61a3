"""The building blocks that the layers of all families share."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kernels.ops import Cache, Rotation
from r1_cluster.models.batch import AttentionBatch
from r1_cluster.models.loader import Loader


class Attention(Protocol):
    """One layer's attention, which knows what of a token its cache keeps."""

    def new_cache(self, num_pages: int, page_size: int) -> Cache:
        """An empty cache, its first dimension the pages."""

    def forward(self, x_TD: Tensor, batch: AttentionBatch, rotation: Rotation, cache: Cache, /) -> Tensor:
        """Normed hidden states [T, D] → [T, D]; writes what is kept of the new tokens to their slots."""


class Ranks(Protocol):
    """The ranks that divide a stage among them, as one of them sees them."""

    def add(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, the same bits on each of them."""


class Mlp:
    """down(silu(gate x) · up x), gate and up in one product; or a rank's part of the hidden units, whose
    outputs add up to it."""

    def __init__(self, loader: Loader) -> None:
        self._ops = loader.shard.ops
        self._tiled = loader.shard.deterministic
        self._gate_up = loader.weight("gate_proj.weight", "up_proj.weight")
        self._down = loader.weight("down_proj.weight")

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        return self._ops.mlp(x_TD, self._gate_up, self._down, tiled=self._tiled)
