"""Casts a checkpoint from FP8 blocks to BF16 and back.

The index and then config.json come last, so that a folder whose cast was killed never looks like a
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from r1_cluster.weights.blocks import BLOCK, dequantize, quantize
from r1_cluster.weights.checkpoint import CheckpointError
from r1_cluster.weights.headers import INDEX, Entry
from r1_cluster.weights.inventory import FP8, Stored, blocks, may_be_fp8
from r1_cluster.weights.rewrite import Files, Outcome, Progress, Rewrite, RewriteError, to_json
from r1_cluster.weights.stream import (
    CHUNK_ITEMS,
    PARTIAL,
    Placed,
    Planned,
    Reader,
    Write,
    lay_out,
    raw,
    write_whole,
)
from r1_cluster.weights.tensors import SCALE_SUFFIX, TensorSpec

To = Literal["bf16", "fp8"]

CONFIG = "config.json"
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
"""config.json's quantization_config in DeepSeek's FP8 checkpoints."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", PARTIAL)


def cast(
    source: Path,
    target: Path,
    to: To,
    table: Iterable[TensorSpec],
    *,
    fp8_block: tuple[int, int] | None,
    progress: Progress | None = None,
) -> Outcome:
    """Casts the checkpoint in `source`, whose tensors `table` lists, to one in `target`.

    To "bf16" all that is FP8 is multiplied by its scales, one per `fp8_block`; to "fp8" the matrices that
    DeepSeek stores so are quantized; the rest stays as it is. Goes on where an earlier run has ended. Raises
    CheckpointError for what is wrong with the source, RewriteError for the target and a full disk.
    """
    if to == "fp8" and fp8_block is not None:
        raise RewriteError(f"{source} is FP8 already; there is nothing to cast")
    table = [*table]
    files = Files.of(source, table, fp8_block)
    return _Cast(files, target, to, table, fp8_block or BLOCK).run(progress)


class _Cast(Rewrite):
    """One cast: what is there, and what is to be written."""

    last = (CONFIG, INDEX)

    def __init__(
        self, files: Files, target: Path, to: To, table: list[TensorSpec], block: tuple[int, int]
    ) -> None:
        super().__init__(files, target)
        self.to, self.block = to, block
        self.quantized = {spec.name for spec in table if to == "fp8" and may_be_fp8(spec)}
        # A file that holds nothing but scales has nothing left.
        self.plan = {file: plan for file in files.names if (plan := self._planned(file)).tensors}
        if not any(self._changes(placed) for plan in self.plan.values() for placed in plan.tensors.values()):
            raise RewriteError(f"{self.source} has no tensor that a cast to {to.upper()} would change")
        self.config = (self.source / CONFIG).read_bytes()
        self.index = (self.source / INDEX).read_bytes() if (self.source / INDEX).exists() else None
        self.beside = files_beside(self.source)

    def asked(self) -> bytes:
        return repr((self.to, self.block)).encode() + self.config + b"\0" + (self.index or b"")

    def _planned(self, file: str) -> Planned:
        tensors: list[tuple[Stored, str]] = []
        for name, entry in self.entries.items():
            if entry.file != file or (self.to == "bf16" and self._is_scale(name)):
                continue
            dtype = entry.dtype
            if self.to == "bf16" and dtype == FP8:
                self._require_scale(name, entry)
                dtype = "BF16"
            elif name in self.quantized:
                dtype = FP8
            tensors.append((Stored(name, dtype, entry.shape, None), name))
            if dtype == FP8 != entry.dtype:
                scales = Stored(name + SCALE_SUFFIX, "F32", blocks(entry.shape, BLOCK), None)
                tensors.append((scales, name))
        return lay_out(tensors)

    def _is_scale(self, name: str) -> bool:
        weight = self.entries.get(name.removesuffix(SCALE_SUFFIX))
        return name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == FP8

    def _require_scale(self, name: str, entry: Entry) -> None:
        """Tensors that the table does not list were not held against anything yet."""
        scale = self.entries.get(name + SCALE_SUFFIX)
        if len(entry.shape) != 2 or scale is None or scale.shape != blocks(entry.shape, self.block):
            fault = f"{entry.file}: tensor {name} is FP8, but has no {name}{SCALE_SUFFIX} of the right shape"
            raise CheckpointError(self.source, [fault])

    def _changes(self, placed: Placed) -> bool:
        return placed.stored.dtype != self.entries[placed.source].dtype

    def write_tensors(self, reader: Reader, file: str, write: Write) -> None:
        tensors = self.plan[file].tensors
        for placed in tensors.values():
            stored, name = placed.stored, placed.source
            if stored.name != name or not stored.num_bytes:
                continue  # scales are written with what they scale
            if not self._changes(placed):
                for start in range(0, stored.num_bytes, CHUNK_ITEMS):
                    write(memoryview(reader.read(name, start, CHUNK_ITEMS)), placed.offset + start)
            elif stored.dtype == FP8:
                self._quantize(reader, placed, tensors[name + SCALE_SUFFIX], write)
            else:
                self._dequantize(reader, placed, write)

    def _dequantize(self, reader: Reader, placed: Placed, write: Write) -> None:
        num_columns = placed.stored.shape[1]
        scale = reader.scales(placed.source)
        block_rows = self.block[0]
        for first, weight in reader.rows(placed.source, block_rows):
            of_rows = scale[first // block_rows : -(-(first + len(weight)) // block_rows)]
            values = dequantize(weight, of_rows, self.block)
            write(raw(values), placed.offset + first * num_columns * values.itemsize)

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

    def finish(self) -> None:
        placed = {name: (file, t) for file, plan in self.plan.items() for name, t in plan.tensors.items()}
        if self.index is not None:
            metadata = json.loads(self.index).get("metadata")
            size = sum(tensor.stored.num_bytes for _, tensor in placed.values())
            metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
            weight_map = {name: file for name, (file, _) in placed.items()}
            write_whole(self.target / INDEX, to_json({"metadata": metadata, "weight_map": weight_map}))
        config = json.loads(self.config)
        config.pop("quantization_config", None)
        if self.to == "fp8":
            config["quantization_config"] = FP8_CONFIG
        write_whole(self.target / CONFIG, to_json(config))


def files_beside(source: Path) -> list[Path]:
    """Tokenizer, template and whatever else lies beside the weights."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (INDEX, CONFIG)
        and path.suffix not in _WEIGHTS
    ]
