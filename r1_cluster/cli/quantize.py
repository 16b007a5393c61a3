"""`quantize`: an INT8 or INT4 checkpoint from one in floats or FP8, with how far its weights are off."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from r1_cluster.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from r1_cluster.weights.quantize import TensorError

FORMATS = ("int8", "int4")


def quantize(source: Path, target: Path, how: str, progress: Callable[[int, int], None]) -> int:
    """Writes the checkpoint `source` in `how`, one of FORMATS, to the new folder `target`; prints a table of
    errors. `progress` is told bytes done and in all. Raises ConfigError where it cannot be done."""
    from r1_cluster.models.config import ModelConfigError
    from r1_cluster.models.family import load_config, mtp_table, tensor_table
    from r1_cluster.weights.checkpoint import CheckpointError
    from r1_cluster.weights.quantize import QuantizeError, quantize_checkpoint
    from r1_cluster.weights.tensors import INT4, INT8

    began = time.monotonic()
    num_bytes = 0

    def on_tensor(_: TensorError, done: int, total: int) -> None:
        nonlocal num_bytes
        num_bytes = total
        progress(done, total)

    try:
        config = load_config(source)
        table, mtp = tensor_table(config), mtp_table(config)
        formats = dict(zip(FORMATS, (INT8, INT4), strict=True))
        errors = quantize_checkpoint(
            source, target, table, formats[how], config.fp8_block, mtp=mtp, on_tensor=on_tensor
        )
    except (ModelConfigError, CheckpointError, QuantizeError, OSError) as error:
        raise ConfigError(str(error)) from None
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
