"""From what an engine tells a worker to its roles, ready for the first step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.devices import find_device, free_bytes
from r1_cluster.comm.links import Link
from r1_cluster.comm.ranks import RankGroup
from r1_cluster.engine.boot import StepLimits, WorkerBoot
from r1_cluster.engine.parts import Parts, load_parts, part_tensors
from r1_cluster.engine.roles import (
    BROADCAST_TOKENS,
    OtherRanksRouter,
    RemoteRouter,
    Router,
    RouterRole,
    StageRole,
    local_dispatcher,
)
from r1_cluster.models.config import ModelConfig
from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.models.fitting import check_fits, check_fp8
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel
from r1_cluster.planning.layout import Layout, WorkerSpec
from r1_cluster.planning.memory import check_room, worker_bytes
from r1_cluster.weights.checkpoint import Checkpoint, tensors_here

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Loaded(NamedTuple):
    """What a worker has once its weights are there: the layout that it is part of, its roles (None where it
    does not host one), and how much was read of the checkpoint in which time."""

    layout: Layout
    experts: ExpertModel | None
    router: RouterRole | None
    stage: StageRole | None
    read_bytes: int
    read_s: float
    copies: tuple[ExpertModel, ...]


def load_roles(boot: WorkerBoot, spec: WorkerSpec, links: Mapping[str, Link]) -> Loaded:
    """Loads what `spec` hosts. The roles find their peers among `links`, by name, once they are asked to
    compute. Raises CheckpointError, ConfigError and, where a device's memory is too small, OutOfDeviceMemory
    before any page is there."""
    config = load_config(boot.checkpoint)
    layout = Layout(boot.workers, config.num_hidden_layers)
    shard = Shard(
        find_device(boot.device),
        _DTYPES[boot.dtype],
        boot.deterministic,
        boot.kv_cache_dtype == "fp8",
        spec.rank,
        spec.ranks,
    )
    check_fits(config, shard.ops, shard.dtype, boot.page_size)
    check_fp8(config, shard.device, fp8_cache=shard.fp8_cache)
    parts, read_bytes, read_s = _read(boot, spec, config, shard)
    router = None
    if parts.router is not None:
        router = RouterRole(parts.router)
        if parts.experts is not None and layout.has_its_experts(spec):
            router.dispatcher = local_dispatcher(parts.experts)
    _check_memory(boot, spec, config, layout, shard.device)
    stage = None
    if parts.stage is not None:
        ranks = _rank_group(boot, layout, spec, links)
        moe: Router | None = _remote_router(boot, layout, spec, links) or router
        if ranks is not None:
            moe = moe or OtherRanksRouter()
        stage = StageRole(parts.stage, moe, ranks, num_pages=boot.num_pages, page_size=boot.page_size)
    if shard.device.type == "cuda" and boot.limits is not None:
        # Who exchanges rows may have those of all.
        num_sources = len(layout.exchange_of(spec)) or 1
        _prepare(boot.limits, config, stage, router, parts, num_sources=num_sources)
    return Loaded(layout, parts.experts, router, stage, read_bytes, read_s, parts.copies)


def _read(boot: WorkerBoot, spec: WorkerSpec, config: ModelConfig, shard: Shard) -> tuple[Parts, int, float]:
    """The parts of the model, how many bytes were read of the checkpoint, and in how many seconds."""
    table = tensor_table(config)
    needed = {tensor.name for tensor in table}
    here = tensors_here(Path(boot.checkpoint))
    own = part_tensors(config, spec)
    if here is not None and not needed <= here:  # a folder with the files of some workers alone
        needed = set(own)
    began = time.monotonic()
    with Checkpoint(boot.checkpoint, table, config.fp8_block, config.int_format, needed=needed) as checkpoint:
        if spec.ranks == 1:  # a rank reads parts of what it loads
            checkpoint.expect(own)
        parts = load_parts(config, Loader.of(checkpoint, shard, table), spec)
        return parts, checkpoint.num_read, time.monotonic() - began


def _check_memory(
    boot: WorkerBoot,
    spec: WorkerSpec,
    config: ModelConfig,
    layout: Layout,
    device: torch.device,
) -> None:
    """Once the weights are there, and before any page: whether what these roles need fits beside them."""
    limits, free = boot.limits, free_bytes(device)
    if limits is None or free is None:
        return
    parts = worker_bytes(
        config,
        layout,
        spec,
        num_pages=boot.num_pages,
        page_size=boot.page_size,
        max_num_seqs=limits.max_num_seqs,
        max_batch_tokens=limits.max_batch_tokens,
        max_context_len=min(limits.max_context_len, config.max_position_embeddings),
        fp8_cache=boot.kv_cache_dtype == "fp8",
    )
    check_room(parts, free)


def _remote_router(
    boot: WorkerBoot, layout: Layout, spec: WorkerSpec, links: Mapping[str, Link]
) -> RemoteRouter | None:
    """A stage's way to its router, where that is in another process."""
    serving = layout.router_of(spec)
    if serving is None or serving is spec:
        return None
    # Longer than the router waits for its experts, so that each blames the one that is silent.
    return RemoteRouter(serving.name, links, boot.step_timeout_s + 0.5)


def _rank_group(
    boot: WorkerBoot, layout: Layout, spec: WorkerSpec, links: Mapping[str, Link]
) -> RankGroup | None:
    """A stage's other ranks, where it has any."""
    if spec.ranks == 1:
        return None
    names = [rank.name for rank in layout.ranks_of(spec)]
    # Longer than the first rank waits for its router, so that each blames the one that is silent.
    longer_s = 0.0 if layout.exchange_of(spec) else 1.0
    return RankGroup(names, spec.rank, links, boot.step_timeout_s + longer_s)


def _prepare(
    limits: StepLimits,
    config: ModelConfig,
    stage: StageRole | None,
    router: RouterRole | None,
    parts: Parts,
    *,
    num_sources: int,
) -> None:
    """Compiles, tunes and records before the first step, which has no time for it."""
    if stage is not None:
        stage.prepare(limits)
    if router is not None:
        if router.dispatcher is not None:
            return  # its stage has called it, and all experts with it
        router.model.warm_up(limits.max_batch_tokens)
    if parts.experts is not None and config.moe is not None:
        top_k = config.moe.num_experts_per_tok
        for experts in (parts.experts, *parts.copies):
            experts.warm_up(limits.max_batch_tokens * top_k * num_sources)
        if router is None:
            parts.experts.warm_up_shares(min(BROADCAST_TOKENS, limits.max_batch_tokens), top_k)
