"""`quantize`: its formats, and how far the weights of what it wrote are off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1_cluster.weights.tensors import INT4, INT8

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from r1_cluster.weights.quantize import TensorError

FORMATS = {"int8": INT8, "int4": INT4}


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
