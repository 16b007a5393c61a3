"""`quantize`: an INT8 or INT4 checkpoint from one in floats or FP8, with how far its weights are off."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from r1_cluster.weights.quantize import TensorError

FORMATS = ("int8", "int4")
_PROGRESS_S = 2.0


def quantize(source: Path, target: Path, how: str) -> int:
    """Writes the checkpoint `source` in `how`, one of FORMATS, to the new folder `target`; prints progress
    and a table of errors. Returns the exit code: 1, and a sentence on stderr, where it cannot be done."""
    from r1_cluster.models.config import ModelConfigError
    from r1_cluster.models.family import load_config, mtp_table, tensor_table
    from r1_cluster.weights.checkpoint import CheckpointError
    from r1_cluster.weights.quantize import QuantizeError, quantize_checkpoint
    from r1_cluster.weights.tensors import INT4, INT8

    began = shown = time.monotonic()
    num_bytes = 0

    def on_tensor(error: TensorError, done: int, total: int) -> None:
        nonlocal shown, num_bytes
        num_bytes = total
        if (now := time.monotonic()) - shown >= _PROGRESS_S:
            shown = now
            rate = done / (now - began)
            left = (total - done) / rate
            print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left")

    try:
        config = load_config(source)
        table, mtp = tensor_table(config), mtp_table(config)
        formats = dict(zip(FORMATS, (INT8, INT4), strict=True))
        errors = quantize_checkpoint(
            source, target, table, formats[how], config.fp8_block, mtp=mtp, on_tensor=on_tensor
        )
    except (ModelConfigError, CheckpointError, QuantizeError, OSError) as error:
        print(f"r1-cluster: {error}", file=sys.stderr)
        return 1
    print(error_table(errors, {spec.name: spec.part for spec in (*table, *mtp)}))
    print(f"{target}: {num_bytes / 1e9:.2f} GB of {how.upper()} in {time.monotonic() - began:.0f} s")
    return 0


def error_table(errors: Iterable[TensorError], parts: Mapping[str, str]) -> str:
    """By part: number of tensors, relative error (Frobenius) of all together, the tensor that is farthest
    off, and the largest error of a single weight; as Markdown."""
    by_part: dict[str, list[TensorError]] = {}
    for error in errors:
        by_part.setdefault(parts[error.name], []).append(error)
    lines = [
        "| part | tensors | relative error | largest of a tensor | largest of a weight |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for part, listed in by_part.items():
        squared = sum(error.squared_error for error in listed)
        norm = sum(error.squared_norm for error in listed)
        worst = max(listed, key=lambda error: error.relative)
        largest = max(error.largest for error in listed)
        together = (squared / norm) ** 0.5 if norm else 0.0
        lines.append(
            f"| {part} | {len(listed)} | {together:.2%} | {worst.relative:.2%} {worst.name} | {largest:.3g} |"
        )
    return "\n".join(lines)
