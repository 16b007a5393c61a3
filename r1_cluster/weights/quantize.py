"""A checkpoint in INT8 or INT4, from one in floats or FP8: linear layers, by rounding to nearest.

Quantized are the matrices of attention, dense MLPs, shared and routed experts, those of MTP modules too. Not:
embeddings and head (0.3 % of R1's parameters, and every token is decided by them), norms, gates (which choose
experts), the projection into the MTP module, and what the table says stays in floats (MLA's `kv_b_proj`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.int_weight import dequantize_groups, group_scaled, quantize_int
from r1_cluster.weights.checkpoint import CheckpointError
from r1_cluster.weights.headers import Entry
from r1_cluster.weights.integers import quantization_config, stored_shapes, to_words
from r1_cluster.weights.inventory import Stored
from r1_cluster.weights.rewrite import CheckpointRewrite, Files, Outcome, Progress, RewriteError
from r1_cluster.weights.stream import Placed, Reader, Write, raw
from r1_cluster.weights.tensors import (
    INT_SCALE_SUFFIX,
    INT_SHAPE_SUFFIX,
    PACKED_SUFFIX,
    IntFormat,
    TensorSpec,
)

QUANTIZED_PARTS = ("attention", "mlp", "shared_experts", "experts")

_CPU = torch.device("cpu")
_DTYPES = {PACKED_SUFFIX: "I32", INT_SCALE_SUFFIX: "BF16", INT_SHAPE_SUFFIX: "I64"}


@dataclass
class TensorError:
    """How far a quantized tensor is from what it was: the norm of the difference over its own (Frobenius),
    and the largest single difference. Relative to zero it is 0."""

    name: str
    squared_error: float = 0.0
    squared_norm: float = 0.0
    largest: float = 0.0

    @property
    def relative(self) -> float:
        """‖w - ŵ‖ / ‖w‖."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def add(self, weight: Tensor, rounded: Tensor) -> None:
        """Counts some rows in."""
        difference = rounded - weight
        # In float64, for squares may leave the range of float32 where weights do not.
        self.squared_error += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        self.squared_norm += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
        self.largest = max(self.largest, float(difference.abs_().max()))


def is_quantized(spec: TensorSpec) -> bool:
    """Whether a tensor is one of those that are quantized."""
    return spec.part in QUANTIZED_PARTS and len(spec.shape) == 2 and not spec.stays_float


def stored_as(name: str, shape: tuple[int, ...], how: IntFormat) -> list[Stored]:
    """The tensors that a matrix is stored as in integers."""
    shapes = stored_shapes(shape, how)
    return [Stored(name + suffix, _DTYPES[suffix], shapes[suffix], None) for suffix in shapes]


def quantize_checkpoint(
    source: Path,
    target: Path,
    table: Iterable[TensorSpec],
    how: IntFormat,
    *,
    fp8_block: tuple[int, int] | None,
    module: Iterable[TensorSpec] = (),
    progress: Progress | None = None,
) -> tuple[Outcome, list[TensorError]]:
    """Writes the checkpoint `source` in integers to `target`; returns each quantized tensor's error as well.

    `table` lists the model's tensors, `module` those of MTP modules, which need not be there. FP8 is read by
    one scale per `fp8_block`. Goes on where an earlier run has ended. Raises CheckpointError for a source
    that is not sound, or holds what cannot be rounded, RewriteError for the target and a full disk.
    """
    table, module = [*table], [*module]
    files = Files.of(source, table, fp8_block, module=module)
    job = _Quantize(files, target, [*table, *module], how)
    outcome = job.run(progress)
    return outcome, [TensorError(*error) for file in job.plan for error in job.done[file]]


class _Quantize(CheckpointRewrite):
    def __init__(self, files: Files, target: Path, table: list[TensorSpec], how: IntFormat) -> None:
        self.how = how
        self.specs = {spec.name: spec for spec in table}
        super().__init__(files, target)
        if not any(self._is_quantized(name) for name in self.entries):
            raise RewriteError(f"{self.source} holds no weights of the model that could be quantized")

    def _is_quantized(self, name: str) -> bool:
        return name in self.specs and is_quantized(self.specs[name])

    def becomes(self, name: str, entry: Entry) -> list[Stored]:
        if self._is_quantized(name):
            return stored_as(name, entry.shape, self.how)
        return self.without_fp8(name, entry)

    def quantization_config(self) -> dict[str, object]:
        return quantization_config(self.how, sorted(filter(None, map(self._layer_in_floats, self.entries))))

    def _layer_in_floats(self, name: str) -> str | None:
        """The linear layer whose weight a tensor is, if that is not quantized."""
        is_matrix = name.endswith(".weight") and len(self.entries[name].shape) == 2
        is_embedding = name in self.specs and self.specs[name].part == "embedding"
        keeps = is_matrix and not is_embedding and not self._is_quantized(name)
        return name.removesuffix(".weight") if keeps else None

    def write_tensors(self, reader: Reader, file: str, write: Write) -> list[tuple[object, ...]]:
        tensors, errors = self.plan[file].tensors, []
        for placed in tensors.values():
            name = placed.source
            if placed.stored.name == name + PACKED_SUFFIX:
                rows = placed, tensors[name + INT_SCALE_SUFFIX]
                errors.append(astuple(self._quantize(reader, *rows, write)))
                shape = torch.tensor(self.entries[name].shape)
                write(raw(shape), tensors[name + INT_SHAPE_SUFFIX].offset)
            elif placed.stored.name == name and placed.stored.num_bytes:
                self.write_without_fp8(reader, placed, write)
        return errors

    def _quantize(self, reader: Reader, packed: Placed, scales: Placed, write: Write) -> TensorError:
        """Writes a matrix's words and scales, some rows at a time."""
        name = packed.source
        error = TensorError(name)
        for first, weight in reader.floats(name, self.block, torch.float32):
            q, scale = quantize_int(weight, self.how.bits, self.how.group_size)
            for placed, rows in ((packed, to_words(q, self.how.bits)), (scales, scale.bfloat16())):
                write(raw(rows), placed.offset + first * rows.shape[1] * rows.itemsize)
            stored = group_scaled(q, scale, 8, _CPU)
            error.add(weight, dequantize_groups(stored.values, stored.scale, stored.width, torch.float32))
            if not math.isfinite(error.squared_error):
                what = "has values that are NaN or infinite, or too large for a scale"
                raise CheckpointError(self.source, [f"{self.entries[name].file}: tensor {name} {what}"])
        return error
