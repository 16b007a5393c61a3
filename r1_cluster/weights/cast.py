"""Casts a checkpoint from FP8 blocks to BF16 and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from r1_cluster.weights.blocks import BLOCK, quantize
from r1_cluster.weights.checkpoint import CheckpointError
from r1_cluster.weights.headers import Entry
from r1_cluster.weights.inventory import FP8, Stored, blocks, may_be_fp8
from r1_cluster.weights.rewrite import CheckpointRewrite, Files, Outcome, Progress, RewriteError
from r1_cluster.weights.stream import Placed, Reader, Write, raw
from r1_cluster.weights.tensors import SCALE_SUFFIX, TensorSpec

To = Literal["bf16", "fp8"]

FP8_CONFIG: dict[str, object] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
"""config.json's quantization_config in DeepSeek's FP8 checkpoints."""


def cast(
    source: Path,
    target: Path,
    to: To,
    table: Iterable[TensorSpec],
    *,
    fp8_block: tuple[int, int] | None,
    module: Iterable[TensorSpec] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Casts the checkpoint in `source`, whose tensors `table` lists, to one in `target`. The tensors of
    `module`, the MTP module's, need not be there.

    To "bf16" all that is FP8 is multiplied by its scales, one per `fp8_block`; to "fp8" the matrices that
    DeepSeek stores so are quantized; the rest stays as it is. Goes on where an earlier run has ended. Raises
    CheckpointError for what is wrong with the source, RewriteError for the target and a full disk.
    """
    if to == "fp8" and fp8_block is not None:
        raise RewriteError(f"{source} is FP8 already; there is nothing to cast")
    table, module = [*table], [*module]
    files = Files.of(source, table, fp8_block, module=module)
    return _Cast(files, target, to, [*table, *module]).run(progress)


class _Cast(CheckpointRewrite):
    """One cast: what is there, and what is to be written."""

    def __init__(self, files: Files, target: Path, to: To, table: list[TensorSpec]) -> None:
        self.to = to
        self.quantized = {spec.name for spec in table if may_be_fp8(spec)}
        super().__init__(files, target)
        if not any(self._changes(placed) for plan in self.plan.values() for placed in plan.tensors.values()):
            raise RewriteError(f"{self.source} has no tensor that a cast to {to.upper()} would change")

    def becomes(self, name: str, entry: Entry) -> list[Stored]:
        if self.to == "bf16":
            return self.without_fp8(name, entry)
        if name not in self.quantized or entry.dtype == FP8:
            return [Stored(name, entry.dtype, entry.shape, None)]
        scales = Stored(name + SCALE_SUFFIX, "F32", blocks(entry.shape, BLOCK), None)
        return [Stored(name, FP8, entry.shape, None), scales]

    def quantization_config(self) -> dict[str, object] | None:
        return FP8_CONFIG if self.to == "fp8" else None

    def _changes(self, placed: Placed) -> bool:
        return placed.stored.dtype != self.entries[placed.source].dtype

    def write_tensors(self, reader: Reader, file: str, write: Write) -> None:
        tensors = self.plan[file].tensors
        for placed in tensors.values():
            stored, name = placed.stored, placed.source
            if stored.name != name or not stored.num_bytes:
                continue  # scales are written with what they scale
            if stored.dtype == FP8 and self._changes(placed):
                self._quantize(reader, placed, tensors[name + SCALE_SUFFIX], write)
            else:
                self.write_without_fp8(reader, placed, write)

    def _quantize(self, reader: Reader, placed: Placed, scales: Placed, write: Write) -> None:
        name, num_columns = placed.source, placed.stored.shape[1]
        for first, weight in reader.rows(name, BLOCK[0]):
            try:
                values, scale = quantize(weight)
            except ValueError as error:
                fault = f"{self.entries[name].file}: tensor {name} {error}"
                raise CheckpointError(self.source, [fault]) from None
            write(raw(values), placed.offset + first * num_columns)
            write(raw(scale), scales.offset + first // BLOCK[0] * scale.shape[1] * scale.itemsize)
