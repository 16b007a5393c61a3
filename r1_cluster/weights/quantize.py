"""A checkpoint in INT8 or INT4, from one in floats or FP8: linear layers, by rounding to nearest.

Quantized are the matrices of attention, dense MLPs, shared and routed experts, those of MTP modules too. Not:
embeddings and head (0.3 % of R1's parameters, and every token is decided by them), norms, gates (which choose
experts), the projection into the MTP module, and what the table says stays in floats (MLA's `kv_b_proj`).

File by file and some rows at a time, so that memory does not depend on the model's size. All is written to
TARGET.unfinished, files under temporary names, index and config.json last, and renamed at the end: whatever
kills a run, no folder looks whole that is not. The next run starts over.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kernels.int_weight import dequantize_groups, group_scaled, quantize_int
from r1_cluster.weights.checkpoint import Checkpoint
from r1_cluster.weights.headers import INDEX, SINGLE
from r1_cluster.weights.integers import quantization_config, stored_shapes, to_words
from r1_cluster.weights.rewrite import to_json
from r1_cluster.weights.stream import PARTIAL, raw, sync_folder, write_whole
from r1_cluster.weights.tensors import (
    INT_SCALE_SUFFIX,
    INT_SHAPE_SUFFIX,
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    IntFormat,
    TensorSpec,
)

QUANTIZED_PARTS = ("attention", "mlp", "shared_experts", "experts")
UNFINISHED = ".unfinished"

_ROWS_BYTES = 32 << 20  # of float32 rows in memory at once
_CPU = torch.device("cpu")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SCALE_DTYPE = "BF16"
_FLOATS = ("F64", "F32", "F16", "BF16")


class QuantizeError(ValueError):
    """A checkpoint cannot be quantized, or not to there; the text says why and what to do."""


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


@dataclass(frozen=True)
class _Plan:
    """One tensor of the source, and what it becomes: (name, dtype, shape) of each tensor that is written."""

    name: str
    shape: tuple[int, ...]
    quantized: bool
    written: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(_num_bytes(dtype, shape) for _, dtype, shape in self.written)


def is_quantized(spec: TensorSpec) -> bool:
    """Whether a tensor is one of those that are quantized."""
    return spec.part in QUANTIZED_PARTS and len(spec.shape) == 2 and not spec.stays_float


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    table: Sequence[TensorSpec],
    how: IntFormat,
    fp8_block: tuple[int, int] | None = None,
    *,
    mtp: Sequence[TensorSpec] = (),
    on_tensor: Callable[[TensorError, int, int], None] = lambda error, done, total: None,
) -> list[TensorError]:
    """Writes the checkpoint `source` to the new folder `target`; returns each quantized tensor's error.

    `table` lists the model's tensors, `mtp` those of MTP modules, which need not be there. `on_tensor` is
    called after each of the quantized ones with its error and the bytes written, so far and in the end.
    Raises CheckpointError for a source that is not sound, QuantizeError for values that are not finite, for a
    target that exists or does not fit, and for a disk that fills all the same.
    """
    source, target = Path(source), Path(target)
    if target.exists() or target.is_symlink():
        raise QuantizeError(f"{target} exists already: name a folder that does not")
    unfinished = target.with_name(target.name + UNFINISHED)
    specs = {spec.name: spec for spec in (*table, *mtp)}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with Checkpoint(source, table, fp8_block) as checkpoint:
        plans = _plan(checkpoint, specs, how)
        target.parent.mkdir(parents=True, exist_ok=True)
        if unfinished.exists():  # of a run that was ended
            shutil.rmtree(unfinished)
        done, total = 0, sum(plan.num_bytes for file in plans.values() for plan in file)
        _check_room(target.parent, total)
        try:
            unfinished.mkdir()
            _copy_others(source, unfinished)
            errors = []
            for file, tensors in plans.items():
                for plan, error in _write_file(checkpoint, unfinished / file, tensors, how):
                    done += plan.num_bytes
                    if error is not None:
                        errors.append(error)
                        on_tensor(error, done, total)
            _write_index(unfinished, plans)
            not_quantized = _modules_in_floats(specs, plans)
            config |= {"quantization_config": quantization_config(how, not_quantized)}
            write_whole(unfinished / "config.json", to_json(config))
            sync_folder(unfinished)
            unfinished.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise QuantizeError(
                f"{error}; {target} was not made, what was begun is in {unfinished}"
            ) from error
    return errors


def _plan(checkpoint: Checkpoint, specs: dict[str, TensorSpec], how: IntFormat) -> dict[str, list[_Plan]]:
    """By file, in the order of the names."""
    plans: dict[str, list[_Plan]] = {}
    for name, (file, dtype, shape) in sorted(
        (name, (entry.file, entry.dtype, entry.shape)) for name, entry in checkpoint.entries.items()
    ):
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in specs:
            continue  # comes with its weight
        spec = specs.get(name)
        quantized = spec is not None and is_quantized(spec)
        if dtype != "F8_E4M3" and dtype not in (_FLOATS if quantized else _DTYPES):
            raise QuantizeError(f"{file}: tensor {name} is of dtype {dtype}, which cannot be read as floats")
        plans.setdefault(file, []).append(_plan_tensor(name, dtype, shape, how if quantized else None))
    if not any(plan.quantized for file in plans.values() for plan in file):
        raise QuantizeError(f"{checkpoint.path} holds no weights of the model that could be quantized")
    return plans


def _plan_tensor(name: str, dtype: str, shape: tuple[int, ...], how: IntFormat | None) -> _Plan:
    if how is None:
        return _Plan(name, shape, False, [(name, "BF16" if dtype == "F8_E4M3" else dtype, shape)])
    dtypes = {PACKED_SUFFIX: "I32", INT_SCALE_SUFFIX: _SCALE_DTYPE, INT_SHAPE_SUFFIX: "I64"}
    stored = stored_shapes(shape, how)
    return _Plan(name, shape, True, [(name + suffix, dtypes[suffix], stored[suffix]) for suffix in stored])


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise QuantizeError(f"{folder} has {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB are needed")


def _copy_others(source: Path, folder: Path) -> None:
    """Tokenizer, templates and whatever else lies beside the weights, but for other weights."""
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if file.is_file() and not weights and file.name not in (INDEX, "config.json"):
            shutil.copyfile(file, folder / file.name)


def _write_file(
    checkpoint: Checkpoint, path: Path, plans: Sequence[_Plan], how: IntFormat
) -> Iterator[tuple[_Plan, TensorError | None]]:
    """Writes one safetensors file under a temporary name, tensor by tensor, and renames it; yields what was
    written, and its error if it was quantized."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        for name, dtype, shape in plan.written:
            end = offset + _num_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
            offset = end
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)  # the format aligns the data to 8 bytes
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for plan in plans:
            if plan.quantized:
                yield plan, _write_quantized(checkpoint, file, plan, how)
            else:
                _write_copy(checkpoint, file, plan)
                yield plan, None
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _write_quantized(checkpoint: Checkpoint, file: BinaryIO, plan: _Plan, how: IntFormat) -> TensorError:
    error, scales = TensorError(plan.name), []
    for rows in _runs(plan.shape):
        weight = checkpoint.get(plan.name, torch.float32, _CPU, (rows, slice(None)))
        if not bool(weight.isfinite().all()):
            raise QuantizeError(
                f"tensor {plan.name} of {checkpoint.path} holds NaN or infinity: nothing to round"
            )
        q, scale = quantize_int(weight, how.bits, how.group_size)
        file.write(raw(to_words(q, how.bits)))
        scales.append(scale)
        stored = group_scaled(q, scale, 8, _CPU)
        error.add(weight, dequantize_groups(stored.values, stored.scale, stored.width, torch.float32))
    file.write(raw(torch.cat(scales).to(_DTYPES[_SCALE_DTYPE])))
    file.write(raw(torch.tensor(plan.shape)))
    return error


def _write_copy(checkpoint: Checkpoint, file: BinaryIO, plan: _Plan) -> None:
    ((_, dtype, shape),) = plan.written
    for rows in _runs(shape):
        slices = (rows, *(slice(None) for _ in shape[1:])) if shape else None
        file.write(raw(checkpoint.get(plan.name, _DTYPES[dtype], _CPU, slices)))


def _runs(shape: tuple[int, ...]) -> Iterator[slice]:
    """A tensor's rows, some at a time."""
    num_rows = shape[0] if shape else 1
    step = max(1, _ROWS_BYTES // (4 * max(1, math.prod(shape[1:]))))
    # Whole FP8 blocks, so that none is read twice.
    step = max(128, step // 128 * 128)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _DTYPES[dtype].itemsize


def _write_index(folder: Path, plans: dict[str, list[_Plan]]) -> None:
    if list(plans) == [SINGLE]:
        return  # which needs none
    weight_map = {
        name: file for file, tensors in plans.items() for plan in tensors for name, *_ in plan.written
    }
    total = sum(plan.num_bytes for tensors in plans.values() for plan in tensors)
    write_whole(folder / INDEX, to_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _modules_in_floats(specs: dict[str, TensorSpec], plans: dict[str, list[_Plan]]) -> list[str]:
    """The linear layers that are not quantized."""
    return sorted(
        plan.name.removesuffix(".weight")
        for tensors in plans.values()
        for plan in tensors
        if not plan.quantized and len(plan.shape) == 2 and plan.name.endswith(".weight")
        if (spec := specs.get(plan.name)) is None or spec.part != "embedding"
    )
