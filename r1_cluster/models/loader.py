"""From tensors on disk, or wherever they come from, to weights on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels.int_weight import group_scaled
from kernels.launch import native_fp8
from kernels.ops import Cache, Fp8Cache, Ops, ScaledWeight, Weight, for_device
from r1_cluster.weights.tensors import TensorSource, layer_name


@dataclass(frozen=True)
class Shard:
    """Where and how a process computes its part of a model. `fp8_cache`: what attention keeps of its tokens
    is rounded to FP8."""

    device: torch.device
    dtype: torch.dtype
    deterministic: bool
    fp8_cache: bool = False

    @cached_property
    def ops(self) -> Ops:
        """The operations of the device, chosen once."""
        return for_device(self.device)

    def zeros(self, *sizes: int) -> Tensor:
        """In the compute dtype, on the device."""
        return torch.zeros(sizes, dtype=self.dtype, device=self.device)

    def new_cache(self, sizes: Sequence[int], scale_sizes: Sequence[int]) -> Cache:
        """Zeros of `sizes`; in FP8 with scales of `scale_sizes` beside them (`kernels.ops.Fp8Cache`)."""
        if not self.fp8_cache:
            return self.zeros(*sizes)
        values = torch.zeros(*sizes, dtype=native_fp8(self.device), device=self.device)
        return Fp8Cache(values, torch.zeros(*scale_sizes, dtype=torch.float32, device=self.device))


@dataclass(frozen=True)
class Loader:
    """Reads tensors for a shard. Whoever is given one names its own tensors alone: `under` and `layer` give
    loaders of what lies below a name. All methods raise CheckpointError."""

    source: TensorSource
    shard: Shard
    prefix: str = ""

    def under(self, name: str) -> Loader:
        """For the module called `name`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def layer(self, layer: int) -> Loader:
        """For one layer of the network."""
        return self.under(layer_name(layer))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.source.shape(self.prefix + name)

    def get(self, name: str) -> Tensor:
        """One tensor in the compute dtype."""
        return self.source.get(self.prefix + name, self.shard.dtype, self.shard.device)

    def get_float32(self, name: str) -> Tensor:
        """One tensor in float32, whatever the compute dtype."""
        return self.source.get(self.prefix + name, torch.float32, self.shard.device)

    def stays_scaled(self, *names: str) -> bool:
        """Whether all of them are stored in the same integers, or in FP8 that the device keeps."""
        if self.shard.ops.KEEPS_FP8 and all(self.source.is_fp8(self.prefix + name) for name in names):
            return True
        bits = {self.source.int_bits(self.prefix + name) for name in names}
        return len(bits) == 1 and None not in bits

    def weight(self, *names: str) -> Weight:
        """Matrices of the same width, one below the other: as they are stored where they stay so, else in
        the compute dtype."""
        return self._scaled(names) if self.stays_scaled(*names) else self.stack(*names)

    def stack(self, *names: str) -> Tensor:
        """Tensors one below the other, in the compute dtype."""
        if len(names) == 1:
            return self.get(names[0])
        rows = [self.shape(name)[0] for name in names]
        rest = self.shape(names[0])[1:]
        out = torch.empty(sum(rows), *rest, dtype=self.shard.dtype, device=self.shard.device)
        for part, name in zip(torch.split(out, rows), names):
            part.copy_(self.get(name))  # each copied once
        return out

    def _scaled(self, names: Sequence[str]) -> ScaledWeight:
        parts = [self._as_stored(self.prefix + name) for name in names]
        if len(parts) == 1:
            return parts[0]
        # An FP8 stack's blocks fit because all parts but the last end with a whole one: see `fitting`.
        dtype = parts[0].values.dtype
        values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(dtype)
        return replace(parts[0], values=values, scale=torch.cat([part.scale for part in parts]))

    def _as_stored(self, name: str) -> ScaledWeight:
        bits = self.source.int_bits(name)
        if bits is not None:
            return group_scaled(*self.source.get_int(name), bits, self.shard.device)
        values, scale = self.source.get_scaled(name)
        return self.shard.ops.block_scaled(values, scale, self.source.fp8_block, self.shard.device)
