"""What a worker loads: its parts of the model, in the order in which their tensors are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.int_weight import group_scaled
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.models.network import StageModel
from r1_cluster.planning.layout import Layout, WorkerSpec
from r1_cluster.weights.inventory import blocks, may_be_fp8
from r1_cluster.weights.quantize import is_quantized
from r1_cluster.weights.tensors import Slices, TensorSpec

_META = torch.device("meta")


class Parts(NamedTuple):
    """A worker's parts of the model; None where it does not host that role. `copies` are experts that it
    holds for the death of others."""

    experts: ExpertModel | None
    router: RouterModel | None
    stage: StageModel | None
    copies: tuple[ExpertModel, ...] = ()


def load_parts(config: ModelConfig, loader: Loader, spec: WorkerSpec) -> Parts:
    """Loads what a worker hosts, and opens no other tensors. Raises CheckpointError."""
    experts = router = stage = None
    if spec.experts is not None:
        experts = ExpertModel(config, loader, config.moe_layers, range(*spec.experts))
    if spec.router is not None:
        layers = range(max(spec.router[0], config.moe_layers.start), spec.router[1])
        router = RouterModel(config, loader, layers)
    if spec.stage is not None:
        stage = StageModel(config, loader, range(*spec.stage))
    copies = tuple(ExpertModel(config, loader, config.moe_layers, range(*span)) for span in spec.copies)
    return Parts(experts, router, stage, copies)


def worker_tensors(config: ModelConfig, layout: Layout) -> dict[str, list[str]]:
    """Of each worker of a layout, by its name: the tensors that it loads, named as the table names them, in
    the order in which it first asks for them.

    A tensor that several workers load is listed with each of them: a tied embedding with the first stage and
    the last, routed experts with every copy of their shard. Needs no checkpoint: what loads is run over
    tensors without data.
    """
    table = tensor_table(config)
    return {worker.name: _asked_for(config, worker, table) for worker in layout.workers}


def part_tensors(config: ModelConfig, spec: WorkerSpec) -> list[str]:
    """Those of one worker: see `worker_tensors`."""
    return _asked_for(config, spec, tensor_table(config))


def weight_bytes(config: ModelConfig, spec: WorkerSpec) -> int:
    """What a worker's weights take of a GPU's memory, in bytes.

    They are stored as the config says: in BF16, in FP8 with DeepSeek's choice of matrices, or in integers as
    `weights quantize` writes them. What a rank cannot keep so, because its part ends within what shares a
    scale, counts in BF16; a stage's table of rotary positions counts as well. Needs no checkpoint, as
    `worker_tensors`.
    """
    table = tensor_table(config)
    source = _Weigher(config, table)
    _load_nothing(config, spec, table, source, torch.bfloat16)
    positions = 0 if spec.stage is None else 4 * config.max_position_embeddings * config.rope.dim
    return source.num_bytes + positions


def _asked_for(config: ModelConfig, spec: WorkerSpec, table: list[TensorSpec]) -> list[str]:
    source = _Recorder(table)
    _load_nothing(config, spec, table, source, torch.float32)
    return [*source.asked]


def _load_nothing(
    config: ModelConfig, spec: WorkerSpec, table: list[TensorSpec], source: _Recorder, dtype: torch.dtype
) -> None:
    """What a worker does when it loads, over tensors without data."""
    shard = Shard(_META, dtype, deterministic=False, rank=spec.rank, ranks=spec.ranks)
    brief = replace(config, max_position_embeddings=1)  # or else a table of all positions were computed
    load_parts(brief, Loader.of(source, shard, table), spec)


class _Recorder:
    """A source of tensors that have shapes and no data, all of them in floats: weights of few bits are asked
    for by the same names in the same order. `asked` are those that were."""

    fp8_block = (128, 128)
    int_group: int | None = None

    def __init__(self, table: list[TensorSpec]) -> None:
        self._specs = {spec.name: spec for spec in table}
        self.asked: dict[str, None] = {}
        self.num_bytes = 0  # of those that were asked for

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def get(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        slices: Slices | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        part = self._part(name, dtype, slices)
        self.num_bytes += part.nbytes
        return part

    def _part(self, name: str, dtype: torch.dtype, slices: Slices | None) -> Tensor:
        self.asked[name] = None
        whole = torch.empty(self.shape(name), dtype=dtype, device=_META)
        return whole if slices is None else whole[slices]

    def is_fp8(self, name: str) -> bool:
        return False

    def int_bits(self, name: str) -> int | None:
        return None

    def get_scaled(
        self, name: str, slices: Slices | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{name} is in floats here")

    def get_int(self, name: str, slices: Slices | None = None) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{name} is in floats here")


class _Weigher(_Recorder):
    """One whose tensors are of the types that the config says; `num_bytes` is what a GPU keeps of those that
    were asked for."""

    def __init__(self, config: ModelConfig, table: list[TensorSpec]) -> None:
        super().__init__(table)
        self._has_fp8 = config.fp8_block is not None
        self._int_format = config.int_format
        self.fp8_block = config.fp8_block or self.fp8_block
        self.int_group = None if self._int_format is None else self._int_format.group_size

    def is_fp8(self, name: str) -> bool:
        return self._has_fp8 and may_be_fp8(self._specs[name])

    def int_bits(self, name: str) -> int | None:
        if self._int_format is None or not is_quantized(self._specs[name]):
            return None
        return self._int_format.bits

    def get_scaled(
        self, name: str, slices: Slices | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        values = self._part(name, torch.float8_e4m3fn, slices)
        rows, columns = blocks((values.shape[0], values.shape[1]), self.fp8_block)
        scale = torch.empty(rows, columns, dtype=torch.float32, device=_META)
        self.num_bytes += values.nbytes + scale.nbytes
        return values, scale

    def get_int(self, name: str, slices: Slices | None = None) -> tuple[Tensor, Tensor]:
        assert self._int_format is not None
        values = self._part(name, torch.int8, slices)
        num_rows, width = values.shape
        groups = 1 if self.int_group is None else -(-width // self.int_group)
        scale = torch.empty(num_rows, groups, dtype=torch.float32, device=_META)
        kept = group_scaled(values, scale, self._int_format.bits, _META)
        self.num_bytes += kept.values.nbytes + kept.scale.nbytes
        return values, scale
