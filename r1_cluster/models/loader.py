"""From tensors on disk, or wherever they come from, to weights on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels.int_weight import group_scaled
from kernels.launch import native_fp8
from kernels.ops import Cache, Fp8Cache, Ops, ScaledWeight, Weight, for_device
from r1_cluster.weights.tensors import Slices, TensorSource, TensorSpec, layer_name, rank_slices


@dataclass(frozen=True)
class Shard:
    """Where and how a process computes its part of a model. `fp8_cache`: what attention keeps of its tokens
    is rounded to FP8. It is the `rank` of so many `ranks` where tensor parallelism divides a stage."""

    device: torch.device
    dtype: torch.dtype
    deterministic: bool
    fp8_cache: bool = False
    rank: int = 0
    ranks: int = 1

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
    """Reads tensors for a shard: a rank's parts of those that `table` says are divided. Whoever is given one
    names its own tensors alone: `under` and `layer` give loaders of what lies below a name. All methods raise
    CheckpointError."""

    source: TensorSource
    shard: Shard
    table: Mapping[str, TensorSpec] = field(default_factory=dict)
    prefix: str = ""

    @classmethod
    def of(cls, source: TensorSource, shard: Shard, table: Iterable[TensorSpec]) -> Loader:
        """For a shard that may be one of several ranks. Experts are divided as a whole, not each of them."""
        return cls(source, shard, {spec.name: spec for spec in table if spec.part != "experts"})

    def under(self, name: str) -> Loader:
        """For the module called `name`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def layer(self, layer: int) -> Loader:
        """For one layer of the network."""
        return self.under(layer_name(layer))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, or that of the rank's part, without reading it."""
        shape = self.source.shape(self.prefix + name)
        slices = self._slices(self.prefix + name)
        return shape if slices is None else _sizes(slices, shape)

    def get(self, name: str, out: Tensor | None = None) -> Tensor:
        """One tensor in the compute dtype; in `out`, which is contiguous, where that is given."""
        return self._get(name, self.shard.dtype, out)

    def get_float32(self, name: str) -> Tensor:
        """One tensor in float32, whatever the compute dtype."""
        return self._get(name, torch.float32)

    def first_row(self, name: str) -> int:
        """Where the rank's rows of a tensor begin."""
        slices = self._slices(self.prefix + name)
        return 0 if slices is None else slices[0].start or 0

    def stays_scaled(self, *names: str) -> bool:
        """Whether all of them are stored in the same integers, or in FP8 that the device keeps; and no rank's
        part begins or ends within what shares a scale."""
        full = [self.prefix + name for name in names]
        if self.shard.ops.KEEPS_FP8 and all(map(self.source.is_fp8, full)):
            return all(self._cut_at(name, *self.source.fp8_block) for name in full)
        bits = {self.source.int_bits(name) for name in full}
        if len(bits) > 1 or None in bits:
            return False
        return all(self._cut_at(name, 1, self.source.int_group or 1) for name in full)

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
            self.get(name, part)
        return out

    def fill(self, into: ScaledWeight, *names: str) -> None:
        """As `weight` gives matrices that stay as they are stored, into a weight that is there already;
        straight from disk where that has the device's format."""
        first_row = first_scale = 0
        for name in names:
            num_rows = self.shape(name)[0]
            values = into.values[first_row : first_row + num_rows]
            part = self._as_stored(self.prefix + name, values)
            if part.values.data_ptr() != values.data_ptr():
                values.view(torch.uint8).copy_(part.values.view(torch.uint8))
            into.scale[first_scale : first_scale + len(part.scale)] = part.scale
            first_row, first_scale = first_row + num_rows, first_scale + len(part.scale)

    def _scaled(self, names: Sequence[str]) -> ScaledWeight:
        parts = [self._as_stored(self.prefix + name) for name in names]
        if len(parts) == 1:
            return parts[0]
        # An FP8 stack's blocks fit because all parts but the last end with a whole one: see `fitting`.
        dtype = parts[0].values.dtype
        values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(dtype)
        return replace(parts[0], values=values, scale=torch.cat([part.scale for part in parts]))

    def _as_stored(self, name: str, place: Tensor | None = None) -> ScaledWeight:
        """`place`: where its values may be read to, should they lie there as they do on disk."""
        bits, slices = self.source.int_bits(name), self._slices(name)
        if bits is not None:
            return group_scaled(*self.source.get_int(name, slices), bits, self.shard.device)
        shape = self.source.shape(name) if slices is None else _sizes(slices, self.source.shape(name))
        fits = place is not None and place.is_cpu and place.shape == shape
        values, scale = self.source.get_scaled(name, slices, place if fits else None)
        return self.shard.ops.block_scaled(values, scale, self.source.fp8_block, self.shard.device)

    def _get(self, name: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        full = self.prefix + name
        return self.source.get(full, dtype, self.shard.device, self._slices(full), out)

    def _slices(self, full: str) -> Slices | None:
        spec = self.table.get(full)
        return None if spec is None else rank_slices(spec, self.shard.rank, self.shard.ranks)

    def _cut_at(self, full: str, *blocks: int) -> bool:
        """Whether a rank's part of a matrix is one of whole blocks, but for those at the matrix's end."""
        if (slices := self._slices(full)) is None:
            return True
        shape = self.source.shape(full)
        bounds = [part.indices(size)[:2] for part, size in zip(slices, shape)]
        return all(
            not first % block and (not last % block or last == size)
            for (first, last), size, block in zip(bounds, shape, blocks)
        )


def _sizes(slices: Slices, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for part, size in zip(slices, shape))
