"""What a worker loads: its parts of the model, in the order in which their tensors are asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.models.network import StageModel
from r1_cluster.planning.layout import Layout, WorkerSpec
from r1_cluster.weights.tensors import Slices, TensorSpec


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


def _asked_for(config: ModelConfig, worker: WorkerSpec, table: list[TensorSpec]) -> list[str]:
    source = _Recorder({spec.name: spec.shape for spec in table})
    shard = Shard(
        torch.device("meta"), torch.float32, deterministic=False, rank=worker.rank, ranks=worker.ranks
    )
    load_parts(config, Loader.of(source, shard, table), worker)
    return [*source.asked]


class _Recorder:
    """A source of tensors that have shapes and no data, all of them in floats: weights of few bits are asked
    for by the same names in the same order. `asked` are those that were."""

    fp8_block = (128, 128)
    int_group: int | None = None

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.asked: dict[str, None] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        slices: Slices | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        self.asked[name] = None
        whole = torch.empty(self._shapes[name], dtype=dtype, device=device)
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
