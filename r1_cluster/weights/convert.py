"""Converts a checkpoint to one file for each rank of tensor and expert parallelism, in DeepSeek's own layout.

Source: DeepSeek-V3 inference/convert.py. Routed experts go to ranks whole, as many to each; the matrices that
the table says are split are cut in equal parts; each rank has a copy of all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from r1_cluster.weights.headers import ITEM_BYTES
from r1_cluster.weights.inventory import FP8, Stored
from r1_cluster.weights.rewrite import Files, Outcome, Progress, Rewrite, RewriteError
from r1_cluster.weights.stream import Reader, Write, copy, lay_out, raw
from r1_cluster.weights.tensors import SCALE_SUFFIX, TensorSpec


class _Cut(NamedTuple):
    """The part [start, stop) of a tensor's dimension `dim`; all of it where that is None."""

    dim: int | None
    start: int
    stop: int


_ALL = _Cut(None, 0, 0)


def convert(
    source: Path,
    target: Path,
    table: Iterable[TensorSpec],
    ranks: int,
    *,
    rename: Callable[[str], str],
    fp8_block: tuple[int, int] | None,
    progress: Progress | None = None,
) -> Outcome:
    """Writes model{i}-mp{ranks}.safetensors for each rank i, of the tensors that `table` lists and no others,
    and copies the tokenizer's files. Goes on where an earlier run has ended.

    `rename` gives a tensor's name there. Raises CheckpointError for what is wrong with the source,
    RewriteError for what ranks cannot share, for the target, and for a full disk.
    """
    table = [*table]
    files = Files.of(source, table, fp8_block)
    return _Convert(files, target, table, ranks, rename=rename).run(progress)


class _Convert(Rewrite):
    def __init__(
        self,
        files: Files,
        target: Path,
        table: list[TensorSpec],
        ranks: int,
        *,
        rename: Callable[[str], str],
    ) -> None:
        super().__init__(files, target)
        self.ranks = ranks
        self.beside = [path for path in sorted(self.source.glob("*token*")) if path.is_file()]
        self.cuts: dict[str, dict[str, _Cut]] = {}
        experts = len({_expert(spec) for spec in table if spec.part == "experts"})
        if experts % ranks:
            raise RewriteError(f"{ranks} ranks cannot share {experts} experts: each needs as many")
        self.plan = {}
        for rank in range(ranks):
            file = f"model{rank}-mp{ranks}.safetensors"
            self.cuts[file] = {}
            tensors = []
            for spec in table:
                if spec.part == "experts" and _expert(spec) // (experts // ranks) != rank:
                    continue
                for name in (spec.name, spec.name + SCALE_SUFFIX):
                    if name in self.entries:
                        cut, shape = self._cut(spec, name, rank)
                        self.cuts[file][rename(name)] = cut
                        stored = Stored(rename(name), self.entries[name].dtype, shape, spec.part)
                        tensors.append((stored, name))
            self.plan[file] = lay_out(tensors)

    def asked(self) -> bytes:
        return b"convert"

    def finish(self) -> None:
        """Nothing: who loads a rank's file needs no other."""

    def _cut(self, spec: TensorSpec, name: str, rank: int) -> tuple[_Cut, tuple[int, ...]]:
        """A rank's part of a tensor, or of its scales, and that part's shape."""
        entry, dim = self.entries[name], spec.split_dim
        if spec.part == "experts" or dim is None or self.ranks == 1:
            return _ALL, entry.shape
        size = entry.shape[dim]
        is_fp8 = self.entries[spec.name].dtype == FP8
        if size % self.ranks or (is_fp8 and spec.shape[dim] % (self.ranks * self.block[dim])):
            blocks = f" in blocks of {self.block[dim]}" if is_fp8 else ""
            what = f"tensor {spec.name} {list(spec.shape)}{blocks}"
            raise RewriteError(f"{self.ranks} ranks cannot share dimension {dim} of {what}")
        step = size // self.ranks
        shape = list(entry.shape)
        shape[dim] = step
        return _Cut(dim, rank * step, (rank + 1) * step), tuple(shape)

    def write_tensors(self, reader: Reader, file: str, write: Write) -> None:
        for placed in self.plan[file].tensors.values():
            cut, name = self.cuts[file][placed.stored.name], placed.source
            if cut.dim == 1:
                row_bytes = placed.stored.shape[1] * ITEM_BYTES[placed.stored.dtype]
                for first, rows in reader.rows(name):
                    write(raw(rows[:, cut.start : cut.stop]), placed.offset + first * row_bytes)
                continue
            entry = self.entries[name]
            begin = cut.start * (entry.num_bytes // entry.shape[0]) if cut.dim == 0 else 0
            copy(reader, placed, write, begin)


def _expert(spec: TensorSpec) -> int:
    """The number of a routed expert, which its tensors' names have: ….experts.NUMBER.gate_proj.weight."""
    return int(spec.name.split(".")[-3])
