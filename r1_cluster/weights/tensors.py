"""The tensors that a model should have, as rows of one table that its family lists.

Names are those of Hugging Face's layout. What reads, checks, cuts or writes weights is handed the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALE_SUFFIX = "_scale_inv"
"""An FP8 tensor's block scales stand under its own name with this suffix; the table does not list them."""

PACKED_SUFFIX, INT_SCALE_SUFFIX, INT_SHAPE_SUFFIX = "_packed", "_scale", "_shape"
"""An integer tensor is stored as three, its own name with these suffixes: see `integers`."""

SUFFIXES = (SCALE_SUFFIX, INT_SHAPE_SUFFIX, PACKED_SUFFIX, INT_SCALE_SUFFIX)
"""In the order in which a checkpoint is read; the tensor that has the name itself comes last."""

_LAYERS = "model.layers."
_BLOCK = 128


@dataclass(frozen=True)
class IntFormat:
    """Weights in integers of `bits`, 8 or 4: one scale per row and `group_size` columns, None: one a row."""

    bits: int
    group_size: int | None


INT8 = IntFormat(8, None)
INT4 = IntFormat(4, 128)

Part = Literal["embedding", "norm", "attention", "mlp", "gate", "shared_experts", "experts", "mtp", "head"]
"""What a tensor belongs to. `mtp` is what only a module that predicts further tokens has."""


class TensorSpec(NamedTuple):
    """One tensor. `split_dim` is the dimension that ranks of tensor parallelism divide among them, None where
    each of them has the whole; `units` says into how many equal parts it may be cut (heads), 0 anywhere.
    `stays_float` is a matrix that is not used as a weight of one product, and is left alone where the others
    of its part are quantized."""

    name: str
    shape: tuple[int, ...]
    part: Part
    split_dim: int | None = None
    stays_float: bool = False
    units: int = 0

    @property
    def layer(self) -> int | None:
        """See `layer_of`."""
        return layer_of(self.name)


Slices = tuple[slice, ...]
"""One per dimension, of step 1."""


def rank_slices(spec: TensorSpec, rank: int, ranks: int) -> Slices | None:
    """A rank's part of a tensor; None for all of it. Whole blocks of 128 where they are enough for all; ranks
    beyond the units share them."""
    dim = spec.split_dim
    if ranks == 1 or dim is None:
        return None
    size = spec.shape[dim]
    units = spec.units or (size // _BLOCK if not size % _BLOCK and size // _BLOCK >= ranks else size)
    first = rank * units // ranks
    last = max((rank + 1) * units // ranks, first + 1)
    part = slice(first * size // units, last * size // units)
    return tuple(part if i == dim else slice(None) for i in range(len(spec.shape)))


class TensorSource(Protocol):
    """Where tensors come from: `Checkpoint` is one. All methods raise CheckpointError."""

    fp8_block: tuple[int, int]
    """The (rows, columns) that share one scale of an FP8 matrix."""
    int_group: int | None
    """The columns that share one scale of a row of an integer matrix, None where all do."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def get(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        slices: Slices | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One tensor, or a slice of it, in `dtype`, whatever it is stored in; in `out`, which is as it should
        be and contiguous, where that is given."""

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is stored in FP8, with block scales beside it."""

    def get_scaled(
        self, name: str, slices: Slices | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """An FP8 matrix as it is stored, and its float32 block scales; or a slice that begins and, unless the
        matrix ends there, ends with a block. In `out`, if given: see `get`."""

    def int_bits(self, name: str) -> int | None:
        """8 or 4 for a matrix that is stored in integers with scales beside it, None for others."""

    def get_int(self, name: str, slices: Slices | None = None) -> tuple[Tensor, Tensor]:
        """An integer matrix [N, K] in int8, and its float32 scales [N, groups]; or a slice whose columns do
        so with a group."""


def listed_name(name: str) -> str:
    """What the table calls a tensor that may be stored as one of several."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def layer_name(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"{_LAYERS}{layer}"


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, None for the embedding, the final norm and the head."""
    number = name.removeprefix(_LAYERS).partition(".")[0]
    return int(number) if name.startswith(_LAYERS) and number.isdecimal() else None


def mlp_tensors(name: str, part: Part, width: int, inner: int) -> Iterator[TensorSpec]:
    """Those of a gated MLP called `name`, from `width` to `inner` and back."""
    yield TensorSpec(f"{name}.gate_proj.weight", (inner, width), part, 0)
    yield TensorSpec(f"{name}.up_proj.weight", (inner, width), part, 0)
    yield TensorSpec(f"{name}.down_proj.weight", (width, inner), part, 1)
