"""What is in a model's files, by part: from headers, or from the table alone for a model that is not here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from r1_cluster.weights.headers import ITEM_BYTES, Entry
from r1_cluster.weights.tensors import PACKED_SUFFIX, SCALE_SUFFIX, SUFFIXES, Part, TensorSpec

FP8 = "F8_E4M3"
_FP8_PARTS: tuple[Part, ...] = ("attention", "mlp", "shared_experts", "experts")
_FORMAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Stored(NamedTuple):
    """A tensor in a file. `part` is None where the table does not know it. `parameters`: how many of the
    model's it holds, none where it only says how to read another one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part | None
    parameters: int = 0

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass
class Line:
    """A sum over tensors."""

    tensors: int = 0
    parameters: int = 0
    num_bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)  # bytes of each

    def add(self, other: Line) -> None:
        """Adds another sum to this one."""
        self.tensors += other.tensors
        self.parameters += other.parameters
        self.num_bytes += other.num_bytes
        self.dtypes += other.dtypes


def may_be_fp8(spec: TensorSpec) -> bool:
    """Whether DeepSeek stores it in FP8: the matrices of attention, MLPs and experts, but neither the gate
    nor the embedding, the head, and what only the MTP module has (DeepSeek-V3 README_WEIGHTS.md)."""
    return spec.part in _FP8_PARTS and len(spec.shape) == 2


def blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of a matrix's scales: one per block, those at the edges included."""
    return tuple(-(-size // side) for size, side in zip(shape, block))


def as_published(table: Iterable[TensorSpec], dtype: str, fp8_block: tuple[int, int] | None) -> list[Stored]:
    """The tensors as their makers store them. `dtype` is config.json's: bfloat16, float16 or float32.

    The bias of a gate is float32 in any checkpoint of DeepSeek's.
    """
    found = []
    for spec in table:
        kept = "F32" if spec.part == "gate" and len(spec.shape) == 1 else _FORMAT_NAMES[dtype]
        is_fp8 = fp8_block is not None and may_be_fp8(spec)
        count = math.prod(spec.shape)
        found.append(Stored(spec.name, FP8 if is_fp8 else kept, spec.shape, spec.part, count))
        if fp8_block is not None and is_fp8:
            scales = blocks(spec.shape, fp8_block)
            found.append(Stored(spec.name + SCALE_SUFFIX, "F32", scales, spec.part, 0))
    return found


def from_headers(entries: Mapping[str, Entry], table: Iterable[TensorSpec]) -> list[Stored]:
    """What a checkpoint's files hold, in the order of the table; what the table does not know comes last."""
    listed: dict[str, tuple[Part, int]] = {}
    for spec in table:
        for suffix in SUFFIXES:
            listed[spec.name + suffix] = spec.part, 0
        listed[spec.name] = listed[spec.name + PACKED_SUFFIX] = spec.part, math.prod(spec.shape)
    found = []
    for name in (*(name for name in listed if name in entries), *(entries.keys() - listed.keys())):
        entry = entries[name]
        part, count = listed.get(name, (None, math.prod(entry.shape)))
        found.append(Stored(name, entry.dtype, entry.shape, part, count))
    return found


def by_part(tensors: Iterable[Stored]) -> dict[Part | None, Line]:
    """One line for each part that there is, in the order of first appearance."""
    found: dict[Part | None, Line] = {}
    for tensor in tensors:
        line = Line(1, tensor.parameters, tensor.num_bytes, Counter({tensor.dtype: tensor.num_bytes}))
        found.setdefault(tensor.part, Line()).add(line)
    return found


def total(lines: Iterable[Line]) -> Line:
    """The sum of sums."""
    found = Line()
    for line in lines:
        found.add(line)
    return found


def active_parameters(lines: Mapping[Part | None, Line], experts_at_work: Fraction) -> int:
    """How many parameters one token is multiplied by: all but the embedding, and of the routed experts those
    it is sent to, the fraction `experts_at_work` of all."""
    found = sum(line.parameters for part, line in lines.items() if part not in ("embedding", "experts"))
    experts = lines["experts"].parameters if "experts" in lines else 0
    return found + int(experts * experts_at_work)
